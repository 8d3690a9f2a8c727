"""What the video methods' loops share: clustering and sharing out, written from the formulae."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors."""
    return float(torch.dot(a.double(), b.double()) / (a.double().norm() * b.double().norm()))


def centrality(points: Sequence[Tensor], neighbours: int) -> list[float]:
    """Density times distance to the nearest denser point."""
    root = math.sqrt(points[0].numel()) if points else 1.0
    apart = [[float((a.double() - b.double()).norm()) / root for b in points] for a in points]
    density = []
    for row in apart:
        near = sorted(row)[:neighbours]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    result = []
    for at, row in enumerate(apart):
        denser = [b for b in range(len(points)) if density[b] > density[at] or (density[b] == density[at] and b < at)]
        result.append(density[at] * (min(row[b] for b in denser) if denser else max(max(r) for r in apart)))
    return result


def nearest(point: Tensor, centres: Sequence[Tensor]) -> int:
    """The nearest of some points."""
    apart = [float((point.double() - centre.double()).norm()) for centre in centres]
    return apart.index(min(apart))


def share_out(sets: Mapping[object, Sequence[object]], weights: Mapping[object, float], offsets: Mapping[object, float], number: int) -> dict[object, int]:
    """One place after the other to the set that is served from the lowest share; of equals the one whose next member stands first."""
    have = dict.fromkeys(sets, 0)
    for _ in range(number):
        open_sets = [name for name in sets if have[name] < len(sets[name])]
        if not open_sets:
            break
        served = min(open_sets, key=lambda name: ((have[name] + offsets[name]) / weights[name] if weights[name] else math.inf, sets[name][have[name]]))
        have[served] += 1
    return have
