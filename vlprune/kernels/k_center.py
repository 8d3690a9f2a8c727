"""k-centre clustering by greedy farthest points (Euclidean), and weighted means of the clusters: the merging step of TCA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlprune.protocols import gather_tokens


class Clusters(NamedTuple):
    """(B, C) the centres, in the order found; (B, P) the cluster of each point; (B, P) its weight there, summing to one over a cluster."""

    centres: Tensor
    owner: Tensor
    weights: Tensor


@torch.no_grad()
def k_center(points: Tensor, num_centres: int, first: Tensor) -> Clusters:
    """Cluster points (B, P, D) around ``num_centres`` of them, ``first`` (B,) and then always the one farthest from all centres.

    A point belongs to the nearest centre, the earlier one on a tie, and weighs one by its distance to it; the centre itself weighs 1 before the weights
    are normalised, so a point closer than 1 outweighs it. Of a point at the same place as a centre, the raw weight is 1, too.
    """
    points = points.float()
    chosen, rows = first, []
    picks = []
    nearest = torch.full_like(points[..., 0], torch.inf)
    for _ in range(num_centres):
        picks.append(chosen)
        distance = torch.linalg.vector_norm(points - gather_tokens(points, chosen[:, None]), dim=-1)             # (B, P)
        rows.append(distance)
        nearest = torch.minimum(nearest, distance).scatter(1, chosen[:, None], -1.0)     # a centre is not chosen again
        chosen = nearest.argmax(dim=1)
    centres = torch.stack(picks, dim=1)
    between = torch.stack(rows, dim=1).scatter(2, centres[..., None], -1.0)              # (B, C, P); a centre is its own
    distance, owner = between.min(dim=1)
    raw = torch.where(distance > 0, 1 / distance, 1.0)
    total = raw.new_zeros(raw.shape[0], num_centres).scatter_add(1, owner, raw)
    return Clusters(centres, owner, raw / total.gather(1, owner))


def cluster_sums(points: Tensor, clusters: Clusters) -> Tensor:
    """(B, C, D) weighted means of the clusters, in the order of their centres."""
    num_centres = clusters.centres.shape[1]
    places = clusters.owner[..., None].expand_as(points)
    return points.new_zeros(points.shape[0], num_centres, points.shape[2]).scatter_add(1, places, points * clusters.weights[..., None])
