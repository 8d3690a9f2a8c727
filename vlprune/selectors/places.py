"""Where tokens stand: which are real, which share a tile or frame, and what is left of an item in reading order."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def real_tokens(inputs: ScoreInputs) -> Tensor:
    """(B, N) bool: false for separators."""
    if inputs.grid is None:
        return torch.ones(inputs.tokens.shape[:2], dtype=torch.bool, device=inputs.tokens.device)
    return inputs.grid[..., 1] >= 0


def frames_of(inputs: ScoreInputs) -> Tensor:
    """(B, N) tile or frame of each token; all 0 without a grid."""
    if inputs.grid is None:
        return torch.zeros(inputs.tokens.shape[:2], dtype=torch.int64, device=inputs.tokens.device)
    return inputs.grid[..., 0]


def together(inputs: ScoreInputs, indices: Tensor) -> Tensor:
    """(B, K, N) bool: whether token ``indices`` (B, K) and token n are both real and of one tile or frame."""
    real, frame = real_tokens(inputs), frames_of(inputs)
    same = frame.gather(1, indices)[..., None] == frame[:, None]
    return same & real[:, None] & real.gather(1, indices)[..., None]


def separators_last(scores: Tensor, inputs: ScoreInputs) -> Tensor:
    """Scores (B, N) with separators below every token; finite, so that they still come before what a caller rules out."""
    return scores.masked_fill(~real_tokens(inputs), torch.finfo(scores.dtype).min)


def rest_in_order(taken: Tensor, inputs: ScoreInputs) -> tuple[Tensor, Tensor]:
    """What is left beside ``taken`` (B, N), and how many of it are real.

    Returns:
        (B, N) token numbers: real ones that are left, in reading order, then separators that are left, then those taken; and (B, 1) the number of
        the first kind.
    """
    real = real_tokens(inputs)
    order = torch.where(taken, 2, (~real).long()).argsort(dim=-1, stable=True)
    return order, (real & ~taken).sum(dim=-1, keepdim=True)
