"""GreyEntropy: Shannon entropy of the grey values in each token's patch, in bits.

As VFlowOpt's program (arXiv:2508.05211, https://github.com/sihany077/VFlowOpt) has it: pixels are cut down to whole numbers 0 to 255, grey is
0.3333 (R + G + B) rounded, the histogram has 256 bins, and 1e-10 stands inside the logarithm.

Difference: the program multiplies the tower's *normalised* pixels by 255 and lets negative ones wrap around. Here ``pixel_range`` is what
becomes 0 and 255; the smallest and largest value of the item if it is not given, since a method does not know a model's normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

BINS, GREY, EPS = 256, 0.3333, 1e-10
PIXELS = Tap("pixels", 0)


@dataclass(frozen=True)
class GreyEntropy:
    """Score tokens by how varied the grey values of their patch are.

    Attributes:
        pixel_range: values of the tower's input that stand for black and white; ``None``: the item's own smallest and largest.
    """

    pixel_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        given = self.pixel_range
        if given is not None and not (isinstance(given, (list, tuple)) and len(given) == 2 and given[0] < given[1]):
            raise OptionError(f"pixel_range={given!r}: two numbers, the values of black and of white, such as (-1, 1)")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The picture's patches."""
        return (PIXELS,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) bits."""
        pixels = inputs.signal(PIXELS)                                                   # (B, N, 3 p p)
        if self.pixel_range is not None:
            low, high = (pixels.new_tensor(value) for value in self.pixel_range)
        else:
            real = pixels.new_ones(pixels.shape[:2], dtype=torch.bool) if inputs.grid is None else inputs.grid[..., 1] >= 0
            low = pixels.masked_fill(~real[..., None], torch.inf).amin(dim=(1, 2), keepdim=True)
            high = pixels.masked_fill(~real[..., None], -torch.inf).amax(dim=(1, 2), keepdim=True)
        colours = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).floor()
        grey = (GREY * colours.reshape(*colours.shape[:2], 3, -1).sum(dim=2)).round().long()  # (B, N, p p)
        ones = torch.ones_like(grey, dtype=torch.float32)
        shares = ones.new_zeros(*grey.shape[:2], BINS).scatter_add(-1, grey, ones) / grey.shape[-1]
        return (shares * (shares + EPS).log2()).sum(dim=-1).neg()
