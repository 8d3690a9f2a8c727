"""EVS: video embeddings in, kept tokens out; and the count rule. M-RoPE ids are the adapter's, not looked at here."""

from __future__ import annotations

import torch
from golden_case import Case, differ, grid_of, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.evs import evs


def check(case: Case) -> str:
    """Counts, or scorer and selector at the program's count."""
    if "in.tpf_frames" in case:
        sizes = case["in.tpf_frames"].tolist()
        budgets = [evs(ModelFacts(), 1 - q).stages[0].budget for q in case.hyper["q"]]
        counts = [budget.num_keep(size * frames, frames) for budget, (size, frames) in zip(budgets, sizes, strict=True)]
        return differ("out.count", torch.tensor(counts), case["out.count"])
    merge = case.hyper["spatial_merge_size"]
    frames, height, width = case["in.thw"].tolist()
    grid = grid_of(frames, height // merge, width // merge)
    stage = evs(ModelFacts(), 1 - case.hyper["q"]).stages[0]
    count = stage.budget.num_keep(grid.shape[1], frames)
    kept = run_stage(
        stage, (), tokens=case["in.video_embeds"][None], grid=grid, num_keep=count, modality="video"
    ).keep_indices[0]
    mask = case["out.keep_mask"].new_zeros(grid.shape[1]).scatter(0, kept, 1)
    return (
        differ("out.retained_count", torch.tensor(count), case["out.retained_count"])
        or differ("out.keep_indices", kept, case["out.keep_indices"])
        or differ("out.keep_mask", mask, case["out.keep_mask"])
    )
