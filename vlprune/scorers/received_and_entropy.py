"""ReceivedAndEntropy: attention received from the tokens that matter, plus a share of how varied each patch is.

Reference: VFlowOpt, arXiv:2508.05211. Official code: https://github.com/sihany077/VFlowOpt

Difference: the softmax of entropy runs over the item's tokens, of all tiles together. A later stage sees the survivors only, so there it is scaled
by their share, which leaves the balance of the two parts about where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs, Tap
from vlprune.scorers.grey_entropy import GreyEntropy


@dataclass(frozen=True)
class ReceivedAndEntropy:
    """``received`` plus ``alpha`` times the softmax of entropy; separators of pictures are lowest, or highest.

    Attributes:
        received: tap of the attention.
        alpha: weight of entropy; pixels are looked at only where it is not 0.
        entropy: of the patches.
        keep_separators: whether newline tokens are highest.
    """

    received: Tap
    alpha: float = 0.0
    entropy: GreyEntropy = field(default_factory=GreyEntropy)
    keep_separators: bool = False

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Attention, and pixels where entropy counts."""
        return (self.received, *self.entropy.needs) if self.alpha else (self.received,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        score = inputs.signal(self.received)
        separators = None if inputs.grid is None or inputs.modality == "video" else inputs.grid[..., 1] < 0
        if self.alpha:
            bits = self.entropy(inputs)
            bits = bits if separators is None else bits.masked_fill(separators, -torch.inf)
            there = score.shape[1] / (inputs.num_original or score.shape[1])
            score = score + self.alpha * there * bits.softmax(dim=-1)
        if separators is None:
            return score
        return score.masked_fill(separators, torch.inf if self.keep_separators else -torch.inf)
