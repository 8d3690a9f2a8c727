"""SetShares: of every set of tokens the best stay, about the same share of each (PruneVid in the decoder).

A set is what a frame holds of one role; roles are those that the stage before gave (still and moving), without one the sets are the frames. Shares are
rounded down, and the share is the one with which exactly K stay (`vlprune.kernels.allotment`). Separators come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.allotment import allot, rank_in_groups, sizes_of
from vlprune.kernels.frame_cells import frames_and_cells
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import real_tokens


@dataclass(frozen=True)
class SetShares:
    """Keep the best of every frame and role.

    Attributes:
        roles: number of roles that make sets of their own; further ones count as the last.
    """

    roles: int = 2

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K)."""
        frames, _ = frames_and_cells(inputs)
        assert inputs.grid is not None
        role = torch.zeros_like(inputs.grid[..., 0]) if inputs.roles is None else inputs.roles.clamp(max=self.roles - 1)
        sets = torch.where(real_tokens(inputs), inputs.grid[..., 0] * self.roles + role, -1)
        counts = allot(sets, sizes_of(sets, frames * self.roles), inputs.num_keep)
        stays = (sets >= 0) & (rank_in_groups(sets, scores) < counts.gather(1, sets.clamp(min=0)))
        order = torch.where(stays, 0, torch.where(sets >= 0, 1, 2)).argsort(dim=1, stable=True)
        return Selection(order[:, : inputs.num_keep].sort(dim=1).values)
