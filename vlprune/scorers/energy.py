"""Energy: a token that is like many others is redundant, and worth little.

Reference: "Accelerating Transformers with Spectrum-Preserving Token Merging" (PiToMe), arXiv:2405.16148.
The energy of a token is the mean over all tokens, itself included, of a function of the cosine with them: the cosine less a margin where it is above it,
a bounded penalty below (``"elu"``, for pictures), or a Gaussian of its distance to 1 (``"gaussian"``, for text). The score is minus the energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.kernels.similarity import cosine
from vlprune.protocols import ScoreInputs, Tap

SHAPES = ("elu", "gaussian")


@dataclass(frozen=True)
class Energy:
    """Minus the energy.

    Attributes:
        tap: what likeness is the cosine of.
        margin: cosine above which tokens count as alike.
        shape: ``"elu"`` or ``"gaussian"``, of width one minus the margin.
    """

    tap: Tap
    margin: float
    shape: str = "elu"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise OptionError(f"shape={self.shape!r}: choose one of {', '.join(SHAPES)}")
        if not -1.0 <= self.margin < 1.0:
            raise OptionError(f"margin={self.margin!r}: a cosine, from -1 to below 1")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signal."""
        return (self.tap,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        keys = inputs.signal(self.tap)
        likeness = cosine(keys, keys)
        if self.shape == "elu":
            return -F.elu(likeness - self.margin).mean(dim=-1)
        width = 1 - self.margin
        return -((likeness - 1).div(width).square() / -2).exp().mean(dim=-1) / (width * math.sqrt(2 * math.pi))
