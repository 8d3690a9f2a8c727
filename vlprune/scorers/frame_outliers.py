"""FrameOutliers: frames that are unlike the video keep more tokens, and in a frame those stay that are least like the frame and the video.

Reference: VidCom2, "Video Compression Commander", arXiv:2505.14454. Official code: https://github.com/xuyang-liu16/VidCom2 (`vidcom2_compression`)

Tokens are compared in the half of the channels that varies least over the video, scaled to length one. With u a token and c a centre (the mean over the
video, or over the frame) likeness is the sum of ``exp(-|u - c|^2 / 2a)`` over a = 1/8, 1/4, 1/2, 1, 2. A frame's share of the budget is
``1 + p - mean(p)``, p the softmax over frames of the negated mean likeness to the video at a temperature of 0.01.

Scores are ranks, so that the K best are: the first token of every frame, then as many of each as its share says (`vlprune.kernels.allotment`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.allotment import NEAREST, rank_in_groups, served_from
from vlprune.kernels.frame_cells import FrameCells, video_cells
from vlprune.protocols import ScoreInputs, Tap

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
SEPARATORS = ("keep", "drop")


@dataclass(frozen=True)
class FrameOutliers:
    """Ranks of video tokens by how far out they are, with a share for every frame.

    Attributes:
        temperature: of the softmax over frames; the lower, the more goes to unusual frames.
        separators: ``"keep"``: newlines come right after each frame's first token; ``"drop"``: they come last.
    """

    temperature: float = 0.01
    separators: str = "keep"

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)) or not self.temperature > 0:
            raise OptionError(f"temperature={self.temperature!r}: of the softmax over frames, above 0; 0.01 as published")
        if self.separators not in SEPARATORS:
            raise OptionError(f"separators={self.separators!r}: 'keep' (as published) or 'drop'")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens and their grid."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) distinct whole numbers, the negated order of choice."""
        cells = video_cells(inputs)
        video, frame = likenesses(inputs.tokens, cells)
        weights = frame_shares(video, cells.there, self.temperature) * cells.there.sum(dim=2)
        num_frames, num_cells = cells.there.shape[1:]
        frames = (cells.place // num_cells).clamp(max=num_frames)                        # separators are a group of their own
        rank = rank_in_groups(frames, -cells.to_tokens(video + frame, 0.0))
        keys = served_from(rank, F.pad(weights, (0, 1)).gather(1, frames), NEAREST).masked_fill(rank == 0, -2.0)
        keys = keys.masked_fill(frames == num_frames, -1.0 if self.separators == "keep" else torch.inf)
        ranks = keys.argsort(dim=1, stable=True).argsort(dim=1).float()
        return -ranks + 0.0 * inputs.tokens.float().sum(dim=-1)                          # NaN stays NaN, so that the engine sees it


def likenesses(tokens: Tensor, cells: FrameCells) -> tuple[Tensor, Tensor]:
    """(B, T, M) likeness of every token (B, N, D) to the centre of its video, and to the centre of its frame."""
    there = cells.there[..., None]
    values = cells.of_tokens(tokens.float())                                             # (B, T, M, D), zeros where there is no token
    number = there.sum(dim=(1, 2), keepdim=True)
    spread = ((values - values.sum(dim=(1, 2), keepdim=True) / number.clamp(min=1)).square() * there).sum(dim=(1, 2))
    channels = spread.topk(max(1, spread.shape[1] // 2), dim=1, largest=False).indices.sort(dim=1).values
    values = F.normalize(values.gather(3, channels[:, None, None].expand(*values.shape[:3], -1)), dim=-1)
    of_video = values.sum(dim=(1, 2), keepdim=True) / number.clamp(min=1)
    of_frame = values.sum(dim=2, keepdim=True) / there.sum(dim=2, keepdim=True).clamp(min=1)
    return _gaussians(values, of_video), _gaussians(values, of_frame)


def frame_shares(video: Tensor, there: Tensor, temperature: float) -> Tensor:
    """(B, T) share of the budget relative to an even one, from likeness to the video (B, T, M)."""
    mean = (video * there).sum(dim=2) / there.sum(dim=2).clamp(min=1)
    unusual = (-mean / temperature).softmax(dim=1)
    return 1 + unusual - unusual.mean(dim=1, keepdim=True)


def _gaussians(values: Tensor, centre: Tensor) -> Tensor:
    distance = (values - centre).square().sum(dim=-1)
    return torch.stack([torch.exp(-distance / (2 * width)) for width in WIDTHS]).sum(dim=0)
