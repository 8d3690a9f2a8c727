"""ToMe by loops over the tokens of one item: every other token looks for the likest one between, the likest pairs are merged, and again if need be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def pairs_by_place(keys: list[Tensor], number: int, first: int) -> list[tuple[int, int]]:
    """(source, target) of the ``number`` likest pairs."""
    sources, targets = range(first, len(keys), 2), range(1 - first, len(keys), 2)
    return likest(keys, sources, targets, number)


def likest(keys: list[Tensor], sources: Any, targets: Any, number: int) -> list[tuple[int, int]]:
    """Each source's likest target, and of these pairs the likest ones."""
    found = []
    for source in sources:
        best = max(targets, key=lambda target, source=source: float(torch.cosine_similarity(keys[source], keys[target], dim=0)))
        found.append((float(torch.cosine_similarity(keys[source], keys[best], dim=0)), source, best))
    found.sort(key=lambda entry: -entry[0])
    return [(source, target) for _, source, target in found[:number]]


def merged(inputs: ScoreInputs, find: Any) -> tuple[list[int], Tensor]:
    """Merge round by round; ``find(keys, names, number) -> pairs`` of places in the current list, whose first tokens are ``names``."""
    (tap,) = [tap for tap in inputs.signals if tap.kind == "vision_keys"]
    sizes = [1.0] * inputs.tokens.shape[1] if inputs.sizes is None else inputs.sizes[0].tolist()
    names, keys = list(range(inputs.tokens.shape[1])), list(inputs.signals[tap][0])
    members = {name: [name] for name in names}
    while len(names) > inputs.num_keep:
        number = min(len(names) - inputs.num_keep, len(names) // 2)
        gone = []
        for source, target in find(keys, names, number):
            members[names[target]] += members.pop(names[source])
            gone.append(source)
        names = [name for place, name in enumerate(names) if place not in gone]
        keys = [mean(inputs.signals[tap][0], members[name], sizes) for name in names]
    return names, torch.stack([mean(inputs.tokens[0], members[name], sizes) for name in names])


def mean(values: Tensor, who: list[int], sizes: list[float]) -> Tensor:
    """Size-weighted."""
    total = torch.zeros_like(values[0])
    for member in who:
        total = total + sizes[member] * values[member]
    return total / sum(sizes[member] for member in who)


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage, for a tower with CLS; without one the first token is a source."""
    first = stage.selector.split.first
    return merged(inputs, lambda keys, names, count: pairs_by_place(keys, count, first))
