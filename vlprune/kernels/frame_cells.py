"""The tokens of a video by frame and cell: a table of static shape, whatever is missing, and wherever separators stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs


class FrameCells(NamedTuple):
    """Where every token stands.

    Attributes:
        token: (B, T, M) which token stands at cell m of frame t; 0 where none does.
        there: (B, T, M) bool: whether one does.
        place: (B, N) t * M + m of every token, T * M for separators.
    """

    token: Tensor
    there: Tensor
    place: Tensor

    def of_tokens(self, values: Tensor) -> Tensor:
        """(B, T, M, ...) the values (B, N, ...) of the tokens in the table; zeros where there is none."""
        rows = torch.arange(values.shape[0], device=values.device)[:, None, None]
        found: Tensor = values[rows, self.token]
        there = self.there.reshape(*self.there.shape, *(1,) * (values.dim() - 2))
        return torch.where(there, found, torch.zeros((), dtype=values.dtype, device=values.device))

    def to_tokens(self, values: Tensor, separator: int | float | bool) -> Tensor:
        """(B, N) the entries of ``values`` (B, T, M) at every token's place; ``separator`` for separators."""
        flat = values.flatten(1)
        return torch.cat([flat, flat.new_full((flat.shape[0], 1), separator)], dim=1).gather(1, self.place)


def frame_cells(grid: Tensor, num_frames: int, num_cells: int) -> FrameCells:
    """Make the table from a ``grid`` (B, N, 3) of frame, row, column; ``num_cells`` is at least the number of rows times columns of a frame."""
    frame, row, column = grid.unbind(dim=-1)
    cell = row * (column.amax(dim=1, keepdim=True) + 1) + column
    place = torch.where(row < 0, num_frames * num_cells, frame * num_cells + cell)
    numbers = torch.arange(1, grid.shape[1] + 1, device=grid.device).expand_as(place)
    table = torch.zeros(grid.shape[0], num_frames * num_cells + 1, dtype=torch.int64, device=grid.device).scatter(1, place, numbers)
    table = table[:, :-1].reshape(-1, num_frames, num_cells)
    return FrameCells((table - 1).clamp(min=0), table > 0, place)


def video_cells(inputs: ScoreInputs) -> FrameCells:
    """The table of B videos."""
    frames, cells = frames_and_cells(inputs)
    assert inputs.grid is not None
    return frame_cells(inputs.grid, frames, cells)


def frames_and_cells(inputs: ScoreInputs) -> tuple[int, int]:
    """Frames of a video and cells of a frame, at most; they are read from the grid only where nobody on the host knows them."""
    if inputs.grid is None:
        raise OptionError(
            "this method works on the frames of a video and needs the frame, row and column of every token, but this model gives no grid. "
            "Choose another method (see `vlprune methods`)."
        )
    frames = int(inputs.grid[..., 0].max()) + 1 if inputs.num_frames is None else inputs.num_frames
    return frames, -(-max(inputs.num_original, inputs.tokens.shape[1]) // frames)
