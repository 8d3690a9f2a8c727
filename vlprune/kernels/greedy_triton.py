"""The whole greedy loop in one launch on CUDA: one program an item, its state in registers, a row of the Gram matrix read a step.

Triton comes with PyTorch for CUDA and is imported on first use. Without it, or for a rule that has no kernel here, the loop runs in torch, which gives
the same picks: both add up the same numbers in the same order, but for the determinantal rule, whose sums may round otherwise.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from vlprune.kernels.greedy_rules import SPENT, Determinantal, GreedyRule, MaxMin, MaxSum, Problem, Weighted

#: Numbers of the rules in `vlprune.kernels.greedy_loop`.
NUMBERS: dict[type, int] = {MaxSum: 0, MaxMin: 1, Weighted: 2, Determinantal: 3}


@functools.cache
def kernel() -> Any:
    """The compiled loop, or ``None`` where Triton is not installed."""
    try:
        return importlib.import_module("vlprune.kernels.greedy_loop").greedy_kernel
    except ImportError:
        return None


def usable(rule: GreedyRule) -> bool:
    """Whether this rule has a kernel here."""
    return NUMBERS.get(type(rule)) is not None and kernel() is not None


def greedy_loop(gram: Tensor, problem: Problem, num_keep: int, rule: GreedyRule, first: Tensor) -> Tensor:
    """Picks (B, K) in their order, from cosines (B, N, N) and the first pick (B,). Nothing is read back to the host."""
    items, count = gram.shape[:2]
    device = gram.device
    number = NUMBERS[type(rule)]
    picks = torch.empty(items, num_keep, dtype=torch.int64, device=device)
    factor = torch.empty((items, num_keep, count) if isinstance(rule, Determinantal) else (1,), device=device)
    grouped = problem.groups is not None and problem.quota is not None
    groups, quota = (x.to(torch.int32).contiguous() if x is not None and grouped else picks for x in (problem.groups, problem.quota))
    block = max(16, 1 << (count - 1).bit_length())
    arguments = (gram.contiguous(), problem.own.contiguous(), problem.weights.contiguous(), groups, quota, first.contiguous(), factor, picks)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel()[(items,)](*arguments, count, num_keep, SPENT, RULE=number, GROUPED=grouped, BLOCK=block, num_warps=min(16, max(4, block // 256)))
    return picks
