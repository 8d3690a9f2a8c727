"""PruneVid's merging before the LLM, by loops over frames, cells and tokens of one video. Every cell of the grid has a token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.naive._video import centrality, cosine, nearest, share_out
from vlprune.protocols import ScoreInputs

#: of a video: (frame, cell) -> token number
Table = dict[tuple[int, int], int]


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the first stage."""
    tokens = inputs.tokens[0].float()
    table = table_of(inputs)
    cutting = stage.selector.cutting
    windows = windows_of(tokens, table, cutting.share, cutting.neighbours)
    still = {}
    for window in windows:
        for cell in {cell for _, cell in table}:
            pairs = [cosine(tokens[table[a, cell]], tokens[table[b, cell]]) for a in window for b in window if a < b]
            still[window[0], cell] = bool(pairs) and sum(pairs) / len(pairs) > cutting.threshold
    return merge(stage, tokens, table, windows, still, inputs.num_keep)


def table_of(inputs: ScoreInputs) -> Table:
    """Tokens by frame and cell."""
    assert inputs.grid is not None
    columns = int(inputs.grid[0, :, 2].max()) + 1
    return {(f, r * columns + c): k for k, (f, r, c) in enumerate(inputs.grid[0].tolist()) if r >= 0}


def windows_of(tokens: Tensor, table: Table, share: float, neighbours: int) -> list[list[int]]:
    """Frames clustered, labels made contiguous."""
    count = max(frame for frame, _ in table) + 1
    means = [torch.stack([tokens[k] for (f, _), k in table.items() if f == frame]).mean(dim=0) for frame in range(count)]
    central = centrality(means, neighbours)
    centres = sorted(range(count), key=lambda frame: -central[frame])[: max(1, int(count * share))]
    labels = [centres.index(frame) if frame in centres else nearest(means[frame], [means[c] for c in centres]) for frame in range(count)]
    return runs(contiguous(labels))


def runs(labels: list[Any]) -> list[list[int]]:
    """Frames of each run of equal labels."""
    found: list[list[int]] = []
    for frame, label in enumerate(labels):
        if found and labels[frame - 1] == label:
            found[-1].append(frame)
        else:
            found.append([frame])
    return found


def contiguous(labels: list[int]) -> list[int]:
    """A label's longest runs stay; every other frame joins the longer neighbour, from left to right."""
    longest: dict[int, int] = {}
    for run in runs(labels):
        longest[labels[run[0]]] = max(longest.get(labels[run[0]], 0), len(run))
    result: list[int | None] = [None] * len(labels)
    right = {}
    for run in runs(labels):
        if len(run) > 1 and len(run) == longest[labels[run[0]]]:
            for frame in run:
                result[frame], right[frame] = labels[frame], len(run)
    for frame in range(len(labels)):
        if result[frame] is not None:
            continue
        left = 0
        while frame - left - 1 >= 0 and result[frame - left - 1] == result[frame - 1]:
            left += 1
        following = next((f for f in range(frame, len(labels)) if result[f] is not None), None)
        after = right[following] if following is not None else 0
        result[frame] = 0 if not left and not after else result[frame - 1] if left >= after else result[following]  # type: ignore[index]
    return [label for label in result if label is not None]


def merge(
    stage: Any, tokens: Tensor, table: Table, windows: list[list[int]], still: dict[tuple[int, int], bool], number: int, scores: list[float] | None = None
) -> tuple[list[int], Tensor]:
    """Sets, their shares, clusters and means; with ``scores`` moving tokens are not clustered."""
    cells = sorted({cell for _, cell in table})
    sets: dict[Any, list[tuple[int, int]]] = {}
    stands_for: dict[tuple[int, int], list[int]] = {}
    for window in windows:
        for cell in cells:
            if still[window[0], cell]:
                sets.setdefault(("still", window[0]), []).append((window[0], cell))
                stands_for[window[0], cell] = [table[frame, cell] for frame in window]
        for frame in window:
            for cell in cells:
                if not still[window[0], cell]:
                    sets.setdefault(("moving", frame), []).append((frame, cell))
                    stands_for[frame, cell] = [table[frame, cell]]
    selector = stage.selector
    if scores is None:
        large = {name: len(members) > selector.small for name, members in sets.items()}
        usual = {name: math.floor(len(members) * selector.ratio) if large[name] else len(members) for name, members in sets.items()}
        enough = sum(usual.values()) < number
        weights = {name: (float(len(members)) if large[name] else math.inf) if enough else float(usual[name]) for name, members in sets.items()}
        offsets = dict.fromkeys(sets, 1.0)
    else:
        weights = {name: float(len(members)) for name, members in sets.items()}
        offsets = {name: 0.5 if name[0] == "still" else 0.0 for name in sets}
    counts = share_out(sets, weights, offsets, number)
    mean = {place: tokens[members].mean(dim=0) for place, members in stands_for.items()}
    kept: dict[int, Tensor] = {}
    extra = []
    clusters = []
    for name, members in sets.items():
        if name[0] == "moving" and scores is not None:
            best = sorted(members, key=lambda place: -scores[table[place]])[: counts[name]]
            clusters += [(place, [place]) for place in best]
            continue
        limit = selector.neighbours if scores is None else max(1, min(selector.neighbours, counts[name]))
        central = centrality([mean[place] for place in members], limit)
        order = sorted(range(len(members)), key=lambda at: -central[at])
        centres = [members[at] for at in order[: counts[name]]]
        found: dict[tuple[int, int], list[tuple[int, int]]] = {centre: [centre] for centre in centres}
        for place in members:
            if centres and place not in centres:
                found[centres[nearest(mean[place], [mean[c] for c in centres])]].append(place)
        clusters += list(found.items())
        if name[0] == "still":
            extra += [(cosine(tokens[k], mean[place]), k) for place in members for k in stands_for[place][1:]]
    more = [k for _, k in sorted(extra)][: number - len(clusters)]
    for centre, members in clusters:
        own = [k for k in stands_for[centre] if k not in more]
        rest = [k for place in members if place != centre for k in stands_for[place] if k not in more]
        weight = max(stage.reducer.centre, len(own) / (len(own) + len(rest))) if rest else 1.0
        kept[table[centre]] = weight * tokens[own].mean(dim=0) + ((1 - weight) * tokens[rest].mean(dim=0) if rest else 0.0)
    kept.update({k: tokens[k] for k in more})
    return sorted(kept), torch.stack([kept[k] for k in sorted(kept)])
