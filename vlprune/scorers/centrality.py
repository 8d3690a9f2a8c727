"""Centrality: how close a token is to the mean of its item, as cosine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class Centrality:
    """Cosine of each token with the mean of the item's unit-length tokens."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        unit = F.normalize(inputs.tokens.float(), dim=-1)
        return F.cosine_similarity(unit, unit.mean(dim=1, keepdim=True), dim=-1)
