"""CellMean: a token kept for its cell becomes the importance-weighted mean of the cell's tokens that do not stay by themselves.

Reference: VFlowOpt, arXiv:2508.05211. Official code: https://github.com/sihany077/VFlowOpt
The kept token is the cell's most important one, so the mean stands where the cell mattered most. Weights are taken relative to it, which
changes nothing where importance is positive; negative importance (a negative entropy weight) counts as 0, and a cell without any positive
importance gets the plain mean, where the released program divides by a sum that may vanish.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.cells import cell_numbers
from vlprune.protocols import Reduced, ScoreInputs, Scorer, Selection, Tap, gather_tokens


@dataclass(frozen=True)
class CellMean:
    """Recycle what leaves into the tokens that `vlprune.selectors.cells.CellsOrSingle` kept for their cells.

    Attributes:
        importance: the stage's scorer, for the weights.
        side: of a cell, as the selector's.
    """

    importance: Scorer
    side: float

    @property
    def needs(self) -> tuple[Tap, ...]:
        """What the importance needs."""
        return self.importance.needs

    @property
    def exact(self) -> bool:
        """Tokens kept for their cells change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens, (B, K) how many tokens each stands for; nothing changes where no cells were made (videos)."""
        if selection.roles is None or inputs.grid is None:
            return Reduced()
        keep, is_cell = selection.keep_indices, selection.roles == 1
        owner = owners(cell_numbers(inputs.grid, self.side), keep, is_cell)              # (B, N) slot of each, K for none
        tokens, num_keep = inputs.tokens.float(), keep.shape[1]
        with torch.no_grad():
            sizes = torch.ones_like(owner, dtype=tokens.dtype) if inputs.sizes is None else inputs.sizes.to(tokens.dtype)
            weights = relative(self.importance(inputs).float(), owner, keep)
            total = weights.new_zeros(weights.shape[0], num_keep + 1).scatter_add(1, owner, weights)
            stands_for = torch.zeros_like(total).scatter_add(1, owner, sizes)[:, :num_keep]
            weights = weights / total.clamp(min=1.0).gather(1, owner)
        summed = tokens.new_zeros(*total.shape, tokens.shape[-1]).scatter_add(1, owner[..., None].expand_as(tokens), tokens * weights[..., None])
        merged = torch.where(is_cell[..., None], summed[:, :num_keep], gather_tokens(tokens, keep))
        return Reduced(merged, torch.where(is_cell, stands_for, sizes.gather(1, keep)))


def owners(cells: Tensor, keep: Tensor, is_cell: Tensor) -> Tensor:
    """(B, N) which of the K kept tokens each token goes into: its cell's, itself where it is single, and K where its cell has none."""
    items, count = cells.shape
    num_keep = keep.shape[1]
    slots = torch.arange(num_keep, device=keep.device).expand_as(keep)
    table = cells.new_full((items, count + 1), num_keep)
    table = table.scatter(1, torch.where(is_cell, cells.gather(1, keep), count), slots)  # by cell; the last entry collects singles
    table[:, count] = num_keep
    owner = table.gather(1, torch.where(cells < 0, count, cells))
    return owner.scatter(1, keep, slots)


def relative(importance: Tensor, owner: Tensor, keep: Tensor) -> Tensor:
    """(B, N) weights in [0, 1] relative to the kept token's; 0 for what is dropped, 1 for all of a cell without positive importance."""
    top = torch.nn.functional.pad(importance.gather(1, keep), (0, 1)).gather(1, owner)
    weights = torch.where(top > 0, importance.clamp(min=0) / top, 1.0).nan_to_num(1.0).clamp(max=1.0)     # separators may be infinitely important
    return weights.masked_fill(owner == keep.shape[1], 0.0)
