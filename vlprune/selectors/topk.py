"""TopK: the highest scores stay, in raster order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.protocols import ScoreInputs, Selection, Tap


@dataclass(frozen=True)
class TopK:
    """Keep the K highest scores. ``stable`` breaks ties for the earlier token (a full sort; costs more than ``topk``)."""

    stable: bool = False

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices, sorted once."""
        if self.stable:
            best = scores.argsort(dim=-1, descending=True, stable=True)[:, : inputs.num_keep]
        else:
            best = scores.topk(inputs.num_keep, dim=-1).indices
        return Selection(best.sort(dim=-1).values)                                   # (B, K), left to right
