"""Stage 1 of VFlowOpt, one item, with dictionaries: try every number of single tokens until the count is right."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def reference(stage: Any, inputs: Any, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and the tokens after the stage."""
    assert number == 0
    [importance] = inputs.signals[stage.needs[0]].tolist()
    side, [places] = stage.selector.side, inputs.grid.tolist()
    count = len(importance)
    best_first = sorted(range(count), key=lambda token: (-importance[token], token))

    def cells_of(rest: list[int]) -> dict[tuple[int, ...], list[int]]:
        cells = defaultdict(list)
        for token in rest:                                               # most important first
            frame, row, column = places[token]
            cells[frame, math.floor(row / side), math.floor(column / side)].append(token)
        return cells

    singles = 0
    while singles < count and singles + 1 + len(cells_of(best_first[singles + 1 :])) <= inputs.num_keep:
        singles += 1
    groups = {members[0]: members for members in cells_of(best_first[singles:]).values()}
    leaders = sorted(groups, key=lambda token: (-importance[token], token))[: inputs.num_keep - singles]
    kept = sorted(best_first[:singles] + leaders)
    tokens = []
    for token in kept:
        members = groups.get(token, [token])
        total = sum(importance[member] for member in members)
        tokens.append(sum((importance[member] / total) * inputs.tokens[0, member].double() for member in members))
    return kept, torch.stack(tokens)
