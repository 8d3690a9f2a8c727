"""SparseVLM v1: scores in, kept tokens and cluster means out, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept tokens unchanged, cluster means at their centres (``appended``: behind the kept ones)."""
    (scores,) = inputs.signals.values()
    score, tokens, total, places = scores[0].tolist(), inputs.tokens[0].float(), inputs.tokens.shape[1], inputs.num_keep
    ranked = sorted(range(total), key=lambda token: (-score[token], token))
    unchanged = 1
    for count in range(2, places + 1):                              # the most that leave room for their clusters
        if count < total and count + int((int(0.3 * (total - count)) + 1) / 10) + 1 <= places:
            unchanged = count
    kept = sorted(ranked[:unchanged])
    pool = ranked[unchanged : unchanged + int(0.3 * (total - unchanged)) + 1]
    clusters = places - unchanged
    root = math.sqrt(tokens.shape[1])
    distance = {(a, b): float((tokens[a] - tokens[b]).double().norm()) / root for a in pool for b in pool}
    density = {a: math.exp(-sum(sorted(distance[a, b] ** 2 for b in pool)[:clusters]) / clusters) if clusters else 0.0 for a in pool}
    central = {}
    for place, a in enumerate(pool):
        denser = [b for at, b in enumerate(pool) if density[b] > density[a] or (density[b] == density[a] and at < place)]
        central[a] = density[a] * (min(distance[a, b] for b in denser) if denser else max(distance.values()))
    centres = sorted(pool, key=lambda a: -central[a])[:clusters]
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for a in pool:
        if a not in centres and centres:
            members[min(centres, key=lambda centre: distance[a, centre])].append(a)
    keep = sorted([*kept, *centres])
    means = {centre: tokens[group].mean(dim=0) for centre, group in members.items()}
    order = [*kept, *centres] if stage.reducer.appended else keep
    return keep, torch.stack([means.get(token, tokens[token]) for token in order])
