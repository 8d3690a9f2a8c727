"""TCA by loops over the tokens of one item: the best stay, the next ones are clustered around four of them, the last ones become one sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage, four clusters and more than five tokens kept."""
    attention = next(values[0] for tap, values in inputs.signals.items() if tap.kind in ("cls_row", "column_mean"))
    heads = [values[0] for tap, values in inputs.signals.items() if tap.kind == "cls_row_heads"]
    score = attention if not heads else mean_rank(heads[0])
    order = sorted(range(attention.shape[0]), key=lambda token: -float(score[token]))
    top = inputs.num_keep - 5
    leaving = order[top:]
    pool = leaving[: 2 * ((len(leaving) + 1) // 3)]
    rest = leaving[len(pool) :]
    points = inputs.tokens[0]

    def apart(one: int, other: int) -> float:
        return float((points[one] - points[other]).norm())

    centres = [pool[0]]
    while len(centres) < 4:
        centres.append(max((token for token in pool if token not in centres), key=lambda token: min(apart(token, centre) for centre in centres)))
    new = {}
    for centre in centres:
        mine = [token for token in pool if token == centre or (token not in centres and min(centres, key=lambda c, t=token: apart(t, c)) == centre)]
        weights = [1.0 if token == centre else 1 / apart(token, centre) for token in mine]
        total = torch.zeros_like(points[0])
        for token, weight in zip(mine, weights, strict=True):
            total = total + weight / sum(weights) * points[token]
        new[centre] = total
    fused = torch.zeros_like(points[0])
    for token in rest:
        fused = fused + attention[token] * points[token]
    new[rest[0]] = fused
    kept = sorted([*order[:top], *new])
    return kept, torch.stack([new.get(token, points[token]) for token in kept])


def mean_rank(values: Tensor) -> Tensor:
    """How many tokens each beats, mean over the heads."""
    ranks = torch.zeros(values.shape)
    for head in range(values.shape[1]):
        for place, token in enumerate(sorted(range(values.shape[0]), key=lambda token, head=head: float(values[token, head]))):
            ranks[token, head] = place
    return ranks.mean(dim=1)
