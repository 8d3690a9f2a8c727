"""Greedy selection: K times the token with the largest gain, where a pick changes the gains of the others.

One loop serves every greedy method; what differs is the rule that turns the similarity to the newest pick into new
gains. Each step compares the newest pick with all tokens, one (1, D) x (D, N) product: time is linear in K, memory is
the normalised copy of the tokens plus a few (B, N) rows, and no N x N matrix ever exists. Nothing is read back to the
host, so the loop can be captured in a CUDA graph. The product has the pick on the left because that form gives an
item the same bits whatever the batch size (seen on CPU; `bmm` with the pick on the right does not).

A rule keeps its state in a tuple of tensors, the gains first. That leaves room for the others in ``specs/``: a
weighted rule holds ``(weights * nearest, nearest)``, a determinantal one ``(residual, basis)`` with a basis of (B, K,
N).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

#: What a rule carries from step to step; ``state[0]`` is the gain (B, N) of picking each token next.
State = tuple[Tensor, ...]


class GreedyRule(Protocol):
    """How the gains follow from what was picked. Holds no data of its own: everything lives in the state."""

    def start(self, unit: Tensor) -> State:
        """State before any pick, for unit-length tokens (B, N, D)."""
        ...

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor) -> State:
        """State after ``chosen`` (B,) was picked; ``similarity`` (B, N) is its cosine with every token."""
        ...


@dataclass(frozen=True)
class MaxSum:
    """Max-sum diversification: pick the token with the smallest cumulative similarity to the chosen ones."""

    def start(self, unit: Tensor) -> State:
        """Nothing is chosen, nothing is similar."""
        return (unit.new_zeros(unit.shape[:2]),)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor) -> State:
        """Subtract the new similarities."""
        return (state[0] - similarity,)


@dataclass(frozen=True)
class MaxMin:
    """Max-min diversification (k-center): pick the token farthest, in cosine distance, from the nearest chosen one."""

    def start(self, unit: Tensor) -> State:
        """Infinitely far from nothing."""
        return (unit.new_full(unit.shape[:2], torch.inf),)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor) -> State:
        """Distance to the nearest chosen token."""
        return (torch.minimum(state[0], 1 - similarity),)


#: Rules that need nothing but the tokens, by the name a user writes.
RULES: dict[str, GreedyRule] = {"maxsum": MaxSum(), "maxmin": MaxMin()}


def greedy_select(features: Tensor, num_keep: int, rule: GreedyRule, first: Tensor | None = None) -> Tensor:
    """Pick ``num_keep`` different tokens of each item.

    Args:
        features: (B, N, D), any float type; normalised and compared in float32, also under autocast.
        num_keep: K, at most N.
        rule: what a pick does to the gains.
        first: (B,) the first pick; ``None``: the largest gain at the start. The earlier token wins a tie, here and
            later.

    Returns:
        (B, K) int64 in the order of picking.
    """
    if num_keep == 0:
        return torch.zeros(features.shape[0], 0, dtype=torch.int64, device=features.device)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        taken = torch.zeros(unit.shape[:2], dtype=torch.bool, device=unit.device)
        state = rule.start(unit)
        chosen = state[0].argmax(dim=-1) if first is None else first
        picks = [chosen]
        for _ in range(num_keep - 1):
            newest = unit.gather(1, chosen[:, None, None].expand(-1, 1, unit.shape[-1]))  # (B, 1, D)
            state = rule.absorb(state, torch.bmm(newest, unit.mT).squeeze(1), chosen)
            taken.scatter_(1, chosen[:, None], True)
            chosen = state[0].masked_fill(taken, -torch.inf).argmax(dim=-1)
            picks.append(chosen)
    return torch.stack(picks, dim=1)
