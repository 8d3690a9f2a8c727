"""DART: keys and normed states of a prompt in, pivots and kept tokens out; pivots in the program's order."""

from __future__ import annotations

import torch
from golden_case import Case, differ

from vlprune.method import ModelFacts
from vlprune.methods.dart import dart
from vlprune.protocols import ScoreInputs, Tap


def check(case: Case) -> str:
    """Pivots from the keys, then the stage with the order in which the program visits them."""
    hyper, states = case.hyper, case["in.hidden_states"]
    start, number = hyper["image_start"], hyper["n_image"]
    image, text = slice(start, start + number), slice(start + number, None)
    norms = case["in.key_states"].abs().sum(dim=(1, 3))                                            # (1, L)
    pivots = []
    for name, part, offset in (("image", image, start), ("text", text, start + number)):
        best = norms[0, part].argsort(descending=True, stable=True)[: hyper[f"pivot_{name}"]] + offset
        problem = differ(f"out.{name}_pivots", best.sort().values, case[f"out.{name}_pivots"].sort().values)
        if problem:
            return problem
        pivots += best.tolist()
    order = tuple(pivots.index(place) for place in case["in.pivot_visit_order"].tolist())
    keep = hyper["pivot_image"] + hyper["picks_per_pivot"] * len(pivots)
    options = {"image_pivots": hyper["pivot_image"], "text_pivots": hyper["pivot_text"], "order": order}
    stage = dart(ModelFacts(decoder_layers=32), keep, **options).stages[0]
    signals = {
        Tap("key_l1", 1): norms[:, image], Tap("text_key_l1", 1): norms[:, text], Tap("normed", 0): states[:, image], Tap("text_normed", 0): states[:, text]
    }  # fmt: skip
    valid = torch.ones_like(norms[:, text], dtype=torch.bool)
    inputs = ScoreInputs(states[:, image], stage.budget.num_keep(number), signals=signals, text_valid=valid)
    selection = stage.selector(stage.scorer(inputs), inputs)
    stay = selection.keep_indices[0]
    roles = selection.roles
    assert roles is not None
    problem = differ("out.image_pivots", stay[roles[0] == 0] + start, case["out.image_pivots"].sort().values)
    absolute = differ("out.keep_indices_absolute", stay + start, case["out.keep_indices_absolute"])
    return problem or absolute or differ("out.keep_indices", stay, case["out.keep_indices"])
