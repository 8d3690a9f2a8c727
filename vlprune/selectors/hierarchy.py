"""Hierarchy: anchors of a middle layer, the tokens around them, and registers of a deep layer.

Reference: HiPrune, arXiv:2508.00553. Official code: https://github.com/Danielement321/HiPrune
Scores handed in are the deep layer's; the object layer's are tapped. With K tokens and object share alpha:

1. anchors: the ``round(K * alpha / 5)`` best tokens of the object layer;
2. buffers: the tokens left, right, above and below each anchor (i - 1, i + 1, i - c, i + c with c tokens a row);
3. registers: the best remaining tokens of the deep layer, until K are there.

At the border the two descriptions differ. ``"code"``: a neighbour outside the image is clamped to the first or last
token, as in the released program. ``"paper"``: it is left out. In both, i - 1 and i + 1 wrap to the neighbouring row,
since neither looks at row ends. "Image" means the anchor's own tile or frame, which a neighbour never leaves.

Differences: the released program keeps chosen tokens out of the registers by subtracting 1 from their deep score,
which fails for scores above 1 (its Qwen version sums over queries): an anchor is then picked again and fewer than K
tokens stay. Here they are masked, so exactly K stay; ``subtract`` brings the released behaviour back to compare with
it. Where anchors and buffers alone exceed K (the released program stops with an error), anchors come first, then
buffers by deep score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Selection, Tap

ROLES = ("anchor", "buffer", "register")
VARIANTS = ("code", "paper")


@dataclass(frozen=True)
class Hierarchy:
    """Keep anchors, buffers and registers.

    Attributes:
        object_tap: score of the object layer, e.g. attention received there.
        alpha: share of K meant for anchors with their four buffers each, in [0, 1].
        variant: what happens at the border, ``"code"`` or ``"paper"``.
        subtract: reproduce the released exclusion: what is taken off the deep score of chosen tokens, in units of the
            scores given. Fewer than K may stay, and the count is read back to the host. ``None``: mask them, keep K.
    """

    object_tap: Tap
    alpha: float = 0.1
    variant: str = "code"
    subtract: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha!r}: the share of anchors and buffers must lie in [0, 1]")
        if self.variant not in VARIANTS:
            raise OptionError(
                f"variant={self.variant!r}: 'code' (border neighbours clamped, as released) or 'paper' (left out)"
            )

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The object layer's score."""
        return (self.object_tap,)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        num_tokens = scores.shape[1]
        num_anchors = round(inputs.num_keep * self.alpha / 5)  # Python's rounding, as released
        tier = torch.zeros_like(scores, dtype=torch.int64)  # 0 register, 1 buffer, 2 anchor
        if num_anchors:
            anchors = inputs.signal(self.object_tap).topk(num_anchors, dim=-1).indices
            tier = neighbours(inputs, anchors, clamp=self.variant == "code").long()
            tier = tier.scatter(1, anchors, 2)
        if self.subtract is not None:
            return _as_released(scores, tier, inputs.num_keep, self.subtract)
        keep = (tier * num_tokens - _rank(scores)).topk(inputs.num_keep, dim=-1).indices.sort(dim=-1).values
        return Selection(keep, 2 - tier.gather(1, keep), ROLES)


def neighbours(inputs: ScoreInputs, anchors: Tensor, clamp: bool) -> Tensor:
    """Whether each token (B, N) lies left, right, above or below one of ``anchors`` (B, A) in its tile or frame.

    Without a grid the item is one row of tokens in its original order.
    """
    if inputs.grid is None:
        places = torch.arange(inputs.tokens.shape[1], device=anchors.device).expand(inputs.tokens.shape[:2])
        column = places if inputs.original is None else inputs.original
        frame = row = torch.zeros_like(column)
    else:
        frame, row, column = inputs.grid.unbind(dim=-1)
    real = row >= 0  # separators neighbour nothing
    same = (frame[:, None] == frame.gather(1, anchors)[..., None]) & real[:, None] & real.gather(1, anchors)[..., None]
    width = column[:, None].where(same, -1).amax(dim=-1, keepdim=True) + 1  # (B, A, 1) of the anchor's tile
    last = (row[:, None].where(same, -1).amax(dim=-1, keepdim=True) + 1) * width - 1
    place = row[:, None] * width + column[:, None]  # (B, A, N) counted in that tile
    at = place.gather(2, anchors[..., None])  # (B, A, 1)
    near = torch.zeros_like(same)
    for step in (-1, 1) if inputs.grid is None else (-1, 1, -width, width):
        target = torch.minimum((at + step).clamp(min=0), last) if clamp else at + step
        near |= place == target
    return (near & same).any(dim=1)


def _rank(scores: Tensor) -> Tensor:
    """0 for the best token of each item, N - 1 for the worst; of equals, the earlier is better."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _as_released(scores: Tensor, tier: Tensor, num_keep: int, subtract: float) -> Selection:
    chosen = tier > 0
    open_places = num_keep - chosen.sum(dim=-1, keepdim=True)
    kept = chosen | (_rank(scores - subtract * chosen) < open_places)
    counts = kept.sum(dim=-1).tolist()
    if len(set(counts)) > 1:
        raise OptionError(
            f"subtract: the images of this call keep {counts} tokens; give one image a call, or leave `subtract` out"
        )
    keep = kept.nonzero()[:, 1].reshape(len(counts), -1)
    return Selection(keep, 2 - tier.gather(1, keep), ROLES)
