"""AnchorMeans: every token of a segment that does not stay goes into the most similar anchor of each frame with anchors (FastVID).

Reference: FastVID, arXiv:2503.11187. Official code: https://github.com/LunarShen/FastVID

An anchor becomes ``w a + (1 - w) m`` with m the mean of all tokens that chose it, itself among them, and w = max(beta, 1 / (count + 1)). Tokens that are not
salient, anchors too, choose by cosine one anchor in every frame with anchors of their segment; where all frames of a segment have anchors (or it is one
frame), only in their own. Worked on in chunks of tokens, item by item.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import Reduced, ScoreInputs, Selection
from vlprune.selectors.anchors import Pools
from vlprune.selectors.windows import check_between

CHUNK = 1 << 22     # entries of anchors x tokens held at once


@dataclass(frozen=True)
class AnchorMeans:
    """Fold a segment into its anchors.

    Attributes:
        beta: weight of the anchor itself, at least.
    """

    beta: float = 0.6

    def __post_init__(self) -> None:
        check_between("beta", self.beta, 0.0, 1.0, "weight of an anchor in what it becomes")

    @property
    def exact(self) -> bool:
        """Anchors change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens; sizes are not told, since a token may go into several anchors."""
        plan = selection.plan
        if not isinstance(plan, Pools) or selection.roles is None:
            raise OptionError("AnchorMeans goes on with the pools of the selector Anchors; put the two into one stage")
        slots = (selection.roles == 1).int().argsort(dim=1, descending=True, stable=True)[:, : plan.most]   # of anchors, then of others if they are fewer
        merged = []
        for item, (keep, where, roles) in enumerate(zip(selection.keep_indices, slots, selection.roles, strict=True)):
            tokens = inputs.tokens[item].float()
            kept = tokens[keep]
            if plan.most:
                means = self._means(tokens, keep[where], roles[where] == 1, plan, item)
                kept = kept.scatter(0, where[:, None].expand_as(means), means)
            merged.append(kept)
        return Reduced(torch.stack(merged))

    def _means(self, tokens: Tensor, anchors: Tensor, real: Tensor, plan: Pools, item: int) -> Tensor:
        """(A, D) what the anchors (A,) of one item become; where not ``real`` they stay."""
        own, pool, frame = tokens[anchors], plan.pool[item], plan.frame[item, anchors]
        total, count = torch.zeros_like(own), own.new_zeros(own.shape[0], 1)
        unit = F.normalize(own.detach(), dim=-1)
        step = max(1, CHUNK // anchors.shape[0])
        with torch.autocast(tokens.device.type, enabled=False):
            for start in range(0, tokens.shape[0], step):
                part = slice(start, start + step)
                chosen = _chosen(unit, tokens[part].detach(), real[:, None] & (pool[anchors][:, None] == pool[part]), frame, plan.frames)
                total = total + chosen @ tokens[part]
                count = count + chosen.sum(dim=1, keepdim=True)
        weight = (1 / (count + 1)).clamp(min=self.beta)
        return torch.where(real[:, None], weight * own + (1 - weight) * total / count.clamp(min=1), own)


def _chosen(unit: Tensor, tokens: Tensor, allowed: Tensor, frame: Tensor, frames: int) -> Tensor:
    """(A, n) one where a token's most similar anchor of some frame is that one; of equals the first. ``unit`` (A, D) anchors, ``frame`` (A,) theirs."""
    likeness = (unit @ F.normalize(tokens, dim=-1).mT).masked_fill(~allowed, -torch.inf)
    number, count = likeness.shape
    groups = frame.clamp(min=0)[:, None].expand_as(likeness)
    best = likeness.new_full((frames, count), -torch.inf).scatter_reduce(0, groups, likeness, "amax")
    equal = allowed & (likeness == best.gather(0, groups))
    numbers = torch.arange(number, device=frame.device)[:, None]
    first = torch.full((frames, count), number, device=frame.device).scatter_reduce(0, groups, torch.where(equal, numbers, number), "amin")
    return (equal & (numbers == first.gather(0, groups))).to(likeness.dtype)
