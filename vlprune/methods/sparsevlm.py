"""SparseVLM and SparseVLM+: inside the decoder, drop in stages what the text tokens that matter for the picture look at least.

Reference: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv:2410.04417 (ICML 2025).
Official code: https://github.com/Gumpest/SparseVLMs

Convention: the program drops on the *output* of 0-based layers 2, 6 and 15 of 32: ``LLMLayer(3)``, ``LLMLayer(7)``, ``LLMLayer(16)``, with the attention
of layers 2, 6 and 15. Raters are the text tokens after the picture that its input embeddings point at more than at the average one, chosen once. The
paper's "192 tokens" are the average over all layers: ``keep=192``, or ``keep=1/3``, is the program's list [300, 200, 118] of 576. Lists are shares of the
original number; between the published averages (64, 96, 128, 192 and all of 576) each stage's share is interpolated, below 64 scaled.

- ``variant="v2"`` (SparseVLM+, the default: it is the authors' later program, drops without changing any kept token, and keeps positions): attention is
  divided by what rotary positions alone would give, and averaged over the 14 heads that look at the picture most.
- ``variant="v1"``: all heads; of what leaves, the best-scored 30 % are clustered (DPC-kNN), and each cluster's mean stays as one token.

Other depths: layers scale with depth and stay distinct; fewer than three stages are the last ones.

Differences:
- v1: the stage's number counts the clusters' tokens as well, so that exactly as many stay; the program adds 3 to 9 to its list (309, 204, 113 for 192). A
  cluster's token takes the place of its centre; ``appended=True`` puts them behind the kept ones, as the program does (which then renumbers:
  ``vlprune.apply(..., positions="renumber")``). As there, they compete with the others in later stages.
- v1: the noise of 1e-6 on the density is left out (equal densities: the better-scored token is denser), and a mean divides by the count, not by
  count + 1e-6.
- The program keeps at most N - 1 of a number in its list; here more than N is an error, as everywhere.
- Decoders with fewer than 14 heads use all. The paper's rank-adaptive number of tokens is not in the program, and not here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import given_budgets, given_layers, scaled_layers
from vlprune.points import Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.reducers.cluster_recycle import ClusterRecycle
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK
from vlprune.selectors.with_clusters import WithClusters

LAYERS = (Depth(3, of=32), Depth(7, of=32), Depth(16, of=32))
TOTAL = 576
#: Average number of tokens over the layers -> number after each stage, of ``TOTAL``.
LISTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "v1": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "v2": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}


@dataclass(frozen=True)
class FromAverage(Budget):
    """A stage of a published schedule, where ``keep`` is the average number over the layers."""

    variant: str = "v2"
    stage: int = -1

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay after this stage."""
        average = super().num_keep(num_tokens, num_frames)
        share = float(self.keep) if isinstance(self.keep, float) else average / num_tokens
        return max(1, round(stage_shares(self.variant, share)[self.stage] * num_tokens))


def stage_shares(variant: str, average: float) -> tuple[float, ...]:
    """Share of the original number after each stage for an average share: linear between the published ones."""
    known = [(0.0, (0.0, 0.0, 0.0))]
    known += [(number / TOTAL, tuple(count / TOTAL for count in counts)) for number, counts in LISTS[variant].items()]  # type: ignore[misc]
    known.append((1.0, (1.0, 1.0, 1.0)))
    above = max(1, bisect_left([share for share, _ in known], average))
    (low, before), (high, after) = known[above - 1], known[above]
    if average >= high:
        return after
    weight = (average - low) / (high - low)
    return tuple(first + weight * (second - first) for first, second in zip(before, after, strict=True))


def sparsevlm(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 1 / 3,
    *,
    variant: str = "v2",
    layers: Sequence[int] | None = None,
    heads: int = 14,
    appended: bool = False,
) -> PruningMethod:
    """Drop in stages, by the attention of the text tokens that the picture points at.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item, on average over the decoder's layers as the paper counts; or one share or number per stage.
        variant: ``"v2"`` (SparseVLM+) or ``"v1"`` (clusters what leaves).
        layers: decoder layers, counted from 0, before which to drop ("on the output of layer 2" is 3).
        heads: v2: heads that count, those that look at the picture most.
        appended: v1: clusters' tokens stand behind the kept ones instead of at their centres.
    """
    if variant not in LISTS:
        raise OptionError(f"variant={variant!r}: one of {', '.join(map(repr, LISTS))}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise OptionError(f"heads={heads!r}: a whole number from 1 is needed")
    if appended and variant != "v1":
        raise OptionError("appended=True is about the clusters of variant='v1'; v2 has none")
    places = scaled_layers(LAYERS, facts.decoder_layers) if layers is None else given_layers("layers", layers, 1, facts.decoder_layers)
    budgets = _budgets(keep, variant, len(places))
    stages = []
    for place, budget in zip(places, budgets, strict=True):
        if variant == "v2":
            stages.append(Stage(LLMLayer(place), SignalScore(Tap("rater_rows_plus", place - 1, (heads,))), TopK(), Drop(), budget))
        else:
            scorer = SignalScore(Tap("rater_rows", place - 1))
            stages.append(Stage(LLMLayer(place), scorer, WithClusters(), ClusterRecycle(scorer, appended), budget))
    return PruningMethod("sparsevlm", tuple(stages))


def _budgets(keep: Keep | Sequence[Keep], variant: str, num_stages: int) -> tuple[Budget, ...]:
    if not isinstance(keep, (int, float)):
        return given_budgets(keep, num_stages, "round")
    if num_stages > len(LAYERS):
        raise OptionError(f"layers: {num_stages} of them, but published are {len(LAYERS)} stages; give keep as one share per stage too")
    return tuple(FromAverage(keep, variant=variant, stage=stage) for stage in range(-num_stages, 0))


CARD = MethodCard(
    "sparsevlm",
    sparsevlm,
    "attention of the text tokens that the picture points at, freed from positions, in three stages",
    paper="arXiv:2410.04417",
    code="https://github.com/Gumpest/SparseVLMs",
    points=("llm:K", "llm:K", "llm:K"),
    needs=("rater_rows_plus",),
    text_aware=True,
    default_keep=1 / 3,
    golden=("sparsevlm",),
)
