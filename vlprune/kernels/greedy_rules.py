"""Rules of greedy selection: how the gain of picking a token next follows from what was picked.

A rule keeps its state in a tuple of tensors, the gains (B, N) first, and gets the cosines of the newest pick with all tokens. Written for torch here;
`vlprune.kernels.greedy_triton` repeats them for one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: What a rule carries from step to step; ``state[0]`` is the gain (B, N) of picking each token next.
State = tuple[Tensor, ...]
#: Share of a token's own size below which what is left of it outside the span of the chosen ones is rounding.
SPENT = 1e-6
LINE = 16  # floats of a cache line


class Problem(NamedTuple):
    """What a loop needs beside the cosines, for B items, as the arguments of `vlprune.kernels.greedy.greedy_select`."""

    own: Tensor
    weights: Tensor
    groups: Tensor | None
    quota: Tensor | None

    def part(self, items: slice) -> Problem:
        """Some of the items."""
        groups, quota = (x if x is None else x[items] for x in self[2:])
        return Problem(self.own[items], self.weights[items], groups, quota)


class GreedyRule(Protocol):
    """How the gains follow from what was picked. Holds no data of its own: everything lives in the state."""

    @property
    def unrelated(self) -> float:
        """A similarity that leaves the gain of a token as it is."""
        ...

    def start(self, own: Tensor, weights: Tensor, num_keep: int) -> State:
        """State before any pick; ``own`` (B, N) is each token's cosine with itself, 0 for a zero vector and else 1, ``weights`` (B, N) its worth."""
        ...

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor, step: int) -> State:
        """State after ``chosen`` (B,), pick number ``step`` from 0, whose cosines with every token are ``similarity`` (B, N)."""
        ...


@dataclass(frozen=True)
class MaxSum:
    """Max-sum diversification: pick the token with the smallest cumulative similarity to the chosen ones."""

    unrelated: float = 0.0

    def start(self, own: Tensor, weights: Tensor, num_keep: int) -> State:
        """Nothing is chosen, nothing is similar."""
        return (torch.zeros_like(own),)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor, step: int) -> State:
        """Subtract the new similarities."""
        return (state[0] - similarity,)


@dataclass(frozen=True)
class MaxMin:
    """Max-min diversification (k-center): pick the token farthest, in cosine distance, from the nearest chosen one."""

    unrelated: float = -torch.inf

    def start(self, own: Tensor, weights: Tensor, num_keep: int) -> State:
        """Infinitely far from nothing."""
        return (torch.full_like(own, torch.inf),)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor, step: int) -> State:
        """Distance to the nearest chosen token."""
        return (torch.minimum(state[0], 1 - similarity),)


@dataclass(frozen=True)
class Weighted:
    """ZOO-Prune: weight times the cosine distance to the nearest chosen token; the largest weight first."""

    unrelated: float = -torch.inf

    def start(self, own: Tensor, weights: Tensor, num_keep: int) -> State:
        """The weight alone."""
        return (weights, torch.full_like(own, torch.inf), weights)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor, step: int) -> State:
        """The nearest distance, times the weight; a token that nothing related was chosen for keeps its weight alone."""
        nearest = torch.minimum(state[1], 1 - similarity)
        return (state[2] * nearest.masked_fill(nearest == torch.inf, 1.0), nearest, state[2])


@dataclass(frozen=True)
class Determinantal:
    """CDPruner: the most likely set of a determinantal point process, with kernel ``w_i w_j cos(i, j)``, approached greedily.

    A gain is what is left of a token outside the span of the chosen ones (incremental Cholesky). The step with t chosen costs t N on top of the
    similarities, and the factor takes (B, K, N) floats. Once the chosen ones span the space, every determinant is 0: the largest weight comes next.
    """

    unrelated: float = 0.0

    def start(self, own: Tensor, weights: Tensor, num_keep: int) -> State:
        """The diagonal of the kernel; rows of the factor start on cache lines, so that an item's rounding does not depend on its place."""
        diagonal = weights.square() * own
        items, count = own.shape
        factor = own.new_empty(items, num_keep, count + -count % LINE)
        return (_left(diagonal, diagonal), diagonal, diagonal, weights, factor)

    def absorb(self, state: State, similarity: Tensor, chosen: Tensor, step: int) -> State:
        """One more row of the factor, and what is left after it."""
        _, left, diagonal, weights, factor = state
        at = chosen[:, None]
        row = weights * weights.gather(1, at) * similarity
        if step:
            done = factor[:, :step, : row.shape[1]]
            at_chosen = done.gather(2, at[:, None].expand(-1, step, 1)).mT                       # (B, 1, step)
            row = row - torch.cat([one @ rows for one, rows in zip(at_chosen, done, strict=True)])
        size, own = left.gather(1, at), diagonal.gather(1, at)
        row = torch.where(size > SPENT * own, row / size.clamp(min=torch.finfo(row.dtype).tiny).sqrt(), 0)
        factor[:, step, : row.shape[1]] = row
        left = left - row.square()
        return (_left(left, diagonal), left, diagonal, weights, factor)


def _left(left: Tensor, diagonal: Tensor) -> Tensor:
    """Gains: what is left, or below all of these, in the order of the diagonal, where that is rounding."""
    return torch.where(left > SPENT * diagonal, left, -1 / diagonal.clamp(min=1e-30))


#: Rules that need nothing but the tokens, by the name a user writes.
RULES: dict[str, GreedyRule] = {"maxsum": MaxSum(), "maxmin": MaxMin()}
