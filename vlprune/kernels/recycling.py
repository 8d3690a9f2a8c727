"""SparseVLM's recycling: of the tokens that leave, the best-scored part is clustered, and one token a cluster stays.

Counts follow from N and K alone: of ``d = N - n`` tokens that leave, ``r = int(0.3 * d) + 1`` are clustered into ``c = int(r / 10) + 1``. Here K = n + c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlprune.protocols import gather_tokens


class Recycling(NamedTuple):
    """What stays as it is, what is clustered, and around what.

    Attributes:
        kept: (B, n) tokens that stay, ascending.
        pool: (B, r) tokens that are clustered, best score first.
        centres: (B, c) places in ``pool`` of the clusters' centres, the most central first.
        owner: (B, r) cluster of each.
    """

    kept: Tensor
    pool: Tensor
    centres: Tensor
    owner: Tensor


def num_clustered(num_dropped: int) -> tuple[int, int]:
    """How many of the tokens that leave are clustered, and into how many clusters."""
    pool = int(0.3 * num_dropped) + 1
    return pool, int(pool / 10) + 1


def num_unchanged(num_tokens: int, num_keep: int) -> int:
    """How many tokens stay as they are when they and the clusters' tokens are ``num_keep``; the most, and at least one."""
    for count in range(num_keep, 1, -1):
        if count < num_tokens and count + num_clustered(num_tokens - count)[1] <= num_keep:
            return count
    return 1


def recycle(scores: Tensor, tokens: Tensor, num_keep: int) -> Recycling:
    """Plan for scores (B, N) and tokens (B, N, D), of which ``num_keep`` < N are left; with one left, nothing is clustered."""
    total = scores.shape[1]
    kept = num_unchanged(total, num_keep)
    clusters = num_keep - kept
    order = scores.argsort(dim=1, descending=True, stable=True)
    pool = order[:, kept : kept + num_clustered(total - kept)[0]]
    if clusters == 0:
        return Recycling(order[:, :kept].sort(dim=1).values, pool[:, :0], pool[:, :0], pool[:, :0])
    centres, owner = density_peaks(gather_tokens(tokens.detach().float(), pool), clusters, clusters)
    return Recycling(order[:, :kept].sort(dim=1).values, pool, centres, owner)


def cluster_places(plan: Recycling) -> Tensor:
    """(B, K) the token each of the K stands at: kept ones, then the clusters' centres."""
    return torch.cat([plan.kept, torch.gather(plan.pool, 1, plan.centres)], dim=1)


def density_peaks(features: Tensor, num_clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN of features (B, N, D): centres (B, c), the most central first, and the cluster (B, N) of each.

    Density is ``exp(-mean squared distance)`` to the nearest ``neighbours``, itself among them; a centre is dense and far from anything denser (the
    densest: as far as anything is from anything). Equal densities: the earlier token is the denser.
    """
    # pair by pair, not through a matrix product: an item's choice must not depend on its batch
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[-1] ** 0.5
    nearest = distance.topk(neighbours, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    denser = rank[:, None, :] < rank[:, :, None]
    farthest = distance.flatten(1).amax(dim=1)[:, None, None]
    separation = torch.where(denser, distance, farthest).amin(dim=-1)
    centres = (density * separation).argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    owner = torch.gather(distance, 1, centres[..., None].expand(-1, -1, features.shape[1])).argmin(dim=1)
    return centres, owner.scatter(1, centres, torch.arange(num_clusters, device=features.device).expand_as(centres))
