"""ToMe: groups, means and sizes of one round of matching, whatever the order of the merged tokens; and the schedules of r."""

from __future__ import annotations

from dataclasses import replace

import torch
from golden_case import Case, apart, differ

from vlprune.method import ModelFacts
from vlprune.methods.tome import schedule, tome
from vlprune.protocols import ScoreInputs, Tap
from vlprune.selectors.matching import Alternate

TOLERANCE = 1e-5


def check(case: Case) -> str:
    """The method's own stage on the patches; CLS and distillation tokens are nobody's patches."""
    if "in.layers_r_inflect" in case:
        return check_schedules(case)
    prefix = int(case.hyper["class_token"]) + int(case.hyper["distill_token"])
    keys, tokens = case["in.metric"][:, prefix:], case["in.x"][:, prefix:]
    sizes = case["in.size"][:, prefix:, 0] if "in.size" in case else None
    (stage,) = tome(ModelFacts(vision_layers=1, has_cls=prefix > 0), r=case.hyper["r"]).stages
    if prefix == 2:                                                      # the second token in front makes the first patch a source
        stage = replace(stage, selector=replace(stage.selector, split=Alternate(0)))
    num_keep = stage.budget.num_keep(tokens.shape[1])
    inputs = ScoreInputs(tokens=tokens, num_keep=num_keep, signals={Tap("vision_keys", 0): keys}, sizes=sizes)
    return check_merge(case, stage, inputs, prefix)


def check_merge(case: Case, stage: object, inputs: ScoreInputs, prefix: int) -> str:
    """Groups and means of a stage that merges, in any order; also for PiToMe."""
    selection = stage.selector(stage.scorer(inputs).float(), inputs)  # type: ignore[attr-defined]
    reduced = stage.reducer(inputs, selection)  # type: ignore[attr-defined]
    if (selection.keep_indices.diff(dim=1) <= 0).any():
        return "keep_indices do not rise"
    if selection.keep_indices.shape[1] + prefix != case["out.x"].shape[1]:
        return f"{selection.keep_indices.shape[1]} patches stay, expected {case['out.x'].shape[1] - prefix}"
    theirs, ours = case["out.group_of_token"][:, prefix:], selection.plan
    together = differ("tokens in one group", (ours[:, :, None] == ours[:, None]).int(), (theirs[:, :, None] == theirs[:, None]).int())
    if together:
        return together
    wide = theirs[..., None]
    tokens = torch.gather(case["out.x"], 1, wide.expand(-1, -1, case["out.x"].shape[-1]))
    mine = torch.gather(reduced.tokens, 1, ours[..., None].expand_as(tokens))
    error = float((mine - tokens).abs().max())
    sizes = torch.gather(case["out.size"], 1, wide)[..., 0]
    known = "out.unmerged" in case and prefix < 2                        # with a distillation token the program's `unmerge` takes another order
    unmerged = case["out.unmerged"][:, prefix:] if known else tokens
    if not error <= TOLERANCE or not float((mine - unmerged).abs().max()) <= TOLERANCE:
        return f"means differ by {error:.2e}"
    return apart("out.size", reduced.sizes.gather(1, ours), sizes, 1e-6)


def check_schedules(case: Case) -> str:
    """Every row."""
    for (layers, number, inflection), wanted in zip(case["in.layers_r_inflect"].tolist(), case["out.schedule"].tolist(), strict=True):
        got = schedule(int(layers), (int(number), inflection) if inflection else int(number))
        if list(got) != wanted[: int(layers)]:
            return f"{int(layers)} blocks, r={number:g}, inflection {inflection}: {got}, expected {wanted}"
    return ""
