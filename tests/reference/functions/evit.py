"""EViT: patches that stay, and the token that stands for the others; the program keeps K patches and the new one."""

from __future__ import annotations

import math

import torch
from golden_case import Case, differ

from vlprune.method import ModelFacts
from vlprune.methods.evit import evit
from vlprune.protocols import ScoreInputs, Tap

TOLERANCE = 1e-5


def check(case: Case) -> str:
    """The method's own stage; CLS does not change."""
    tokens, attention = case["in.x_after_attention"][:, 1:], case["in.cls_attention"]
    fuse = bool(case.hyper["fuse_token"])
    kept = math.ceil(case.hyper["keep_rate"] * tokens.shape[1])
    (stage,) = evit(ModelFacts(vision_layers=1, has_cls=True), kept + fuse, layers=(0,), fuse=fuse).stages
    inputs = ScoreInputs(tokens=tokens, num_keep=stage.budget.num_keep(tokens.shape[1]), signals={Tap("cls_row", 0): attention})
    selection = stage.selector(stage.scorer(inputs).float(), inputs)
    rows, keep, roles = range(tokens.shape[0]), selection.keep_indices, selection.roles
    patches = keep if roles is None else torch.stack([keep[row][roles[row] == 0] for row in rows])
    wrong = differ("out.keep_indices", patches, case["out.keep_indices"])
    if wrong or not fuse:
        return wrong
    reduced = stage.reducer(inputs, selection)
    assert reduced.tokens is not None
    assert roles is not None
    ordered = torch.stack([torch.cat([reduced.tokens[row][[keep[row].tolist().index(i) for i in case["out.order_indices"][row]]],
                                      reduced.tokens[row][roles[row] == 2]]) for row in rows])  # fmt: skip
    error = float((ordered - case["out.tokens"][:, 1:]).abs().max())
    return "" if error <= TOLERANCE else f"out.tokens differ by {error:.2e}"
