"""PruMerge+ by loops: a quarter for attention, the others evenly spaced over the rest, then as PruMerge."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.naive.prumerge import by_attention, merged
from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage."""
    wanted = inputs.num_keep - 1
    spread = round(0.75 * wanted)
    best = by_attention(inputs)[: wanted - spread]
    rest = [token for token in range(inputs.tokens.shape[1]) if token not in best]
    evenly = [rest[number * len(rest) // spread] for number in range(spread)]
    return merged(inputs, best + evenly)
