"""DyCoke stage 1: features of a video in, kept tokens out, with the program's slips."""

from __future__ import annotations

import torch
from golden_case import Case, differ, grid_of, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.dycoke import dycoke


def check(case: Case) -> str:
    """As many tokens as the program keeps, which follows from its ratio."""
    hyper = case.hyper
    frames, each = hyper["num_frames"], hyper["tokens_per_frame"]
    thinned = {frame for frame in range(frames) if frame % 2} | {frame + 2 for frame in range(0, frames - 4, 4)}
    gone = {frames - 1} if frames % 2 else set()
    count = each * len(set(range(frames)) - thinned - gone) + int((1 - hyper["merging_ratio"]) * each) * len(thinned - gone)
    if count != case["out.keep_indices"].numel():
        return f"{count} tokens, expected {case['out.keep_indices'].numel()}"
    stage = dycoke(ModelFacts(decoder_layers=28), variant="code").stages[0]
    tokens = case["in.features"][None]
    kept = run_stage(stage, (), tokens=tokens, grid=grid_of(frames, 1, each), num_keep=count, modality="video").keep_indices[0]
    same = torch.equal(tokens[0, kept].sort(dim=0).values, case["out.tokens"].sort(dim=0).values)
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or ("" if same else "out.tokens differ")
