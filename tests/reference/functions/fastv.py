"""FastV: attention row of the last prompt token in, kept visual tokens out."""

from __future__ import annotations

import torch
from golden_case import Case, differ, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.fastv import fastv


def check(case: Case) -> str:
    """Head mean, image columns, then the method's own stage; indices and positions, which are kept."""
    start, num_tokens = case.hyper["image_start"], case.hyper["n_image"]
    row = case["in.attention_last_row"].mean(dim=1)  # (1, L)
    method = fastv(ModelFacts(decoder_layers=32), 1 - case.hyper["fastv_r"])
    kept = run_stage(method.stages[0], (row[:, start : start + num_tokens],)).keep_indices[0]
    positions = torch.cat((torch.arange(start), kept + start, torch.arange(start + num_tokens, row.shape[1])))
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or differ(
        "out.keep_positions", positions, case["out.keep_positions"]
    )
