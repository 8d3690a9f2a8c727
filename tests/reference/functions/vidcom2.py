"""VidCom2: features of a video in; likenesses, frames' shares and kept tokens out. With newline columns, they stay as well."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ, grid_of, run_stage
from torch import Tensor

from vlprune.kernels.frame_cells import frame_cells
from vlprune.method import ModelFacts
from vlprune.methods.vidcom2 import vidcom2
from vlprune.scorers.frame_outliers import frame_shares, likenesses


def check(case: Case) -> str:
    """As many tokens as the program keeps."""
    hyper = case.hyper
    frames, each = hyper["num_frames"], hyper["tokens_per_frame"]
    plain = grid_of(frames, 1, each)
    cells = frame_cells(plain, frames, each)
    video, frame = likenesses(case["in.features"][None], cells)
    shares = frame_shares(video, cells.there, 0.01) * hyper["base_scale"]
    problem = (
        apart("out.video_score", video[0], case["out.video_score"], 1e-5)
        or apart("out.frame_score", frame[0], case["out.frame_score"], 1e-5)
        or apart("out.frame_scale", shares[0].clamp(max=1), case["out.frame_scale"], 1e-4)
    )
    if problem:
        return problem
    tokens, grid = case["in.features"][None], plain
    if hyper["model"] == "llava_vid":
        tokens, grid = with_newlines(tokens, frames, round(each**0.5))
    stage = vidcom2(ModelFacts()).stages[0]
    want = case["out.keep_indices"]
    kept = run_stage(stage, (), tokens=tokens, grid=grid, num_keep=want.numel(), modality="video").keep_indices[0]
    return differ("out.keep_indices", kept, want) or differ("out.order_indices", program_order(kept, grid[0]), case["out.order_indices"])


def with_newlines(tokens: Tensor, frames: int, side: int) -> tuple[Tensor, Tensor]:
    """A newline at the end of every row."""
    squares = tokens.reshape(1, frames, side, side, -1)
    squares = torch.cat([squares, torch.zeros_like(squares[:, :, :, :1])], dim=3)
    grid = grid_of(frames, side, side + 1)
    separator = grid[..., 2:] == side
    grid[..., 1:] = grid[..., 1:].masked_fill(separator, -1)
    return squares.flatten(1, 3), grid


def program_order(kept: Tensor, grid: Tensor) -> Tensor:
    """A frame's newlines behind its tokens."""
    return kept[(2 * grid[kept, 0] + (grid[kept, 1] < 0)).argsort(stable=True)]
