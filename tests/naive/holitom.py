"""HoliTom by loops: every way to cut the video into windows tried, and dropped tokens averaged in one after the other."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from tests.naive._video import cosine
from tests.naive.prunevid import Table, merge, table_of
from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after either stage."""
    (scores,) = (values[0].tolist() for values in inputs.signals.values())
    tokens = inputs.tokens[0].float()
    if number == 1:
        return in_the_decoder(tokens, scores, inputs.num_keep)
    table = table_of(inputs)
    windows, still = stillest(tokens, table, stage.selector.cutting.threshold, stage.selector.cutting.longest)
    return merge(stage, tokens, table, windows, still, inputs.num_keep, scores)


def stillest(tokens: Tensor, table: Table, threshold: float, longest: int) -> tuple[list[list[int]], dict[tuple[int, int], bool]]:
    """The cutting that saves most; of equals the one with the shortest last window, then the shortest before it, and so on."""
    frames, cells = max(frame for frame, _ in table) + 1, sorted({cell for _, cell in table})
    same = {(f, cell): cosine(tokens[table[f, cell]], tokens[table[f + 1, cell]]) > threshold for f in range(frames - 1) for cell in cells}

    def stands(window: list[int], cell: int) -> bool:
        return len(window) > 1 and all(same[f, cell] for f in window[:-1])

    best: tuple[Any, list[list[int]]] | None = None
    for count in range(frames):
        for cuts in combinations(range(1, frames), count):
            edges = [0, *cuts, frames]
            windows = [list(range(a, b)) for a, b in pairwise(edges)]
            if max(map(len, windows)) > longest:
                continue
            saved = sum((len(window) - 1) * sum(stands(window, cell) for cell in cells) for window in windows)
            key = (-saved, [len(window) for window in reversed(windows)])
            if best is None or key < best[0]:
                best = (key, windows)
    assert best is not None
    return best[1], {(window[0], cell): stands(window, cell) for window in best[1] for cell in cells}


def in_the_decoder(tokens: Tensor, scores: list[float], number: int) -> tuple[list[int], Tensor]:
    """The best stay; the others, in raster order, are averaged into the most similar of them."""
    kept = sorted(sorted(range(len(scores)), key=lambda k: -scores[k])[:number])
    now = {k: tokens[k].clone() for k in kept}
    for k in range(len(scores)):
        if k not in now:
            target = max(kept, key=lambda other: cosine(tokens[k], tokens[other]))
            now[target] = (now[target] + tokens[k]) / 2
    return kept, torch.stack([now[k] for k in kept])
