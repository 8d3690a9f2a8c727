"""Attention in which some heads of each row answer, and the others give zeros."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.chosen_attention import attend_heads
from vlprune.protocols import HeadInputs


def pick_heads(x: Tensor, heads: Tensor, groups: int = 1) -> Tensor:
    """(B, n, ...) of ``x`` (B, H / groups, ...): what heads (B, n) use, where ``groups`` of them share."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (first + heads // groups).flatten()).view(*heads.shape, *x.shape[2:])


def attend_some(inputs: HeadInputs, heads: Tensor, *, causal: bool = True, dropout: float = 0.0) -> Tensor:
    """(B, H, Q, d) attention of heads (B, n); zeros in the others.

    In a prompt the others are not computed. For one new token they are, and then put to nought: picking out of the keys would read them twice.
    """
    queries = inputs.queries
    batch, number = queries.shape[:2]
    if heads.dim() != 2 or heads.shape[0] != batch or not 1 <= heads.shape[1] <= number:
        raise OptionError(f"a choice of heads has shape {tuple(heads.shape)}; ({batch}, from 1 to {number}) is needed")
    if heads.shape[1] == number:
        return attend_heads(inputs, None, causal=causal, dropout=dropout)
    if queries.shape[2] == 1:
        out = attend_heads(inputs, None, causal=causal, dropout=dropout)
        answers = torch.zeros(batch, number, dtype=torch.bool, device=queries.device)
        answers.scatter_(1, heads, torch.ones_like(heads, dtype=torch.bool))
        return torch.where(answers[:, :, None, None], out, 0.0)
    groups = number // inputs.keys.shape[1]
    mask = inputs.mask
    asked = replace(
        inputs, queries=pick_heads(queries, heads), keys=pick_heads(inputs.keys, heads, groups), values=pick_heads(inputs.values, heads, groups),
        mask=mask if mask is None or mask.shape[1] == 1 else pick_heads(mask.expand(batch, -1, -1, -1), heads),
    )  # fmt: skip
    out = attend_heads(asked, None, causal=causal, dropout=dropout)
    place = heads[:, :, None, None].expand(-1, -1, *out.shape[2:])
    return out.new_zeros(batch, number, *out.shape[2:]).scatter_(1, place, out)
