"""CellsOrSingle: the most important tokens stay single, the others leave one token for every cell of the picture that they lie in.

Reference: VFlowOpt, arXiv:2508.05211. Official code: https://github.com/sihany077/VFlowOpt
`vlprune.kernels.cells` says why exactly K tokens can always be met. Where the cells alone are more than K, the K cells with the most
important tokens stay. Cells never reach over tiles or frames, and separators lie in none: one that is not single is dropped.

Difference: the released program reserves room for int(N / side^2) cells and then keeps as many as there are, so its count depends on the
picture; ``count="cells"`` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.cells import best_of_cells, cell_numbers, num_single, rank
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.topk import TopK

ROLES = ("single", "cell")
COUNTS = ("exact", "cells")


@dataclass(frozen=True)
class CellsOrSingle:
    """Keep single tokens and one token a cell; its role tells `vlprune.reducers.cell_mean.CellMean` which is which.

    Attributes:
        side: rows and columns of a cell, in tokens; may be fractional.
        count: ``"exact"``: K tokens stay. ``"cells"``: as many cells as there are, as released (read back to the host; items of one call
            that keep different numbers are an error).
    """

    side: float
    count: str = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, (int, float)) or not 1 <= self.side < float("inf"):
            raise OptionError(f"cell={self.side!r}: rows and columns of a cell in tokens, a number from 1")
        if self.count not in COUNTS:
            raise OptionError(f"count={self.count!r}: 'exact' (K tokens stay) or 'cells' (as many cells as there are, as released)")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but scores and grid."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each; a video gets plain top K."""
        if inputs.modality == "video":
            return TopK(stable=True)(scores, inputs)
        if inputs.grid is None:
            raise OptionError(
                "recycling puts tokens into cells and needs the row and column of every token, but this model gives no grid for this picture. "
                "With recycle=False the others are dropped."
            )
        ranks, cells, num_tokens = rank(scores), cell_numbers(inputs.grid, self.side), scores.shape[1]
        if self.count == "exact":
            single = num_single(ranks, cells, inputs.num_keep)
        else:
            single = ranks.new_full(ranks.shape[:1], max(inputs.num_keep - int(num_tokens / self.side**2), 0))
        best = best_of_cells(ranks, cells, single)
        kept = best | (ranks < single[:, None])
        num_keep = inputs.num_keep if self.count == "exact" else _same_count(kept)
        keep = (kept * num_tokens - ranks).topk(num_keep, dim=-1).indices.sort(dim=-1).values
        return Selection(keep, best.long().gather(1, keep), ROLES)


def _same_count(kept: Tensor) -> int:
    counts = kept.sum(dim=-1).tolist()
    if len(set(counts)) > 1:
        raise OptionError(f"count='cells': the images of this call keep {counts} tokens; give one image a call, or leave `count` out")
    return int(counts[0])
