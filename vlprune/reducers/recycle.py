"""Recycle: the kept tokens stay as they are, but for a few, which become the mean of everything that leaves near them.

Every few kept tokens, in raster order, one becomes a summary of the tokens that leave and are most like it. The number of tokens
and their places do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import Reduced, ScoreInputs, Selection, gather_tokens
from vlprune.reducers.merge import grouped_mean


@dataclass(frozen=True)
class Recycle:
    """Turn every ``every``-th kept token, in raster order, into a summary of what leaves around it.

    Attributes:
        every: 1 makes all of them summaries (then it is `Merge`), 4 every fourth.
    """

    every: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise OptionError(f"every={self.every!r}: a whole number from 1 is needed")

    @property
    def exact(self) -> bool:
        """Some kept tokens change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens and (B, K) sizes."""
        tokens, keep = inputs.tokens.float(), selection.keep_indices
        count = keep.shape[1]
        takes = torch.arange(count, device=keep.device) % self.every == self.every - 1 if count >= self.every else None
        if takes is None:
            takes = torch.arange(count, device=keep.device) == count - 1
        unit = F.normalize(tokens.detach(), dim=-1)
        likeness = (unit @ gather_tokens(unit, keep).mT).masked_fill(~takes, -torch.inf)
        owner = likeness.argmax(dim=-1)
        owner = owner.scatter(1, keep, torch.arange(count, device=keep.device).expand_as(keep))
        return grouped_mean(tokens, owner, count, inputs.sizes)
