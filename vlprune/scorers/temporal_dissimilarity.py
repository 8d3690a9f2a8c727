"""TemporalDissimilarity: how much a video token differs from the same place one frame earlier.

Reference: Efficient Video Sampling, arXiv:2510.14624 (NVIDIA).
Official code: https://github.com/vllm-project/vllm (`vllm/multimodal/evs.py`, `compute_retention_mask`)

The score is 1 - cosine, between 0 and 2; every token of the first frame gets 255, above all others. Differences: the
place of a token is read from its grid instead of being implied by a (T, H, W) reshape, so separators and reordered
tokens are no obstacle. Two cases the original does not have: separator tokens count as one cell of their frame, and a
token whose cell is missing in the frame before (it is new there) gets 2, the most that a cosine can give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap, gather_tokens

FIRST_FRAME = 255.0
NEW_CELL = 2.0


@dataclass(frozen=True)
class TemporalDissimilarity:
    """Score video tokens by their cosine distance to the same cell of the previous frame."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens and their grid."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        if inputs.grid is None:
            raise OptionError(
                "this method compares each frame with the one before and needs the frame, row and column of every "
                "token, but this model gives no grid. Choose another method (see `vlprune methods`)."
            )
        previous, found = same_cell_before(inputs.grid)
        tokens = inputs.tokens.float()
        change = 1 - F.cosine_similarity(tokens, gather_tokens(tokens, previous), dim=-1)
        change = torch.where(found, change, NEW_CELL)
        return torch.where(inputs.grid[..., 0] <= 0, FIRST_FRAME, change)


def same_cell_before(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B, N) of the token at the same row and column one frame earlier, and whether there is one."""
    frame, row, column = grid.unbind(dim=-1)
    row, column = row + 1, column + 1  # separators (-1, -1) become cell 0
    columns = column.amax(dim=-1, keepdim=True) + 1
    cells = (row.amax(dim=-1, keepdim=True) + 1) * columns  # (B, 1) cells of a frame
    places = frame * cells + row * columns + column
    ordered, order = places.sort(dim=-1, stable=True)
    wanted = places - cells
    at = torch.searchsorted(ordered, wanted).clamp(max=places.shape[-1] - 1)
    return order.gather(-1, at), ordered.gather(-1, at) == wanted
