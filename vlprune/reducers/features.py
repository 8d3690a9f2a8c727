"""Which features are merged: those before the projector where it can be applied again, else the visual tokens themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap


def mergeable(inputs: ScoreInputs, tap: Tap) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features (B, N, C) float32 to merge, and what turns merged ones (B, K, C) into tokens (B, K, D)."""
    project = inputs.project
    if project is None:
        return inputs.tokens.float(), lambda merged: merged
    return inputs.signal(tap).float(), lambda merged: project(merged.to(inputs.tokens.dtype))
