"""FrameTopK: every frame of a video keeps its own best tokens, as many as the others; what does not divide evenly goes to the best of those left.

The K tokens with the lowest rank within their frame stay, equal ranks by score. Of F frames with enough tokens each keeps K // F, and K % F of them one
more. Pictures, text, and videos whose frames are not known count as one frame. Separators between rows count with the frame that they are in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs, Selection, Tap


@dataclass(frozen=True)
class FrameTopK:
    """Keep K tokens, the best of every frame."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The grid only."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K)."""
        if inputs.grid is None or inputs.modality != "video":
            return Selection(scores.topk(inputs.num_keep, dim=-1).indices.sort(dim=-1).values)
        by_score = scores.argsort(dim=-1, descending=True, stable=True)                  # (B, N) places, best first
        frames = torch.gather(inputs.grid[..., 0].clamp(0, scores.shape[1] - 1), 1, by_score)
        by_frame = frames.argsort(dim=-1, stable=True)                                   # frame by frame, best first in each
        counts = torch.zeros_like(frames).scatter_add(1, frames, torch.ones_like(frames))
        starts = torch.gather(counts.cumsum(dim=-1) - counts, 1, torch.gather(frames, 1, by_frame))
        ranks = torch.arange(scores.shape[1], device=scores.device) - starts             # within the frame, in the order of by_frame
        of_place = torch.zeros_like(frames).scatter(1, by_frame, ranks)                  # in the order of by_score
        first = of_place.argsort(dim=-1, stable=True)[:, : inputs.num_keep]              # low rank first, equal ranks by score
        return Selection(torch.gather(by_score, 1, first).sort(dim=-1).values)
