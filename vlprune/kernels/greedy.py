"""Greedy selection: K times the token with the largest gain, where a pick changes the gains of the others.

One loop serves every greedy method; `vlprune.kernels.greedy_rules` has what differs, the rule that turns the cosines with the newest pick into new
gains. Nothing is read back to the host. The cosines come from one of two sources:

- a *Gram matrix* of the item, made before the loop by a few large matrix products (on a CPU little more than half of it, the rest mirrored): a step then
  only reads a row. Costs about N^2 D multiplications at the speed of matrix products, whatever K, and 4 N^2 bytes.
- *row by row*: a step multiplies the newest pick with all tokens, N D multiplications at the speed of the memory. Costs K N D and no memory.

So time never grows faster than K, and hardly at all where the Gram matrix pays: on a CPU from about K = N / 8 while the tokens stay in the cache, and from
N / 20 when they do not (measured on two idle cores, and on one: 100 rows of 1,600 x 1,024 take 13 and 20 ms and the Gram matrix 22 and 55; of 2,880 x
4,096 they take 230 and 290, and it 230 and 570). The determinantal rule adds K^2 N / 2 of its own. On a GPU the Gram matrix always pays, since K launches
cost more, and `vlprune.kernels.greedy_triton` runs the loop in one. At most ``GRAM_BYTES`` are held at once: items wait for
each other, and one with more than 8,192 tokens is done row by row. What serves an item depends on N, D and K alone, and each item's products are its own,
so an item's picks do not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.kernels import greedy_triton
from vlprune.kernels.greedy_rules import LINE, RULES, Determinantal, GreedyRule, MaxMin, MaxSum, Problem, Weighted

__all__ = ["GRAM_BYTES", "ISOLATED", "RULES", "Determinantal", "GreedyRule", "MaxMin", "MaxSum", "Weighted", "greedy_select", "uses_gram"]

GRAM_BYTES = 256 * 2**20
CACHE = 16 * 2**20      # bytes of tokens up to which rows are read from the cache
GRAM_FROM = (8, 20)     # Gram matrix from K = N / 8 on in the cache, from N / 20 beyond it
PRODUCTS = ((2**34, 6), (2**31, 2))    # multiplications of a whole Gram matrix, and how many panels it is made in: few and large
ROWS = 512              # rows of cosines held at once where no Gram matrix is
EPS = 1e-12             # lengths below are zero, as in `torch.nn.functional.normalize`
ISOLATED = "isolated"   # first pick: the token whose nearest neighbour is farthest


def uses_gram(num_tokens: int, num_keep: int, width: int, *, cuda: bool = False, all_pairs: bool = False) -> bool:
    """Whether a Gram matrix serves K of N tokens of width D; ``all_pairs`` where every pair is looked at anyway."""
    enough = num_keep * GRAM_FROM[4 * num_tokens * width > CACHE] >= num_tokens
    return 4 * num_tokens**2 <= GRAM_BYTES and (cuda or all_pairs or enough)


@torch.no_grad()
def greedy_select(
    features: Tensor,
    num_keep: int,
    rule: GreedyRule,
    first: Tensor | str | None = None,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    quota: Tensor | None = None,
) -> Tensor:
    """Pick ``num_keep`` different tokens of each item.

    Args:
        features: (B, N, D), any float type; normalised and compared in float32, also under autocast.
        num_keep: K, at most N.
        rule: what a pick does to the gains.
        first: (B,) the first pick, or ``ISOLATED``; ``None``: the largest gain at the start. The earlier token wins a tie, here and later.
        weights: (B, N) worth of each token, not negative, for the rules that look at it; 1 by default.
        groups: (B, N) int; tokens of different groups have nothing to do with each other.
        quota: (B, N) int, with ``groups``: how many tokens of each token's group are picked; K over all groups of an item.

    Returns:
        (B, K) int64 in the order of picking.
    """
    items, count = features.shape[:2]
    if num_keep == 0 or items == 0:
        return torch.zeros(items, num_keep, dtype=torch.int64, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        unit, own = _unit_length(features.float())
        problem = Problem(own, torch.ones_like(own) if weights is None else weights.float(), groups, quota)
        gram = uses_gram(count, num_keep, unit.shape[2], cuda=features.is_cuda, all_pairs=isinstance(first, str))
        at_once = max(1, GRAM_BYTES // (4 * count**2)) if gram else items
        picks = []
        for low in range(0, items, at_once):
            part = slice(low, low + at_once)
            cosines = [gram_matrix(item) for item in unit[part]] if gram else None                # whole matrices first: each at the same alignment
            stacked = None if cosines is None else cosines[0][None] if len(cosines) == 1 else torch.stack(cosines)
            start = _isolated(unit[part], stacked) if isinstance(first, str) else None if first is None else first[part]
            picks.append(_pick(unit[part], stacked, problem.part(part), num_keep, rule, start))
    return torch.cat(picks)


def _unit_length(features: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of length 1, and each one's cosine with itself: 0 for a zero vector. Every row on a cache line: rounding depends on no item's place."""
    size = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    unit = features / size.clamp(min=EPS)
    odd = -unit.shape[-1] % LINE
    return F.pad(unit, (0, odd)) if odd else unit, (size[..., 0] >= EPS).float()


def gram_matrix(unit: Tensor) -> Tensor:
    """(N, N) products of all pairs of rows of ``unit`` (N, D); on a CPU each panel of rows with itself and those below it, mirrored."""
    count, width = unit.shape
    panels = next((number for products, number in PRODUCTS if count * count * width >= products and not unit.is_cuda), 1)
    if panels == 1:
        return unit @ unit.mT
    out = unit.new_empty(count, count)
    height = -(-count // (panels * LINE)) * LINE
    for low in range(0, count, height):
        high = min(low + height, count)
        torch.mm(unit[low:high], unit[low:].mT, out=out[low:high, low:])
        out[high:, low:high] = out[low:high, high:].mT
    return out


def _isolated(unit: Tensor, gram: Tensor | None) -> Tensor:
    """(B,) the token whose largest cosine with another one is smallest."""
    count = unit.shape[1]
    places = torch.arange(count, device=unit.device)
    nearest = []
    for low in range(0, count, ROWS):
        rows = gram[:, low : low + ROWS] if gram is not None else torch.stack([item[low : low + ROWS] @ item.mT for item in unit])
        nearest.append(rows.masked_fill(places[low : low + ROWS, None] == places, -torch.inf).amax(dim=-1))
    return torch.cat(nearest, dim=1).argmin(dim=1)


def _pick(unit: Tensor, gram: Tensor | None, problem: Problem, num_keep: int, rule: GreedyRule, first: Tensor | None) -> Tensor:
    own, weights, groups, quota = problem
    state = rule.start(own, weights, num_keep)
    blocked = torch.zeros_like(own, dtype=torch.bool) if quota is None else quota <= 0
    chosen = state[0].masked_fill(blocked, -torch.inf).argmax(dim=-1) if first is None else first
    if gram is not None and unit.is_cuda and greedy_triton.usable(rule):
        return greedy_triton.greedy_loop(gram, problem, num_keep, rule, chosen)
    picks = [chosen]
    for step in range(num_keep - 1):
        at = chosen[:, None]
        if gram is not None:
            similarity = gram.gather(1, at[..., None].expand(-1, 1, gram.shape[2])).squeeze(1)
        else:
            similarity = torch.cat([item.index_select(0, one) @ item.mT for item, one in zip(unit, at, strict=True)])
        blocked.scatter_(1, at, True)
        if groups is not None and quota is not None:
            same = groups == groups.gather(1, at)
            similarity = similarity.masked_fill(~same, rule.unrelated)
            quota = quota - same.to(quota.dtype)
            blocked |= quota <= 0
        state = rule.absorb(state, similarity, chosen, step)
        chosen = state[0].masked_fill(blocked, -torch.inf).argmax(dim=-1)
        picks.append(chosen)
    return torch.stack(picks, dim=1)


def greedy_select_anew(features: Tensor, num_keep: int, rule: GreedyRule, first: Tensor, *, weights: Tensor | None = None, everything: bool = False) -> Tensor:
    """The yardstick that `greedy_select` is measured against and must agree with: every step computes its similarities anew. Not for use.

    Args:
        features: (1, N, D).
        num_keep: K.
        rule: likewise.
        first: (1,) the first pick.
        weights: (1, N).
        everything: a step multiplies all chosen tokens with all tokens and builds its gains from nothing; otherwise the newest pick with all tokens.
    """
    unit = F.normalize(features.float(), dim=-1)[0]
    own = torch.ones_like(unit[None, :, 0])
    worth = own if weights is None else weights
    state, picks = rule.start(own, worth, num_keep), [first]
    taken = torch.zeros_like(own, dtype=torch.bool)
    for step in range(num_keep - 1):
        if everything:
            state = rule.start(own, worth, num_keep)
            for number, row in enumerate(unit.index_select(0, torch.cat(picks)) @ unit.mT):
                state = rule.absorb(state, row[None], picks[number], number)
        else:
            state = rule.absorb(state, unit.index_select(0, picks[-1]) @ unit.mT, picks[-1], step)
        taken.index_fill_(1, picks[-1], True)
        picks.append(state[0].masked_fill(taken, -torch.inf).argmax(dim=-1))
    return torch.stack(picks, dim=1)
