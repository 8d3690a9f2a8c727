"""SoftKeyBias: scores as what is added to attention logits, so that the loss of a task reaches them through a choice that has no gradient.

Reference: STTS, arXiv:2603.18004. Official code: https://github.com/allenai/molmo2 (`olmo/nn/temporal_image_vit.py`)

Scores are stretched to [e^-2, 1] within each frame and the bias is their logarithm: the best token of a frame is seen as ever, the worst as
if its attention were divided by e^2. The first frame has none.

Differences, both undone by ``per="row"``: the official code stretches within each *row* of a frame, so that the worst of a good row looks
worse than the best of a bad one (here: within each frame); and equal scores give everybody -2 there (here: 0, nobody is worse).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs

EPSILON = 1e-6
PER = ("frame", "row")


@dataclass(frozen=True)
class SoftKeyBias:
    """Logarithm of the scores, stretched to [``lowest``, 1] within each frame or row of a frame."""

    per: str = "frame"
    lowest: float = math.exp(-2)

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise OptionError(f"per={self.per!r}: 'frame' or 'row'")

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Tensor:
        """(B, N), from ``lowest``'s logarithm to 0."""
        if inputs.grid is None:
            raise OptionError("the key bias is made frame by frame, but this model gives no grid")
        frame, row, _ = inputs.grid.unbind(dim=-1)
        count = scores.shape[1]
        group = frame if self.per == "frame" else frame * (row.amax(dim=-1, keepdim=True) + 1) + row
        start = scores.new_full((scores.shape[0], count), -torch.inf)                    # there are at most as many groups as tokens
        high = start.scatter_reduce(1, group, scores, "amax").gather(1, group)
        low = -start.scatter_reduce(1, group, -scores, "amax").gather(1, group)
        spread = high - low
        share = (scores - low) / (spread + EPSILON)
        if self.per == "frame":
            share = torch.where(spread > 0, share, 1.0)
        return torch.where(frame <= 0, 0.0, torch.log(share * (1 - self.lowest) + self.lowest))
