"""DPC-kNN clustering, many small sets at once: dense tokens far from denser ones are centres, every other token belongs to the nearest centre.

Reference: "Study on density peaks clustering based on k-nearest neighbors and principal component analysis" (Knowledge-Based Systems, 2016), as in PruneVid
(arXiv:2412.16117), FastVID (arXiv:2503.11187) and HoliTom (arXiv:2505.21334).

Distances are Euclidean, divided by the root of the width. Density is ``exp(-mean squared distance)`` to the nearest k, the token itself among them; a token
that is denser than all others is as far as the farthest pair of its group. Equal densities: the earlier token counts as denser, where the programs add noise.

A row holds M tokens of one or more groups that do not see each other; -1 is in no group. Distances are made row by row in chunks, so memory stays bounded
however many frames there are, and item by item, so an item's bits do not depend on what else is in the call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22     # entries of distance matrices held at once


def peak_scores(features: Tensor, groups: Tensor, neighbours: int, limits: Tensor | None = None) -> Tensor:
    """Density times separation.

    Args:
        features: (B, R, M, D).
        groups: (B, R, M) group within the row, -1 for none.
        neighbours: k; groups of fewer tokens use all of them.
        limits: (B, R, M) a smaller k for the token's group, at least 1.

    Returns:
        (B, R, M) float32; -inf outside groups.
    """
    scores = torch.full(groups.shape, -torch.inf, device=features.device)
    for item, rows, distance, group in _distances(features, groups):
        scores[item, rows] = _peaks(distance, group, neighbours, None if limits is None else limits[item, rows])
    return scores


def nearest_centre(features: Tensor, groups: Tensor, centres: Tensor) -> Tensor:
    """(B, R, M) place within the row of the centre nearest to each token, of its own group; centres have themselves; -1 where there is none.

    ``centres`` (B, R, M) bool; other arguments as in `peak_scores`.
    """
    owners = torch.full_like(groups, -1)
    here = torch.arange(groups.shape[2], device=groups.device)
    for item, rows, distance, _ in _distances(features, groups):
        chosen = centres[item, rows]
        near, owner = distance.masked_fill(~chosen[:, None, :], torch.inf).min(dim=-1)
        owner = torch.where(chosen, here, owner)
        owners[item, rows] = torch.where((chosen & (groups[item, rows] >= 0)) | near.isfinite(), owner, -1)
    return owners


def _distances(features: Tensor, groups: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Chunks of rows of one item: their pairwise distances (r, M, M), infinite between groups, and their groups (r, M)."""
    items, num_rows, count, width = features.shape
    step = max(1, CHUNK // (count * count))
    itself = torch.eye(count, dtype=torch.bool, device=features.device)
    for item in range(items):
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            group = groups[item, rows]
            inside = group >= 0
            with torch.autocast(features.device.type, enabled=False):
                points = features[item, rows].float() * inside[..., None]
                points = points - points.sum(dim=1, keepdim=True) / inside.sum(dim=1)[:, None, None].clamp(min=1)     # small numbers cancel less
                square = points.square().sum(dim=-1)
                distance = (square[:, :, None] + square[:, None] - 2 * points @ points.mT).clamp(min=0).sqrt() / width**0.5
            distance = distance.masked_fill(itself, 0.0)
            apart = (group[:, :, None] != group[:, None]) | ~inside[:, None]
            yield item, rows, distance.masked_fill(apart, torch.inf), group


def _peaks(distance: Tensor, group: Tensor, neighbours: int, limits: Tensor | None) -> Tensor:
    """(r, M) density times separation."""
    near = distance.topk(min(neighbours, distance.shape[-1]), dim=-1, largest=False).values
    counted = near.isfinite()
    if limits is not None:
        counted = counted & (torch.arange(near.shape[-1], device=near.device) < limits[..., None])
    density = (-near.square().masked_fill(~counted, 0.0).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)).exp()
    density = density.masked_fill(group < 0, -1.0)
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    denser = rank[:, None, :] < rank[:, :, None]
    separation = distance.masked_fill(~denser, torch.inf).amin(dim=-1)
    finite = distance.masked_fill(distance.isinf(), 0.0).amax(dim=-1)                                  # (r, M) farthest of each token's own
    same = group[:, :, None] == group[:, None]
    farthest = torch.where(same, finite[:, None], 0.0).amax(dim=-1)
    separation = torch.where(separation.isinf(), farthest, separation)
    return (density * separation).masked_fill(group < 0, -torch.inf)
