"""PruneVid: clusters, contiguous labels, merged tokens in the program's order, and the choice by attention."""

from __future__ import annotations

import torch
from golden_case import Case, differ, grid_of
from torch import Tensor

from vlprune.kernels.density_peaks import peak_scores
from vlprune.kernels.frame_cells import frame_cells
from vlprune.kernels.windows import contiguous_labels, extents, starts_of
from vlprune.method import ModelFacts
from vlprune.methods.prunevid import prunevid
from vlprune.protocols import ScoreInputs
from vlprune.selectors.windows import cluster_labels, window_means

TOLERANCE = 1e-5
FACTS = ModelFacts(decoder_layers=32)


def check(case: Case) -> str:
    """Any of the four kinds."""
    if "in.tokens" in case:
        return differ("out.cluster_index", cluster_labels(case["in.tokens"], case.hyper["cluster_num"], case.hyper["k"]), case["out.cluster_index"])
    if "in.labels" in case:
        return _labels(case)
    return _merge(case) if "in.frames" in case else _attention(case)


def _labels(case: Case) -> str:
    labels = contiguous_labels(case["in.labels"], int(case["in.labels"].max()) + 1)
    lengths = torch.zeros_like(case["out.segment_lengths"])
    for row, starts in enumerate(starts_of(labels)):
        first, last = extents(starts[None])
        found = (last - first + 1)[0, starts]
        lengths[row, : found.numel()] = found
    return differ("out.labels", labels, case["out.labels"]) or differ("out.segment_lengths", lengths, case["out.segment_lengths"])


def _merge(case: Case) -> str:
    hyper, frames = case.hyper, case["in.frames"]
    count, each, _ = frames.shape
    number = case["out.tokens"].shape[1]
    options = {"threshold": hyper["threshold"], "segments": hyper["temporal_segment_ratio"], "cluster_ratio": hyper["cluster_ratio"]}
    stage = prunevid(FACTS, number, **options).stages[0]
    inputs = ScoreInputs(frames.reshape(1, count * each, -1), number, grid_of(count, hyper["side"], hyper["side"]), modality="video")
    selection = stage.selector(stage.scorer(inputs), inputs)
    merged = stage.reducer(inputs, selection).tokens
    assert selection.roles is not None
    assert merged is not None
    kept, role = selection.keep_indices[0], selection.roles[0]
    order, starts = program_order(inputs, kept, role)
    first, last = extents(starts)
    sizes = (last - first + 1)[0, starts[0]]
    window = starts[0].long().cumsum(dim=0)[kept // each] - 1
    still = torch.zeros_like(sizes).scatter_add(0, window[role == 1], torch.ones_like(window[role == 1]))
    moving = torch.zeros_like(sizes).scatter_add(0, window[role == 0], torch.ones_like(window[role == 0]))
    error = float((merged[0, order] - case["out.tokens"][0]).abs().max())
    return (
        differ("out.window_sizes", sizes, case["out.window_sizes"])
        or differ("out.static_sizes", still, case["out.static_sizes"])
        or differ("out.dynamic_sizes", moving, case["out.dynamic_sizes"])
        or (f"out.tokens differ by {error:.1e}" if not error <= TOLERANCE else "")
    )


def program_order(inputs: ScoreInputs, kept: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
    """Window by window the still tokens, then frame by frame the moving ones, each set from the most central on, or in raster order if it is small."""
    assert inputs.grid is not None
    stage = prunevid(FACTS, 1).stages[0]
    frames = int(inputs.grid[..., 0].max()) + 1
    cells = frame_cells(inputs.grid, frames, inputs.tokens.shape[1] // frames)
    features = cells.of_tokens(inputs.tokens)
    starts, still = stage.selector.cutting(features, cells.there)  # type: ignore[attr-defined]
    first = still & starts[..., None]
    features = torch.where(first[..., None], window_means(features, starts), features)
    groups = torch.where(first, 1, torch.where(still, -1, 0))
    peaks = peak_scores(features, groups, 7)[0].flatten()
    window, frame = starts[0].long().cumsum(dim=0), inputs.grid[0, kept, 0]
    sizes = torch.stack([(groups[0] == 0).sum(dim=1), (groups[0] == 1).sum(dim=1)])
    sets = [(int(window[f]), 1 - int(r), int(f), -float(peaks[k]) if int(sizes[r, f]) > 14 else float(k)) for k, r, f in zip(kept, role, frame, strict=True)]
    return torch.tensor(sorted(range(kept.numel()), key=lambda place: sets[place])), starts


def _attention(case: Case) -> str:
    """Frames are as wide as the program's sets are long; still ones stand in a window's first frame."""
    place, role = [], []
    frame = 0
    for still, moving, width in zip(*(case[f"in.{name}_sizes"].tolist() for name in ("static", "dynamic", "window")), strict=True):
        place += [(frame, 0, cell) for cell in range(still)]
        role += [1] * still
        for _ in range(width):
            place += [(frame, 1, cell) for cell in range(moving // width)]
            role += [0] * (moving // width)
            frame += 1
    want = case["out.keep_indices"]
    stage = prunevid(FACTS, want.numel(), merged=len(place)).stages[1]
    scores = case["in.attention"].amax(dim=(1, 2))
    inputs = ScoreInputs(
        scores[..., None], want.numel(), torch.tensor(place)[None], modality="video", signals={stage.needs[0]: scores}, roles=torch.tensor(role)[None]
    )
    kept = stage.selector(stage.scorer(inputs), inputs).keep_indices[0]
    return differ("out.keep_indices", kept, want) or differ("out.order_indices", by_set(kept, inputs, scores[0]), case["out.order_indices"])


def by_set(kept: Tensor, inputs: ScoreInputs, scores: Tensor) -> Tensor:
    """Set by set, the best first."""
    assert inputs.grid is not None
    assert inputs.roles is not None
    key = {int(k): (int(inputs.grid[0, k, 0]), 1 - int(inputs.roles[0, k]), -float(scores[k])) for k in kept}
    return torch.tensor(sorted(key, key=lambda k: key[k]))
