"""Exact attention of every query over the keys with its highest logits, and the choice of such keys for one query; memory is linear in the length."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.budget import Budget
from vlprune.kernels.chosen_attention import weigh_rows
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
    shape, size = (*scores.shape[:-1], number), 1 << max(1, round(math.log2(total / number) / 2))
    blocks, scores = -(-total // size), scores.reshape(-1, total)
    scores = functional.pad(scores, (0, blocks * size - total), value=-torch.inf) if blocks * size > total else scores
    chosen = scores.view(-1, size, blocks).amax(dim=1).topk(number, dim=1, sorted=False).indices          # every blocks-th place is one block
    places = (chosen[:, None] + torch.arange(0, blocks * size, blocks)[:, None]).view(-1, size * number)
    found = scores.gather(1, places).topk(number, dim=1, sorted=ranked)
    return found.values.view(shape), places.gather(1, found.indices).view(shape)


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
    asked = inputs.queries if queries is None else queries
    asked = asked if last - first == asked.shape[2] else asked[:, :, first:last]
    (batch, heads, number, width), (_, kv, total, _) = asked.shape, inputs.keys.shape
    grouped, keys = (asked * inputs.scale).reshape(batch * kv, -1, width), inputs.keys.reshape(-1, total, width)
    if number == 1 and keys.device.type == "cpu" and keys.dtype == torch.float32:          # a CPU reads the keys half as long this way round
        products = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2)
    else:
        products = torch.bmm(grouped, keys.transpose(1, 2))
    logits = products.reshape(batch, heads, number, total).float()
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
            out.append(weigh_rows(values, keys, _softmax(best, number, values)))
            continue
        least = least_of(logits, most, number)
        weights = logits.masked_fill(logits < least, low).softmax(dim=-1).to(values.dtype)
        grouped = weights.reshape(batch, values.shape[1], -1, total) @ values              # (B, Hkv, r q, d)
        out.append(grouped.view(batch, heads, last - first, -1))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def top_and_newest(inputs: HeadInputs, budget: Budget) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention of one new token a row over its own key and its best others, by whole logits: (B, H, 1, d), their places (B, H, K), which count (B, H, K)."""
    total, values = inputs.keys.shape[2], inputs.values
    most = most_of(budget, total)
    allowed, bias = visible(inputs, 0, 1)
    logits = logits_of(inputs, 0, 1)[:, :, 0]
    logits = logits if bias is None else logits + bias[:, :, 0].float()
    if allowed is None:
        own = logits[..., -1:].clone()
        best, keys = top_places(with_newest(logits, None), most, False)
        return weigh_rows(values, keys, _softmax(torch.where(best == torch.inf, own, best), None, values)), keys, None
    number = numbers(budget, allowed, most)
    keys = top_places(with_newest(logits, allowed), most, True)[1]
    return weigh_rows(values, keys, _softmax(logits.gather(-1, keys), number, values)), keys, counted(keys, number)


def _softmax(best: Tensor, number: Tensor | None, values: Tensor) -> Tensor:
    """Weights of logits (B, H, K), best first, of which the first ``number`` count, in the type of ``values``."""
    if number is not None:
        best = best.masked_fill(torch.arange(best.shape[-1], device=best.device) >= number[:, :, 0], torch.finfo(best.dtype).min)
    return best.softmax(dim=-1).to(values.dtype)


def counted(keys: Tensor, number: Tensor | None) -> Tensor | None:
    """(B, H, K) bool: which of the places (B, H, K), best first, count where ``number`` do; ``None``: all."""
    return None if number is None else (torch.arange(keys.shape[-1], device=keys.device) < number[:, :, 0]).expand(keys.shape)


def least_of(scores: Tensor, most: int, number: Tensor | None) -> Tensor:
    """(B, H, Q, 1) the lowest score among the best ``number`` (B, 1 or H, Q, 1), or ``most``, of (B, H, Q, S)."""
    if number is None:
        return scores.kthvalue(scores.shape[-1] - most + 1, dim=-1, keepdim=True).values     # no sorting of those above it
    best = scores.topk(most, dim=-1).values
    return torch.gather(best, -1, (number - 1).expand(*best.shape[:3], 1))


def with_newest(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores (B, H, S) of one query a row, infinite at its own place, the last that may be seen, and minus infinite where nothing may be.

    Written into ``scores`` itself where everything may be seen.
    """
    if allowed is None:
        scores.select(-1, -1).fill_(torch.inf)
        return scores
    scores = scores.masked_fill(~allowed[:, :, 0], -torch.inf)
    place = torch.where(allowed[:, :, 0], torch.arange(scores.shape[-1], device=scores.device), 0).amax(dim=-1, keepdim=True)
    return scores.scatter(2, place.expand(*scores.shape[:2], 1), torch.inf)


def top_keys(scores: Tensor, allowed: Tensor | None, budget: Budget) -> tuple[Tensor, Tensor | None]:
    """Best keys of one query a row, by scores (B, H, S): (B, H, K) places, and (B, H, K) which of them count (``None``: all)."""
    most = most_of(budget, scores.shape[-1])
    number = numbers(budget, allowed, most)
    best = top_places(scores, most, number is not None)[1]
    return best, counted(best, number)


def top_mask(scores: Tensor, allowed: Tensor | None, budget: Budget) -> Tensor:
    """(B, H, 1, S) bool: the best keys of one query a row, by scores (B, H, S); of those equally good at the last place all."""
    most = most_of(budget, scores.shape[-1])
    seen = scores[:, :, None] >= least_of(scores[:, :, None], most, numbers(budget, allowed, most))
    return seen if allowed is None else seen & allowed
