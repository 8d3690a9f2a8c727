"""PiToMe by loops over the tokens of one item: energies, the redundant ones by rank, and pairs among them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.naive.tome import likest, merged
from vlprune.protocols import ScoreInputs


def energies(keys: Tensor, margin: float) -> list[float]:
    """Mean over all tokens of how much each is like them."""
    found = []
    for one in keys:
        total = 0.0
        for other in keys:
            over = float(torch.cosine_similarity(one, other, dim=0)) - margin
            total += over if over > 0 else math.exp(over) - 1
        found.append(total / len(keys))
    return found


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage; ``number`` is its block, the margin falls to 0 over as many as the method has."""
    (tap,) = [tap for tap in inputs.signals if tap.kind == "vision_keys"]
    energy = energies(inputs.signals[tap][0], stage.scorer.margin)
    everybody = stage.selector.split.among == "all"

    def find(keys: list[Tensor], names: list[int], count: int) -> list[tuple[int, int]]:
        order = sorted(range(len(names)), key=lambda place: -energy[names[place]])
        order = order if everybody else order[: 2 * count]
        return likest(keys, order[0::2], order[1::2], count)

    return merged(inputs, find)
