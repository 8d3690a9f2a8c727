"""FTP: in each block some tokens of the prompt run, ranked by place, by attention, or by a small router; the others pass by.

Reference: "FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing", arXiv:2412.11494. No code.

Convention: ``keep`` is the share of token-block pairs that run. ``ranking="sink_recent"`` is the paper's static router, the first token and then the last
ones; it finds the schedule with it and trains its router to imitate it. ``budgets`` is the schedule, one share for each block; the paper searches it
(a genetic search: uniform shares are far worse than searched ones in its table). Tokens that pass by leave no keys in the block.

- ``ranking="attention"``: the last token's attention row in the block itself.
- ``ranking="random"``: the baseline at the same budgets.
- ``ranking=callable``: ``(ScoreInputs) -> (B, N)``; taps in an attribute ``needs``.
- ``router="file.safetensors"`` (or a `vlprune.scorers.token_router.TokenRouter`): the paper's: 4 numbers a token, 64 hidden, shared by the blocks.
- ``vlprune tune --method ftp`` searches ``budgets``, with the static router, or with a trained one (``--option router=FILE``), the paper's last stage.
- ``examples/train_ftp_router.py`` trains a router.

Differences and open places:
- Without ``budgets`` the blocks from ``start`` on share what ``keep`` says evenly; those before it run everything.
- Decoded tokens run everything. The paper gives them a fixed threshold, which it tunes on one data set.
- The last token always runs and the first one always does; the paper's static order says so for the first, and generation needs the last.
- What skipped pairs leave in the cache is not written in the paper: nothing is our reading; ``kv="project_only"`` is the other one.
- Loss terms of the router's training and settings of the search are not in the paper's text that we could read; ours are said where they are written.
- The search is Optuna's TPE instead of a genetic one: over at most `KNOTS` numbers, between which deeper models take straight lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import KV_POLICIES, Bypass, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._rows import SinkRecent, given_layer, given_protect, given_tokens
from vlprune.methods.random_drop import RandomScore
from vlprune.methods.switchable import ByPolicy
from vlprune.points import Depth
from vlprune.protocols import ScoreInputs, Scorer, Tap
from vlprune.scorers import SignalScore
from vlprune.scorers.token_router import RouterScore, load_router
from vlprune.selectors import TopK

RANKINGS = ("sink_recent", "attention", "random")
KNOTS = 8                       # numbers that a schedule is drawn from; models with fewer layers have one for each
FEWEST = 0.02                   # least share of a layer in a searched schedule
START = Depth(2, of=32)


def ftp(
    facts: ModelFacts,
    keep: Keep = 0.7,
    *,
    ranking: str | Callable[[ScoreInputs], Tensor] = "sink_recent",
    router: str | os.PathLike[str] | nn.Module | None = None,
    budgets: Sequence[Keep] | None = None,
    start: int | None = None,
    tokens: str = "text",
    kv: str = "active_only",
    protect: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> PruningMethod:
    """Let some tokens of the prompt pass by each block.

    Args:
        facts: of the model.
        keep: share of token-block pairs that run, or the number of tokens that run in each block from ``start`` on.
        ranking: ``"sink_recent"``, ``"attention"``, ``"random"``, or a callable.
        router: a router, or the file of one; instead of ``ranking``.
        budgets: share or number of tokens for every block, instead of ``keep`` and ``start``.
        start: block, counted from 0, from which on tokens pass by; 2 of 32 if not given.
        tokens: ``"text"`` or ``"all"``.
        kv: what a token that passes by leaves in the block's cache.
        protect: how many of the first and last text tokens always run.
        seed: of the random ranking.
    """
    depth = facts.decoder_layers
    if kv not in KV_POLICIES:
        raise OptionError(f"kv={kv!r}: one of {', '.join(map(repr, KV_POLICIES))}")
    if not callable(ranking) and ranking not in RANKINGS:
        raise OptionError(f"ranking={ranking!r}: one of {', '.join(map(repr, RANKINGS))}, or a callable")
    first = min(START.resolve(depth), depth - 1) if start is None else given_layer("start", start, 0, depth)
    shares = _shares(keep, first, depth) if budgets is None else list(budgets)
    if len(shares) != depth:
        raise OptionError(f"budgets={budgets!r}: one for each of the {depth} layers")
    net = load_router(router) if isinstance(router, (str, os.PathLike)) else router
    bypasses = []
    for layer, share in enumerate(shares):
        budget = Budget(share)
        if budget.is_everything:
            continue
        scorer = _scorer(ranking, net, layer, seed)
        bypasses.append(
            Bypass(
                layer, "block", kv=kv, tokens=given_tokens(tokens), protect=given_protect(protect), budget=budget, scorer=scorer, selector=TopK()
            )
        )  # fmt: skip
    return PruningMethod("ftp", bypasses=tuple(bypasses))


def _scorer(ranking: Any, router: nn.Module | None, layer: int, seed: int) -> Scorer:
    if router is not None:
        return RouterScore(router, layer)
    if callable(ranking):
        return ByPolicy(ranking)
    known: dict[str, Scorer] = {"sink_recent": SinkRecent(0), "attention": SignalScore(Tap("last_row", layer)), "random": RandomScore(seed)}
    return known[ranking]


def _shares(keep: Keep, start: int, depth: int) -> list[Keep]:
    """A number is every block's own; a share is that of all blocks together, those before ``start`` running everything."""
    if isinstance(keep, int):
        return [1.0] * start + [keep] * (depth - start)
    Budget(keep)
    share = 1.0 - (1.0 - keep) * depth / (depth - start)
    if share <= 0:
        raise OptionError(f"keep={keep!r}: the {start} layers before start={start} alone run {start / depth:.3g} of all; give more, or a smaller start")
    return [1.0] * start + [share] * (depth - start)


def search(facts: ModelFacts, keep: float, suggest: Callable[[str, float, float], float]) -> tuple[float, dict[str, Any]] | None:
    """The schedules for `vlprune.tune` whose shares average ``keep``: what is drawn is how the layers' shares compare, up to 1 to 20."""
    depth = facts.decoder_layers
    if keep <= FEWEST:
        return None
    count = min(depth, KNOTS)
    drawn = [suggest(f"share_{number}", 0.05, 1.0) for number in range(count)]
    return keep, {"budgets": scaled_shares(between(drawn, depth), keep)}


def between(knots: Sequence[float], depth: int) -> list[float]:
    """A number for each layer: the knots are spread evenly over the layers, with straight lines between."""
    if len(knots) == 1:
        return [knots[0]] * depth
    places = [layer * (len(knots) - 1) / max(depth - 1, 1) for layer in range(depth)]
    lower = [min(int(place), len(knots) - 2) for place in places]
    return [knots[low] + (place - low) * (knots[low + 1] - knots[low]) for low, place in zip(lower, places, strict=True)]


def scaled_shares(numbers: Sequence[float], keep: float) -> tuple[float, ...]:
    """Numbers above 0 times one factor, none then below `FEWEST` or above 1, so that their mean is ``keep``."""

    def at(factor: float) -> tuple[float, ...]:
        return tuple(float(min(1.0, max(FEWEST, factor * number))) for number in numbers)

    low, high = 0.0, 1.0 / min(numbers)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < keep * len(numbers) else (low, middle)
    return at(high)


CARD = MethodCard(
    "ftp",
    ftp,
    "in each block the first token, the last ones, or what a router ranks highest",
    paper="arXiv:2412.11494",
    points=("llm:K",),
    reduction="skip",
    tokens="text",
    equivariant=False,
    default_keep=0.7,
    search=search,
)
