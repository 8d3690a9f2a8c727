"""EViT by loops over the tokens of one item: the most attended stay, the others become one sum in the place of the best of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage."""
    (attention,) = (values[0] for tap, values in inputs.signals.items() if tap.kind in ("cls_row", "column_mean"))
    order = sorted(range(attention.shape[0]), key=lambda token: -float(attention[token]))
    stay, leave = order[: inputs.num_keep - 1], order[inputs.num_keep - 1 :]
    fused = torch.zeros_like(inputs.tokens[0, 0])
    for token in leave:
        fused = fused + attention[token] * inputs.tokens[0, token]
    kept = sorted([*stay, leave[0]])
    return kept, torch.stack([fused if token == leave[0] else inputs.tokens[0, token] for token in kept])
