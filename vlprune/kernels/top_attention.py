"""Exact attention of every query over the keys with its highest logits, and the choice of such keys for one query; memory is linear in the length."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.budget import Budget
from vlprune.kernels.chosen_attention import take_rows
from vlprune.protocols import HeadInputs

#: Logits that exist at a time.
LIMIT = {"cpu": 1 << 21}
LIMIT_ELSEWHERE = 1 << 26
#: Keys are copied out where so many times their number is still no more than there are; else the others are hidden.
COPIES = 3


def top_places(scores: Tensor, number: int, ranked: bool) -> tuple[Tensor, Tensor]:
    """Highest ``number`` values of (B, H, S) and their places, best first if ``ranked``.

    On a CPU in two steps, two to four times as fast: every one of them lies in one of the ``number`` blocks with the highest maxima.
    """
    total = scores.shape[-1]
    if scores.device.type != "cpu" or total < 8 * number:
        best = scores.topk(number, dim=-1, sorted=ranked)
        return best.values, best.indices
    size = 1 << max(1, round(math.log2(total / number) / 2))
    blocks = -(-total // size)
    padded = functional.pad(scores, (0, blocks * size - total), value=-torch.inf) if blocks * size > total else scores
    chosen = padded.reshape(*padded.shape[:-1], size, blocks).amax(dim=-2).topk(number, dim=-1, sorted=False).indices      # every blocks-th place is one block
    places = (chosen[..., None, :] + blocks * torch.arange(size, device=scores.device)[:, None]).flatten(-2)
    best = torch.gather(padded, -1, places).topk(number, dim=-1, sorted=ranked)
    return best.values, torch.gather(places, -1, best.indices)


def most_of(budget: Budget, total: int) -> int:
    """The most keys that a query sees of ``total``; a number above is all of them."""
    return total if isinstance(budget.keep, int) and budget.keep >= total else budget.num_keep(total)


def numbers(budget: Budget, allowed: Tensor | None, most: int) -> Tensor | None:
    """(B, 1 or H, Q, 1) how many keys each query sees of those that ``allowed`` (B, 1 or H, Q, S) lets it see, rounded as the budget does; ``None``: most."""
    if allowed is None:
        return None
    there = allowed.sum(dim=-1, keepdim=True)
    if isinstance(budget.keep, int):
        return there.clamp(min=1, max=budget.keep)
    share = budget.keep * there.double()
    return (share.floor() if budget.rounding == "floor" else share.round()).long().clamp(min=1, max=most)


def visible(inputs: HeadInputs, first: int, last: int) -> tuple[Tensor | None, Tensor | None]:
    """Of queries ``first`` to ``last``: (B, 1 or H, q, S) bool, which keys the model lets them see (``None``: all), and what is added to their logits."""
    length, total = inputs.queries.shape[2], inputs.keys.shape[2]
    if inputs.mask is None:
        if length == 1:
            return None, None
        places = torch.arange(first, last, device=inputs.keys.device) + (total - length)
        return (torch.arange(total, device=places.device) <= places[:, None])[None, None], None
    mask = inputs.mask[:, :, first:last, :total]
    return (mask, None) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min / 2, mask)


def logits_of(inputs: HeadInputs, first: int, last: int, queries: Tensor | None = None) -> Tensor:
    """(B, H, q, S) float32, as the module counts them, cap included; no keys are copied for the heads of a group."""
    asked = (inputs.queries if queries is None else queries)[:, :, first:last]
    batch, heads, number, _ = asked.shape
    kv = inputs.keys.shape[1]
    grouped = (asked * inputs.scale).reshape(batch, kv, heads // kv * number, -1)
    one = grouped.shape[2] == 1                                              # this way round a CPU takes half the time
    products = inputs.keys @ grouped.transpose(-1, -2) if one else grouped @ inputs.keys.transpose(-1, -2)
    logits = products.reshape(batch, heads, number, -1).float()
    return torch.tanh(logits / inputs.cap) * inputs.cap if inputs.cap else logits


def top_attention(inputs: HeadInputs, budget: Budget) -> Tensor:
    """(B, H, Q, d) attention of each query over its best keys; of keys that are equally good at the last place all are seen."""
    batch, heads, length, _ = inputs.queries.shape
    total, values = inputs.keys.shape[2], inputs.values
    most = most_of(budget, total)
    step = max(1, LIMIT.get(values.device.type, LIMIT_ELSEWHERE) // max(1, batch * heads * total))
    out = []
    for first in range(0, length, step):
        last = min(first + step, length)
        allowed, bias = visible(inputs, first, last)
        logits = logits_of(inputs, first, last)
        low = torch.finfo(logits.dtype).min
        logits = logits if bias is None else logits + bias.float()
        logits = logits if allowed is None else logits.masked_fill(~allowed, low)
        number = numbers(budget, allowed, most)
        if length == 1 and COPIES * most <= total:
            best, keys = top_places(logits[:, :, 0], most, number is not None)            # (B, H, k)
            best = best if number is None else best.masked_fill(torch.arange(most, device=best.device) >= number[:, :, 0], low)
            out.append(best.softmax(dim=-1).to(values.dtype)[:, :, None] @ take_rows(values, keys))
            continue
        least = least_of(logits, most, number)
        weights = logits.masked_fill(logits < least, low).softmax(dim=-1).to(values.dtype)
        grouped = weights.reshape(batch, values.shape[1], -1, total) @ values              # (B, Hkv, r q, d)
        out.append(grouped.view(batch, heads, last - first, -1))
    return torch.cat(out, dim=2)


def least_of(scores: Tensor, most: int, number: Tensor | None) -> Tensor:
    """(B, H, Q, 1) the lowest score among the best ``number`` (B, 1 or H, Q, 1), or ``most``, of (B, H, Q, S)."""
    if number is None:
        return scores.kthvalue(scores.shape[-1] - most + 1, dim=-1, keepdim=True).values     # no sorting of those above it
    best = scores.topk(most, dim=-1).values
    return torch.gather(best, -1, (number - 1).expand(*best.shape[:3], 1))


def with_newest(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores (B, H, S) of one query a row, infinite at its own place, the last that may be seen, and minus infinite where nothing may be."""
    place = torch.full((1, 1, 1), scores.shape[-1] - 1, device=scores.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, :, 0], -torch.inf)
        place = torch.where(allowed[:, :, 0], torch.arange(scores.shape[-1], device=scores.device), 0).amax(dim=-1, keepdim=True)
    return scores.scatter(2, place.expand(*scores.shape[:2], 1), torch.inf)


def top_keys(scores: Tensor, allowed: Tensor | None, budget: Budget) -> tuple[Tensor, Tensor | None]:
    """Best keys of one query a row, by scores (B, H, S): (B, H, K) places, and (B, H, K) which of them count (``None``: all)."""
    most = most_of(budget, scores.shape[-1])
    number = numbers(budget, allowed, most)
    best = top_places(scores, most, number is not None)[1]
    return best, None if number is None else (torch.arange(most, device=best.device) < number[:, :, 0]).expand(best.shape)


def top_mask(scores: Tensor, allowed: Tensor | None, budget: Budget) -> Tensor:
    """(B, H, 1, S) bool: the best keys of one query a row, by scores (B, H, S); of those equally good at the last place all."""
    most = most_of(budget, scores.shape[-1])
    seen = scores[:, :, None] >= least_of(scores[:, :, None], most, numbers(budget, allowed, most))
    return seen if allowed is None else seen & allowed
