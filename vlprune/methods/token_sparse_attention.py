"""Token Sparse Attention: in some layers each head attends from, and to, a part of the prompt's tokens; the others get nothing from that head.

Reference: "Token Sparse Attention", arXiv:2602.03216. Official code: https://github.com/dongwonjo/Token-Sparse-Attention (MIT).

Convention: in a prompt, the last ``window`` tokens ask; each head ranks the tokens before them by the mean of their attention rows, averaged over ``pool``
neighbours. A head keeps its best and the window, gathers their queries, keys and values, attends causally among them and puts the answers in place. The
cache holds every key, so decoding is dense, and a token that a head left out in one layer is there again in the next.

- ``keep`` alone: so many tokens (window included) stay in every head. How many is known before the data, and nothing is read back.
- with ``coverage``, the paper's tau: the tokens that together hold less than this share of the attention (mean over heads, so one number for all heads)
  leave, but at least ``keep`` stay. Costs one host read a layer. The paper's setting is ``keep=1024`` (its min_tokens, to which it adds the window),
  ``coverage=0.005`` for Llama-3.1-8B and 0.008 for Mistral-Nemo-12B.
- ``layers``: numbers, or what `vlprune.skipping.drift` measured: the layers whose tokens move least, the lower half. Without: the paper's 15 to 30 of 32,
  scaled (its code takes the second half of models that it does not know).

Differences:
- ``keep`` is a budget by default, as everywhere here; the paper's rule is the option.
- In short prompts the window is at most half of what stays, where the paper runs dense.
- Batches with padding: each row has its own window and count.
- On a cache that holds something already (a second turn) attention is dense: its tokens would have to be ranked among all.
- ``ranking="random"`` draws instead, at the same budget: the baseline.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import Attend, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._rows import given_layer, given_tokens
from vlprune.methods._schedules import given_count
from vlprune.points import Depth
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.scorers.window_attention import last_places, window_attention
from vlprune.skipping.drift import load_drift, still_layers

FIRST, LAST = Depth(15, of=32), Depth(30, of=32)


@dataclass(frozen=True)
class SparseHeads:
    """Which tokens each head of a layer asks with and sees.

    Attributes:
        budget: of each row's tokens of the set. window, pool, coverage: as the options of the method. seed: of random ranking, ``None``: by attention.
    """

    budget: Budget
    window: int
    pool: int
    coverage: float | None
    seed: int | None = None

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """A choice, or ``None`` where the budget is everything or the cache is not empty."""
        if inputs.past or inputs.real is None or inputs.real_counts is None or inputs.counts is None or inputs.tokens is None:
            return None
        counts, real_counts = inputs.counts, inputs.real_counts
        stay = [kept(self.budget, count) for count in counts]
        if stay == list(counts):
            return None
        windows = [max(1, min(self.window, number // 2)) for number in stay]
        real, device = inputs.real, inputs.real.device
        places, exists = last_places(real, real_counts, max(windows))
        limits = torch.tensor(windows).to(device, non_blocking=True)[:, None]
        exists = exists & (torch.arange(places.shape[1], device=device) >= places.shape[1] - limits)
        in_window = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.bool, device=device)
        in_window = in_window.scatter(1, torch.where(exists, places, real.shape[1]), True)[:, :-1]
        free = real & inputs.tokens & ~in_window                                              # (B, S): those that are ranked
        with torch.no_grad():
            scores = self._scores(inputs, places, exists)
            smooth = functional.avg_pool1d(scores.masked_fill(~(real & ~in_window)[:, None], 0.0), self.pool, 1, self.pool // 2)
        if self.coverage is not None:
            dropped = covered(smooth.mean(dim=1), free, self.coverage).tolist()                # the host read
            stay = [max(number, count - gone) for number, count, gone in zip(stay, counts, dropped, strict=True)]
            if stay == list(counts):
                return None
        total = [number + every - count for number, every, count in zip(stay, real_counts, counts, strict=True)]
        ranked = torch.where(free[:, None], smooth, torch.where(real, torch.inf, -torch.inf)[:, None])
        best = ranked.topk(max(total), dim=-1).indices                                        # (B, H, R)
        if min(total) < max(total):
            mine = torch.arange(max(total), device=device) < torch.tensor(total).to(device, non_blocking=True)[:, None]
            best = torch.where(mine[:, None], best, real.shape[1])                            # filler, behind everything
        index = best.sort(dim=-1).values
        flops = 0.0 if self.seed is not None else 2.0 * scores.shape[0] * scores.shape[1] * places.shape[1] * scores.shape[2] * inputs.queries.shape[3]
        return HeadChoice(keys=index, queries=index, flops=flops, counts=tuple(total))

    def _scores(self, inputs: HeadInputs, places: Tensor, exists: Tensor) -> Tensor:
        if self.seed is None:
            return window_attention(inputs, places, exists.float())
        batch, heads, length = inputs.queries.shape[:3]
        generator = torch.Generator().manual_seed(self.seed + inputs.layer)
        drawn = torch.rand(length, heads, generator=generator).T.to(places.device, non_blocking=True)      # longer is more of the same
        assert inputs.real is not None
        order = (inputs.real.long().cumsum(dim=1) - 1).clamp(min=0)                           # the same for a row alone
        return torch.gather(drawn.expand(batch, -1, -1), 2, order[:, None].expand(-1, heads, -1))


def kept(budget: Budget, count: int) -> int:
    """How many of ``count`` tokens stay; a number above is all of them."""
    return count if isinstance(budget.keep, int) and budget.keep >= count else budget.num_keep(count) if count else 0


def covered(scores: Tensor, free: Tensor, coverage: float) -> Tensor:
    """(B,) how many of the ``free`` (B, S) tokens leave: sorted by their share of the attention (B, S), those whose running sum stays below ``coverage``."""
    share = scores.masked_fill(~free, 0.0)
    share = share / (share.sum(dim=1, keepdim=True) + 1e-8)
    running = share.masked_fill(~free, torch.inf).sort(dim=1).values.cumsum(dim=1)
    number = (running < coverage).sum(dim=1)
    return torch.where(number == 0, number, number + 1)                   # one more, as in the paper: the one that reaches the share leaves too


def token_sparse_attention(
    facts: ModelFacts,
    keep: Keep = 0.5,
    *,
    coverage: float | None = None,
    layers: Sequence[int] | str | os.PathLike[str] | None = None,
    quantile: float = 0.5,
    window: int = 128,
    pool: int = 7,
    tokens: str = "all",
    ranking: str = "attention",
    seed: int = 0,
) -> PruningMethod:
    """Attend among a part of the prompt's tokens, head by head.

    Args:
        facts: of the model.
        keep: share or number of each row's tokens that every head keeps; with ``coverage`` the fewest.
        coverage: share of the attention that may be lost, from 0 to below 1.
        layers: where; numbers counted from 0, or the folder that ``vlprune calibrate --method token_sparse_attention`` wrote.
        quantile: with a folder: which share of the layers is sparse, those that move least.
        window: how many of the last tokens ask, and always stay.
        pool: neighbours, an odd number, over which attention is averaged.
        tokens: ``"all"``, or ``"text"`` or ``"visual"`` tokens alone; others always stay.
        ranking: ``"attention"``, or ``"random"`` for the baseline.
        seed: of the random ranking.
    """
    if tokens != "visual":
        given_tokens(tokens)
    given_count("window", window, 1, "last tokens that ask")
    if given_count("pool", pool, 1, "neighbours, an odd number") % 2 == 0:
        raise OptionError(f"pool={pool!r}: an odd number of neighbours, with the token in the middle")
    if coverage is not None and (isinstance(coverage, bool) or not isinstance(coverage, (int, float)) or not 0 <= coverage < 1):
        raise OptionError(f"coverage={coverage!r}: share of the attention that may be lost, from 0 to below 1")
    if ranking not in ("attention", "random"):
        raise OptionError(f"ranking={ranking!r}: 'attention' or 'random'")
    budget = Budget(keep)
    chosen = _layers(layers, quantile, facts.decoder_layers)
    if budget.is_everything:
        return PruningMethod("token_sparse_attention")
    rule = SparseHeads(budget, window, pool, coverage, seed if ranking == "random" else None)
    return PruningMethod("token_sparse_attention", attends=tuple(Attend(layer, choose=rule, tokens=tokens, stateless=True) for layer in chosen))


def _layers(layers: Any, quantile: float, depth: int) -> list[int]:
    if isinstance(layers, (str, os.PathLike)):
        return still_layers(load_drift(layers, depth), quantile)
    if layers is None:
        return list(range(FIRST.resolve(depth), min(LAST.resolve(depth) + 1, depth)))
    return sorted({given_layer("layers", layer, 0, depth) for layer in layers})


CARD = MethodCard(
    "token_sparse_attention",
    token_sparse_attention,
    "in some layers each head attends among the tokens that the last ones look at; every key is kept",
    paper="arXiv:2602.03216",
    code="https://github.com/dongwonjo/Token-Sparse-Attention",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=0.5,
    test_options={"window": 4, "pool": 3},
)
