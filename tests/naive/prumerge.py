"""PruMerge by loops over the tokens of one item: neighbours of every kept token, and the sum of what leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs

NEIGHBOURS = 32


def signals(inputs: ScoreInputs) -> dict[str, Tensor]:
    """Signals of the item by kind."""
    return {tap.kind: values[0] for tap, values in inputs.signals.items()}


def by_attention(inputs: ScoreInputs) -> list[int]:
    """Token numbers, the most attended first."""
    attention = signals(inputs)["cls_row_wide"]
    return sorted(range(attention.shape[0]), key=lambda token: -float(attention[token]))


def merged(inputs: ScoreInputs, chosen: list[int]) -> tuple[list[int], Tensor]:
    """Tokens after merging, where ``chosen`` are kept and the best of the others has the summary's place."""
    found = signals(inputs)
    attention, keys, features = found["cls_row_wide"], found["vision_keys_all"], found["vision_states"]
    leaving = [token for token in by_attention(inputs) if token not in chosen]
    kept = sorted([*chosen, leaving[0]])
    assert inputs.project is not None
    tokens = []
    for token in kept:
        if token == leaving[0]:
            value = torch.zeros_like(features[0])
            for other in leaving:
                value = value + attention[other] * features[other]
        else:
            others = [other for other in range(attention.shape[0]) if other != token]
            near = sorted(others, key=lambda other, token=token: -float(torch.cosine_similarity(keys[token], keys[other], dim=0)))
            value = features[token].clone()
            for other in near[:NEIGHBOURS]:
                value = value + attention[other] * features[other]
        tokens.append(inputs.project(value[None, None])[0, 0])
    return kept, torch.stack(tokens)


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage."""
    return merged(inputs, by_attention(inputs)[: inputs.num_keep - 1])
