"""VisionZip: CLS rows, states and keys of one block in; dominant patches, and the merged sequence with CLS first, out."""

from __future__ import annotations

import torch
from golden_case import Case, differ
from torch import Tensor

from vlprune.method import ModelFacts
from vlprune.methods.visionzip import visionzip
from vlprune.protocols import ScoreInputs, Tap

TOLERANCE = 1e-4


def check(case: Case) -> str:
    """The method's own stage as released: choice, order, merged tokens, sizes."""
    num_keep = case["out.tokens"].shape[1]
    facts = ModelFacts(vision_layers=24, feature_layer=22, has_cls=True)
    (stage,) = visionzip(facts, num_keep, contextual=case.hyper["contextual"], variant="code").stages
    states = case["in.hidden_states"]
    inputs = ScoreInputs(
        tokens=states[:, 1:],
        num_keep=num_keep,
        num_original=states.shape[1] - 1,
        signals={
            Tap("cls_row", 22): case["in.cls_attention"].mean(dim=1)[:, 1:],
            Tap("vision_keys", 22): case["in.metric"][:, 1:],
            Tap("vision_states", 22): states[:, 1:],
            Tap("cls_state", 22): states[:, :1].expand_as(states[:, 1:]),
        },
        project=lambda merged: merged,
    )
    if set(stage.needs) != set(inputs.signals):
        return f"needs {stage.needs}"
    selection = stage.selector(stage.scorer(inputs).float(), inputs)
    assert selection.roles is not None
    if (selection.keep_indices.diff(dim=1) <= 0).any():
        return "keep_indices do not rise"
    dominant = _with_role(selection.keep_indices, selection.roles, 0)
    reduced = stage.reducer(inputs, selection)
    assert reduced.tokens is not None
    assert reduced.sizes is not None
    error = float((reduced.tokens - case["out.tokens"]).abs().max())
    if int(reduced.sizes.sum()) != states.shape[0] * states.shape[1]:
        return "sizes do not count every patch and CLS once"
    cls = torch.zeros_like(dominant[:, :1])
    return differ("out.keep_indices", torch.cat((cls, dominant + 1), dim=1), case["out.keep_indices"]) or (
        f"out.tokens differ by {error:.2e}" if not error <= TOLERANCE else ""
    )


def _with_role(keep: Tensor, roles: Tensor, role: int) -> Tensor:
    """(B, n) the kept indices of one role."""
    return torch.stack([indices[which == role] for indices, which in zip(keep, roles, strict=True)])
