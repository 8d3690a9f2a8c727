"""HoloV: projected features and CLS attention in; the program's own sequence with its zero padding, and ours with exactly K, out."""

from __future__ import annotations

import torch
from golden_case import Case, differ, run_stage
from torch import Tensor

from vlprune.kernels.strips import strip_starts
from vlprune.method import ModelFacts
from vlprune.methods.holov import holov
from vlprune.selectors.strips import Strips, quotas, within_strip


def check(case: Case) -> str:
    """The order of the program from our parts; then the stage, which keeps the same tokens and fills up where the program pads."""
    features, attention, want = case["in.features"], case["in.attention"], case["out.order_indices"]
    num_keep = want.shape[1]
    (stage,) = holov(ModelFacts(vision_layers=24, feature_layer=22, has_cls=True), num_keep, strips=case.hyper["num_patches"]).stages
    assert isinstance(stage.selector, Strips)
    start, size = strip_starts(torch.zeros_like(attention, dtype=torch.int64), case.hyper["num_patches"])
    shares = stage.selector.shares(features, attention, torch.ones_like(attention, dtype=torch.bool), start, size)
    rank, quota = within_strip(attention, start), quotas(shares, num_keep, start).gather(1, start)
    kept = run_stage(stage, (attention,), tokens=features).keep_indices
    for item in range(want.shape[0]):
        got = _as_released(rank[item], quota[item], start[item], size[item], num_keep)
        there = want[item][want[item] >= 0]
        problem = differ(f"out.order_indices of item {item}", got, want[item])
        if problem or kept[item].numel() != num_keep or not torch.isin(there, kept[item]).all():
            return problem or f"item {item} keeps {kept[item].tolist()}, expected {there.numel()} tokens of the program among {num_keep}"
    return ""


def _as_released(rank: Tensor, quota: Tensor, start: Tensor, size: Tensor, num_keep: int) -> Tensor:
    """(K,) token numbers strip by strip, the most attended first, strips that are kept whole in reading order; -1 for padding."""
    whole = quota >= size
    place = torch.arange(rank.numel())
    key = start * rank.numel() + torch.where(whole, place - start, rank)
    order = key.argsort()
    order = order[(rank < quota)[order]]
    return torch.cat((order, order.new_full((num_keep - order.numel(),), -1)))
