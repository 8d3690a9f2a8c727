"""Condense: the best tokens stay, the next ones become a few cluster means, the rest becomes one token (TCA).

Of K tokens, one is the sum of the last ones and has the place of the best of them; up to four are means of clusters and have the places of the clusters'
centres. The others are the best ones. The share of tokens that go into the clusters, two in three of those that leave, is the released program's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlprune.kernels.k_center import Clusters, k_center
from vlprune.protocols import ScoreInputs, Selection, Tap, gather_tokens

CLUSTERS = 4
ROLES = ("kept", "cluster", "fused")


class Parts(NamedTuple):
    """(B, P) tokens that are clustered; their clusters; (B, R) tokens that become one; (B, C + 1) which of the K each of the new ones is."""

    pool: Tensor
    clusters: Clusters
    rest: Tensor
    places: Tensor


def counts(num_tokens: int, num_keep: int) -> tuple[int, int, int]:
    """Tokens kept as they are, clustered, and clusters, of N tokens of which K stay."""
    clusters = min(CLUSTERS, max(num_keep - 2, 0))
    kept = num_keep - 1 - clusters
    leaving = num_tokens - kept
    pool = 0 if not clusters else min(max(2 * ((leaving + 1) // 3), clusters), leaving - 1)
    return kept, pool, clusters


@dataclass(frozen=True)
class Condense:
    """Keep, cluster, fuse.

    Attributes:
        seed: of the first centre among the clustered tokens, the same place in every item's ranking; ``None``: the best of them.
    """

    seed: int | None = None

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each, and the parts."""
        kept, size, number = counts(scores.shape[1], inputs.num_keep)
        order = scores.argsort(dim=1, descending=True, stable=True)
        pool, rest = order[:, kept : kept + size], order[:, kept + size :]
        start = 0 if self.seed is None or not size else random.Random(self.seed).randrange(size)
        first = torch.full(scores.shape[:1], start, dtype=torch.int64, device=scores.device)
        clusters = k_center(gather_tokens(inputs.tokens, pool), number, first) if number else Clusters(*(pool[:, :0],) * 3)
        stay = torch.cat([order[:, :kept], pool.gather(1, clusters.centres), rest[:, :1]], dim=1)
        keep, at = stay.sort(dim=1)
        slots = at.argsort(dim=1)                                                        # where each of the K unsorted ones came to stand
        roles = torch.zeros_like(keep).scatter(1, slots[:, kept:], 1).scatter(1, slots[:, -1:], 2)
        return Selection(keep, roles, ROLES, plan=Parts(pool, clusters, rest, slots[:, kept:]))
