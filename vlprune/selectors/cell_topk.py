"""CellTopK: tokens stay by squares of the picture, the squares with the highest mean score first.

Reference: "Attentive Mask CLIP" (A-CLIP), arXiv:2212.08653. Official code: https://github.com/microsoft/A-CLIP
It scales the 14 x 14 map of attention to 7 x 7 (bilinear, which is the mean over 2 x 2) and keeps whole cells.

Difference: exactly K tokens stay. Where K is no whole number of cells, the best tokens of the next cell fill it up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.cells import cell_numbers, rank
from vlprune.protocols import ScoreInputs, Selection, Tap


@dataclass(frozen=True)
class CellTopK:
    """Keep the K first tokens in the order of their cells' mean score, then of their own."""

    side: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 1:
            raise OptionError(f"side={self.side!r}: rows and columns of a cell in patches, an int from 1")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The grid only."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K)."""
        if inputs.grid is None:
            raise OptionError("keeping whole cells needs the row and column of every token, but this model gives no grid. Use a method without cells.")
        items, count = scores.shape
        cells = cell_numbers(inputs.grid, self.side)
        cells = torch.where(cells < 0, count, cells)                                     # separators come last
        sums = scores.new_zeros(items, count + 1).scatter_add(1, cells, scores)
        sizes = scores.new_zeros(items, count + 1).scatter_add(1, cells, torch.ones_like(scores))
        means = (sums / sizes).masked_fill(sizes == 0, -torch.inf)
        means[:, count] = -torch.inf
        by_cell = torch.gather(rank(means), 1, cells)                                    # (B, N) rank of each token's cell
        by_score = scores.argsort(dim=-1, descending=True, stable=True)
        order = torch.gather(by_score, 1, torch.gather(by_cell, 1, by_score).argsort(dim=-1, stable=True))
        return Selection(order[:, : inputs.num_keep].sort(dim=-1).values)
