"""FastVID: video tokens in a prompt, attention and features of frames in; the segments and the merged prompt out."""

from __future__ import annotations

import torch
from golden_case import Case, differ, grid_of

from vlprune.kernels.frame_cells import video_cells
from vlprune.kernels.windows import extents
from vlprune.method import ModelFacts
from vlprune.methods.fastvid import fastvid
from vlprune.protocols import ScoreInputs, Tap
from vlprune.selectors.anchors import Anchors

TOLERANCE = 1e-5
FACTS = ModelFacts(decoder_layers=28, vision_layers=27, feature_layer=26, has_cls=True)


def check(case: Case) -> str:
    """The method's stage, with the frames' features as a signal that is the same for all tokens of a frame."""
    hyper = case.hyper
    frames, each, start = hyper["num_frames"], hyper["tokens_per_frame"], hyper["video_start"]
    states, want = case["in.hidden_states"], case["out.keep_indices"]
    video = slice(start, start + frames * each)
    options = {"segments": hyper["DySeg_c"], "threshold": hyper["DySeg_tau"], "context": hyper["STPrune_d"], "every": hyper["DTM_p"]}
    stage = fastvid(FACTS, want.numel(), **options, beta=hyper["DTM_beta"], frames="states").stages[0]
    inputs = ScoreInputs(
        states[:, video],
        want.numel(),
        grid_of(frames, 1, each),
        modality="video",
        signals={
            Tap("cls_row", 26): case["in.frame_attention"].reshape(1, -1),
            Tap("vision_states", 26): case["in.frame_global_features"].repeat_interleave(each, dim=0)[None],
        },
    )
    selection = stage.selector(stage.scorer(inputs), inputs)
    merged = stage.reducer(inputs, selection).tokens
    assert merged is not None
    assert isinstance(stage.selector, Anchors)
    starts = stage.selector.starts(inputs, video_cells(inputs))
    first, last = extents(starts)
    kept = selection.keep_indices[0]
    before, after = torch.arange(start), torch.arange(video.stop, states.shape[1])
    sequence = torch.cat([states[:, :start], merged, states[:, video.stop :]], dim=1)
    error = float((sequence - case["out.hidden_states"]).abs().max()) if sequence.shape == case["out.hidden_states"].shape else float("nan")
    return (
        differ("out.segment_sizes", (last - first + 1)[starts], case["out.segment_sizes"])
        or differ("out.keep_indices", kept, want)
        or differ("out.keep_positions", torch.cat([before, kept + start, after]), case["out.keep_positions"])
        or (f"out.hidden_states differ by {error:.1e}" if not error <= TOLERANCE else "")
    )
