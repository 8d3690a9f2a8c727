"""Computing that is worth a kernel: torch first, faster versions beside it."""

from vlprune.kernels.greedy import RULES, GreedyRule, MaxMin, MaxSum, greedy_select

__all__ = ["RULES", "GreedyRule", "MaxMin", "MaxSum", "greedy_select"]
