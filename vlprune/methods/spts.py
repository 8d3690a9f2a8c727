"""SPTS, probe and skip: in each layer the tokens that the last ones attend to run attention, those that the MLP would move run the MLP.

Reference: "SPTS" (training-free token skipping for long prompts), arXiv:2601.13155. No public code; written from notes on the paper.

Convention, for Llama-3.1-8B: layers before 0-based ``start`` = 10 of 32 are dense; stages end with layers 13, 18, 23 and 28. In each layer from ``start``
on, the head-mean attention row of the last tokens over all candidates is probed; the best M run the attention (``kv="active_only"``: the cache of the layer
holds M entries), and the best M the MLP. At the end of a stage the candidates with the lowest attention leave for good. The published M are 9K, 7K, 4K and
2K of a prompt of 32K; layers behind the last stage keep its M.

``keep``:
- a share is the average share of tokens that run over the layers from ``start`` on; the stages' shares are the published ones at 32K, raised to the one
  power that gives this average.
- a number is M of the last stage, the others are in the published proportion; numbers above a prompt's length are all of it.
- one share or number for each stage.

The MLP's choice: with ``probe`` (a folder of `vlprune.skipping.ffn_probe.make_probes`) by the norm of the low-rank copy's output times the attention, the
paper's conditional score; without it by the attention alone (the paper's ablation, a little worse); ``mlp="dense"`` is attention probing alone.
``ranking="random"`` draws instead, at the same budgets: the baseline.

``queries``: a deviation from the paper. It asks the last token alone (``queries=1``) and measures that best for the question at hand (LongBench 47.80; four
queries 47.53, 64 queries 47.00). For other questions to the same cache that row is worse than no row where much is kept. Measured on
`vlprune.evals.recall`, 3/4 kept, 100 texts: later questions are answered 61 % right, with random choices 73 % (six draws, 72 to 76). Keys of values that
were not asked for lie far from the query, many of them on the far side, so the lowest ranks are full of them: the layer that fetches answers keeps 61 % of
them and 73 % of all tokens. Rows of the untouched model do no better. Neither ties nor MLPs nor the mean over heads are the reason: with every key in the
cache, and nobody leaving, 98 % are right. So are 98 % with the mean of the last 16 rows, which keeps 99 % of these values at the same budgets and answers
the question at hand no worse. Hence 16, the default: a cache is often asked again. Those 16 always run, so a prompt with less text than that is dense.

Open in the notes, and read here as: all candidates of the stage are ranked for the MLP, not only those that ran the attention; what leaves at a stage's
end is 1K of 32K (``drop``, a share of the prompt), never so much that fewer stay than run; no token but the last is protected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import Bypass, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import given_layer, given_protect, given_tokens
from vlprune.methods._stages import scaled_layers
from vlprune.methods.random_drop import RandomScore
from vlprune.points import Depth, LLMLayer
from vlprune.protocols import Scorer, Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.scorers.low_rank_ffn import LowRankFFN
from vlprune.selectors import TopK
from vlprune.skipping.ffn_probe import load_probes

START = Depth(10, of=32)
#: Layers before which the candidates are thinned out: behind the stages' last layers.
ENDS = (Depth(14, of=32), Depth(19, of=32), Depth(24, of=32), Depth(29, of=32))
ACTIVE = (9, 7, 4, 2)
PROMPT = 32
DROP = 1 / 32
#: Last text tokens whose attention ranks; 1 in the paper.
QUERIES = 16


@dataclass(frozen=True)
class Candidates(Budget):
    """What is left behind a stage: all but ``dropped`` times ``number`` of the prompt's tokens, and at least as many as run next (``keep``)."""

    dropped: float = DROP
    number: int = 1

    @property
    def is_everything(self) -> bool:
        """Nothing leaves."""
        return self.dropped == 0 or super().is_everything

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` are candidates of the next stage."""
        active = num_tokens if isinstance(self.keep, int) and self.keep >= num_tokens else super().num_keep(num_tokens)
        return min(num_tokens, max(active, num_tokens - round(self.dropped * self.number * num_tokens)))


def spts(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 0.5,
    *,
    start: int | None = None,
    ends: Sequence[int] | None = None,
    drop: float = DROP,
    mlp: str = "probe",
    probe: str | os.PathLike[str] | None = None,
    ranking: str = "attention",
    tokens: str = "text",
    queries: int = QUERIES,
    protect: tuple[int, int] = (0, 1),
    seed: int = 0,
) -> PruningMethod:
    """Run attention and MLP on the tokens that matter for the last ones, fewer from stage to stage.

    Args:
        facts: of the model.
        keep: average share that runs from ``start`` on, number in the last stage, or one for each stage.
        start: layer, counted from 0, from which on tokens are skipped; 10 of 32 if not given.
        ends: the last layer of each stage, rising; 13, 18, 23 and 28 of 32 if not given.
        drop: share of the prompt that leaves for good behind each stage; 0: nobody.
        mlp: ``"probe"`` (skip MLPs too) or ``"dense"``.
        probe: folder of the small copies of the MLPs; without it the attention alone ranks.
        ranking: ``"attention"``, or ``"random"`` for the baseline.
        tokens: ``"text"`` or ``"all"``.
        queries: of how many last text tokens the attention counts, the mean of their rows; they always run. The paper's is 1.
        protect: how many of the first and last text tokens always run.
        seed: of the random ranking.
    """
    depth = facts.decoder_layers
    for name, given, known in (("mlp", mlp, ("probe", "dense")), ("ranking", ranking, ("attention", "random"))):
        if given not in known:
            raise OptionError(f"{name}={given!r}: one of {', '.join(map(repr, known))}")
    if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
        raise OptionError(f"drop={drop!r}: a share of the prompt from 0 to below 1")
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise OptionError(f"queries={queries!r}: how many last text tokens are asked, a whole number from 1")
    first = min(START.resolve(depth), depth - 1) if start is None else given_layer("start", start, 0, depth)
    cuts = _cuts(ends, first, depth)
    bounds = [first, *cuts] if not cuts or cuts[-1] < depth else [first, *cuts[:-1]]
    budgets = _budgets(keep, bounds, depth)
    nets = None if probe is None else load_probes(probe, depth)
    (sinks, recent), sets = given_protect(protect), given_tokens(tokens)
    row = (sinks, max(recent, queries))                                  # who is asked is there in every layer
    bypasses, stages = [], []
    for number, (begin, budget) in enumerate(zip(bounds, budgets, strict=True)):
        if number and drop and not budget.is_everything:
            scorer: Scorer = RandomScore(seed) if ranking == "random" else SignalScore(_row(begin - 1, queries))
            left = Candidates(budget.keep, dropped=float(drop), number=number)
            stages.append(Stage(LLMLayer(begin), scorer, TopK(), Drop(), left, tokens=sets, protect=row))
        for layer in range(begin, bounds[number + 1] if number + 1 < len(bounds) else depth):
            if budget.is_everything:
                continue
            tap = _row(layer, queries)
            seen: Scorer = RandomScore(seed) if ranking == "random" else SignalScore(tap)
            bypasses.append(Bypass(layer, "attn", kv="active_only", tokens=sets, protect=row, budget=budget, scorer=seen, selector=TopK()))
            if mlp == "probe":
                moved: Scorer = LowRankFFN(nets[layer], tap) if nets is not None and ranking == "attention" else seen
                bypasses.append(Bypass(layer, "mlp", tokens=sets, protect=row, budget=budget, scorer=moved, selector=TopK()))
    return PruningMethod("spts", tuple(stages), bypasses=tuple(bypasses))


def _cuts(ends: Sequence[int] | None, first: int, depth: int) -> list[int]:
    """Layers before which a new stage begins."""
    if ends is None:
        return [layer for layer in scaled_layers(ENDS, depth) if layer > first]
    given = list(ends)
    if any(isinstance(end, bool) or not isinstance(end, int) for end in given) or given != sorted(set(given)) or any(not first <= end < depth for end in given):
        raise OptionError(f"ends={ends!r}: rising layer numbers from {first} to {depth - 1}, the last layer of each stage")
    return [end + 1 for end in given]


def _row(layer: int, queries: int) -> Tap:
    """The attention that ranks."""
    return Tap("last_row", layer, (queries,) if queries > 1 else ())


def _budgets(keep: Keep | Sequence[Keep], bounds: Sequence[int], depth: int) -> list[Budget]:
    """One budget for each stage that begins at ``bounds``."""
    if isinstance(keep, Sequence):
        if len(keep) != len(bounds):
            raise OptionError(f"keep={keep!r}: one for each of the {len(bounds)} stages, which begin at layers {', '.join(map(str, bounds))}")
        return [Budget(part) for part in keep]
    Budget(keep)
    active = (*ACTIVE, *[ACTIVE[-1]] * len(bounds))[: len(bounds)] if len(bounds) >= len(ACTIVE) else ACTIVE[-len(bounds) :]
    if isinstance(keep, int):
        return [Budget(round(keep * part / active[-1])) for part in active]
    widths = [after - before for before, after in zip(bounds, [*bounds[1:], depth], strict=True)]
    power = _power([part / PROMPT for part in active], widths, keep)
    return [Budget(1.0 if keep == 1.0 else (part / PROMPT) ** power) for part in active]


def _power(shares: Sequence[float], widths: Sequence[int], average: float) -> float:
    """The power p for which the shares ** p, weighted by ``widths``, have this average."""
    low, high = 0.0, 64.0
    for _ in range(80):
        middle = (low + high) / 2
        mean = sum(share**middle * width for share, width in zip(shares, widths, strict=True)) / sum(widths)
        low, high = (middle, high) if mean > average else (low, middle)
    return (low + high) / 2


CARD = MethodCard(
    "spts",
    spts,
    "tokens that the last ones attend to run attention and MLPs, fewer from stage to stage",
    paper="arXiv:2601.13155",
    points=("llm:K",),
    needs=("last_row",),
    reduction="skip",
    text_aware=True,
    tokens="text",
    default_keep=0.5,
    test_options={"queries": 2},                                            # the laws' texts are shorter than 16 tokens
)
