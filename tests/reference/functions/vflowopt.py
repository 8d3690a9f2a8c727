"""VFlowOpt: attention and pixels in, importance out; importance and features in, kept and recycled tokens out."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ, grid_of
from torch.nn import functional as F

from vlprune.method import ModelFacts
from vlprune.methods.vflowopt import vflowopt
from vlprune.protocols import ScoreInputs
from vlprune.scorers.grey_entropy import PIXELS

FACTS = ModelFacts(decoder_layers=28, vision_layers=26, feature_layer=25)


def check(case: Case) -> str:
    """Which half of the program the case is of."""
    return recycling(case) if "in.features" in case else importance(case)


def importance(case: Case) -> str:
    """The map, and top K of it by a later stage (stage 1 would recycle)."""
    t, alpha, topk = case.hyper["t"], case.hyper["alpha"], case.hyper["topk"]
    attention = case["in.attention"].mean(dim=1)  # (B, N, N)
    received = attention.mean(dim=1)
    asked = received > t * received.mean(dim=1, keepdim=True)
    signal = (attention * asked[..., None]).sum(dim=1) / asked.sum(dim=1, keepdim=True)
    stage = vflowopt(FACTS, (topk, topk, topk), t=t, alpha=alpha, pixel_range=(0.0, 1.0)).stages[1]
    side = case.hyper["patch"]
    inputs = ScoreInputs(
        tokens=signal[..., None],
        num_keep=topk,
        num_original=signal.shape[1],
        signals={stage.scorer.needs[0]: signal, PIXELS: F.unfold(case["in.pixels"], side, stride=side).mT},
    )
    scores = stage.scorer(inputs)
    entropy = stage.scorer.entropy(inputs)
    return (
        differ("out.num_important", asked.sum(dim=1), case["out.num_important"])
        or apart("out.entropy", entropy, case["out.entropy"], 1e-5)
        or (not torch.allclose(scores, case["out.importance"], rtol=1e-5, atol=1e-8) and "out.importance differs")
        or differ("out.keep_indices", stage.selector(scores, inputs).keep_indices, case["out.keep_indices"])
    )


def recycling(case: Case) -> str:
    """As released with ``count="cells"``; and exactly K of ours, which are the same tokens where the counts agree."""
    rows, width = case.hyper["mosaic_h"], case.hyper["local_w"]
    mosaic = grid_of(1, rows, width) + torch.tensor([1, 0, 0])
    mosaic[:, width - 1 :: width, 1:] = -1  # newlines
    grid = torch.cat([grid_of(1, 27, 27), mosaic], dim=1)
    features, scores = case["in.features"][None], case["in.importance"][None]
    released = case["out.keep_indices"].numel()
    for count, num_keep in (("cells", features.shape[1] - case.hyper["reduce_tokens"]), ("exact", released)):
        stage = vflowopt(FACTS, 0.25, cell=case.hyper["a"], count=count, keep_newlines=True).stages[0]
        inputs = ScoreInputs(
            tokens=features, num_keep=num_keep, grid=grid, num_original=features.shape[1], signals={stage.needs[0]: scores}
        )
        selection = stage.selector(stage.scorer(inputs), inputs)
        tokens = stage.reducer(inputs, selection).tokens
        mask = case["out.keep_mask"].new_zeros(features.shape[1]).scatter(0, selection.keep_indices[0], 1)
        problem = (
            differ(f"out.keep_indices (count={count})", selection.keep_indices[0], case["out.keep_indices"])
            or differ(f"out.keep_mask (count={count})", mask, case["out.keep_mask"])
            or differ("out.importance", scores[0, selection.keep_indices[0]], case["out.importance"])
            or (not torch.allclose(tokens[0], case["out.tokens"], rtol=1e-4, atol=1e-5) and f"out.tokens differ (count={count})")
        )
        if problem:
            return problem
    return ""
