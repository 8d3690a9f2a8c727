"""FastVID by loops over segments, frames and tokens of one video."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.naive._video import centrality, cosine, share_out
from tests.naive.prunevid import table_of
from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage; frames' features are means of tokens."""
    selector, num_keep, tokens = stage.selector, inputs.num_keep, inputs.tokens[0].float()
    (scores,) = (values[0].tolist() for values in inputs.signals.values())
    table = table_of(inputs)
    count = max(frame for frame, _ in table) + 1
    members = [[k for (f, _), k in sorted(table.items()) if f == frame] for frame in range(count)]
    segments = cut([tokens[group].mean(dim=0) for group in members], selector.cuts, selector.threshold)

    each = round(num_keep / count)
    each = min(each - int(each * selector.context), num_keep // count)
    salient = {k for group in members for k in sorted(group, key=lambda k: -scores[k])[:each]}
    sets, weights = {}, {}
    for segment in segments:
        where = list(range(segment[-1], segment[0] - 1, -selector.every))
        for frame in where:
            sets[frame] = [k for k in members[frame] if k not in salient]
            weights[frame] = len(segment) / len(where)
    counts = share_out(sets, weights, dict.fromkeys(sets, 1.0), num_keep - len(salient))  # type: ignore[arg-type]
    anchors = {}
    for frame, rest in sets.items():
        central = centrality([tokens[k] for k in rest], selector.neighbours)
        anchors[frame] = [rest[at] for at in sorted(range(len(rest)), key=lambda at: -central[at])[: counts[frame]]]
    taken = salient | {k for group in anchors.values() for k in group}
    more = sorted((k for k in range(len(scores)) if k not in taken), key=lambda k: -scores[k])[: num_keep - len(taken)]
    now = {k: tokens[k] for k in [*salient, *more]}
    for segment in segments:
        where = [frame for frame in anchors if frame in segment]
        for frame in where:
            pool = [k for f in ([frame] if len(where) == len(segment) else segment) for k in members[f] if k not in salient and k not in more]
            chose: dict[int, list[int]] = {anchor: [] for anchor in anchors[frame]}
            for k in pool:
                if chose:
                    chose[max(sorted(chose), key=lambda anchor: cosine(tokens[k], tokens[anchor]))].append(k)
            for anchor, group in chose.items():
                weight = max(stage.reducer.beta, 1 / (len(group) + 1))
                now[anchor] = weight * tokens[anchor] + (1 - weight) * tokens[group].mean(dim=0)
    return sorted(now), torch.stack([now[k] for k in sorted(now)])


def cut(features: list[Tensor], cuts: int, threshold: float) -> list[list[int]]:
    """Segments of frames."""
    alike = [cosine(a, b) for a, b in pairwise(features)]
    lowest = sorted(range(len(alike)), key=lambda at: alike[at])[:cuts]
    segments = [[0]]
    for at, value in enumerate(alike):
        if at in lowest or value < threshold:
            segments.append([])
        segments[-1].append(at + 1)
    return segments
