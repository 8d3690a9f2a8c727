"""CDPruner: projected features and CLIP's embeddings of patches and text in, kept tokens out. The images of a call are the tiles of one."""

from __future__ import annotations

from golden_case import Case, differ, grid_of

from vlprune.method import ModelFacts
from vlprune.methods.cdpruner import cdpruner
from vlprune.protocols import ScoreInputs


def check(case: Case) -> str:
    """Indices and mask."""
    tiles, each, width = case["in.features"].shape
    keep = case.hyper["T"]
    stage = cdpruner(ModelFacts(), tiles * keep, text_embeds=case["in.text_embeds"], image_embeds=lambda states: states).stages[0]
    embeds = case["in.image_embeds"].flatten(0, 1)[None]
    inputs = ScoreInputs(case["in.features"].reshape(1, -1, width), tiles * keep, grid_of(tiles, 1, each), signals={stage.needs[0]: embeds})
    kept = stage.selector(stage.scorer(inputs), inputs).keep_indices
    mask = case["out.keep_mask"].new_zeros(1, tiles * each).scatter(1, kept, 1).reshape(tiles, each)
    problem = differ("out.keep_mask", mask, case["out.keep_mask"])
    return problem or differ("out.keep_indices", kept.reshape(tiles, keep) % each, case["out.keep_indices"])
