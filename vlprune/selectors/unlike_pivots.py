"""UnlikePivots: a few pivots stay, and for each the tokens least like it; what is left duplicates them (DART).

Image pivots are the best-scored tokens, text pivots the best of the text tokens behind the item. Pivots are visited in turn, and each takes the tokens of
lowest cosine with it among those that are left. Of K tokens, what the image pivots leave is shared out evenly; where that does not come out even, the
pivots visited first take one more. Where fewer text tokens follow than there are text pivots, image pivots stand in for the missing ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.similarity import cosine
from vlprune.protocols import ScoreInputs, Selection, Tap, gather_tokens

ROLES = ("pivot", "unlike image", "unlike text")


@dataclass(frozen=True)
class UnlikePivots:
    """Keep pivots and what is unlike them.

    Attributes:
        features: signal (B, N, C) that is compared, and ``text_features`` (B, T, C) with it.
        text_scores: signal (B, T) that chooses the text pivots.
        image_pivots: number of pivots among the visual tokens, from 1.
        text_pivots: number of pivots among the text tokens, from 0.
        order: in which pivots are visited, numbers of the list (image pivots, text pivots), each best first; ``None``: as listed.
    """

    features: Tap
    text_features: Tap
    text_scores: Tap
    image_pivots: int = 4
    text_pivots: int = 4
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise OptionError(f"{name}={value!r}: a whole number from {lowest} is needed")
        total = self.image_pivots + self.text_pivots
        if self.order is not None and (not isinstance(self.order, (tuple, list)) or sorted(self.order) != list(range(total))):
            raise OptionError(f"order={self.order!r}: every number from 0 to {total - 1} once, image pivots first, each kind best first")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """What is compared, and what chooses text pivots."""
        return (self.features, self.text_features, self.text_scores) if self.text_pivots else (self.features,)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        pivots = scores.argsort(dim=-1, descending=True, stable=True)[:, : min(self.image_pivots, inputs.num_keep)]
        role = torch.full_like(scores, -1, dtype=torch.int64).scatter(1, pivots, 0)
        total = self.image_pivots + self.text_pivots
        each, more = divmod(inputs.num_keep - pivots.shape[1], total)
        if each or more:
            features = inputs.signal(self.features)
            likeness = cosine(self._directions(pivots, inputs), features)                          # (B, pivots, N)
            for turn, pivot in enumerate(range(total) if self.order is None else self.order):
                order = likeness[:, pivot].masked_fill(role >= 0, torch.inf).argsort(dim=-1, stable=True)
                role = role.scatter(1, order[:, : each + (turn < more)], 1 if pivot < self.image_pivots else 2)
        keep = (role >= 0).int().argsort(dim=-1, descending=True, stable=True)[:, : inputs.num_keep]
        return Selection(keep, role.gather(1, keep), ROLES)

    def _directions(self, pivots: Tensor, inputs: ScoreInputs) -> Tensor:
        """(B, pivots, C) features of all pivots."""
        image = gather_tokens(inputs.signal(self.features), pivots)
        if not self.text_pivots:
            return image
        norms, features = inputs.signal(self.text_scores), inputs.signal(self.text_features)
        if inputs.text_valid is not None:
            norms = norms.masked_fill(~inputs.text_valid.bool(), -torch.inf)
        short = max(0, self.text_pivots - norms.shape[1])
        norms, features = F.pad(norms, (0, short), value=-torch.inf), F.pad(features, (0, 0, 0, short))
        best = norms.argsort(dim=-1, descending=True, stable=True)[:, : self.text_pivots]
        stand_in = image[:, torch.arange(self.text_pivots, device=image.device) % image.shape[1]]
        found = norms.gather(1, best) > -torch.inf
        return torch.cat((image, torch.where(found[..., None], gather_tokens(features, best), stand_in)), dim=1)
