"""HoliTom: windows of a video in which most stands still are merged over time, then over space; inside the decoder half of the rest is folded into the other.

Reference: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", arXiv:2505.21334 (NeurIPS 2025).
Official code: https://github.com/cokeshao/HoliTom

Convention: before the LLM, a cell is still from a frame to the next if their cosine is above tau (0.65 for the published 10 %, 0.80 for 15 to 25 %);
windows are those with the most tokens saved. Still cells become one token a window and are clustered (DPC-kNN, k = 7; beta = 0.6 of the centre, the rest of
the mean of the others); of each frame's moving tokens those stay that receive most attention in the vision block whose output is used (mean over heads and
queries). ``keep`` counts these tokens. In the decoder, at the program's k = 18 of 28, the half that the last prompt token attends to most in the layer before
goes on (``LLMLayer(18)``), and the others are averaged into it: ``llm_keep`` is that share (the program's 1 - r); 1.0 leaves the second part out.

Other depths: the layer scales with depth.

Differences:
- Exactly ``keep`` stays: the program rounds every set's number (`vlprune.kernels.allotment`); given its total, the numbers are the program's. If the sets hold
  fewer tokens than asked for, still tokens of later frames stay unmerged, the least like their mean first; there the program keeps fewer.
- A still cluster's token takes the place of its centre in the window's first frame; the order is raster order, the program puts a window's still tokens first.
- The program's share D of clusters among the moving tokens can only be 0 there, and is not offered. The noise on densities is left out.
- The plain means of the program's NO_BETA are ``beta=0.0``.
- In the program a second video of a batch sees the first one's rescaled ratio; here each is pruned by itself.
- Averaging in the decoder is the program's, one dropped token after the other in raster order, as one weighted sum. Newlines are not averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import given_layers, scaled_layers
from vlprune.points import BeforeLLM, Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers.pairwise_means import PairwiseMeans
from vlprune.reducers.still_means import StillMeans
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK
from vlprune.selectors.still_and_moving import StillAndMoving
from vlprune.selectors.windows import StillestWindows

LAYER = Depth(18, of=28)
LLM_KEEP = 0.5
THRESHOLD, LOW_THRESHOLD, LOW_KEEP = 0.8, 0.65, 0.125


@dataclass(frozen=True)
class ShareOf(Budget):
    """A share of what a first stage with this budget leaves, rounded to the nearest."""

    share: float = 1.0

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay after the second stage."""
        return max(1, round(super().num_keep(num_tokens, num_frames) * self.share))


def holitom(
    facts: ModelFacts,
    keep: Keep = 0.15,
    *,
    threshold: float | None = None,
    beta: float = 0.6,
    longest: int = 1024,
    llm_keep: float | None = None,
    llm_layer: int | None = None,
) -> PruningMethod:
    """Merge over time and space before the language model, and once more inside it.

    Args:
        facts: of the model.
        keep: share or number of a video's tokens that go into the language model.
        threshold: cosine with the frame before above which a cell is still; by default 0.8, or 0.65 for shares of an eighth or less.
        beta: weight of a still cluster's centre.
        longest: frames of a window, at most.
        llm_keep: share of these tokens that go on inside the language model; by default 0.5, or all with ``keep=1.0`` (1.0: all).
        llm_layer: decoder layer, counted from 0, before which the others are averaged into them; by default 18 of 28, scaled.
    """
    budget, depth = Budget(keep), facts.decoder_layers
    if threshold is None:
        threshold = LOW_THRESHOLD if isinstance(keep, float) and keep <= LOW_KEEP else THRESHOLD
    if llm_keep is None:
        llm_keep = 1.0 if budget.is_everything else LLM_KEEP
    elif isinstance(llm_keep, bool) or not isinstance(llm_keep, (int, float)) or not 0.0 < llm_keep <= 1.0:
        raise OptionError(f"llm_keep={llm_keep!r}: the share, in (0, 1], of the tokens in the language model that go on after `llm_layer`; 1.0 for all")
    (place,) = scaled_layers((LAYER,), depth) if llm_layer is None else given_layers("llm_layer", (llm_layer,), 1, depth)
    received = SignalScore(Tap("column_mean", facts.nearest_global(facts.feature_layer)))
    merge = StillAndMoving(StillestWindows(threshold, longest), "drop")
    stages = [Stage(BeforeLLM(), received, merge, StillMeans(beta), budget)]
    if llm_keep < 1.0 and depth > 1:
        stages.append(Stage(LLMLayer(place), SignalScore(Tap("last_row", place - 1)), TopK(), PairwiseMeans(), ShareOf(keep, share=llm_keep)))
    return PruningMethod("holitom", tuple(stages))


CARD = MethodCard(
    "holitom",
    holitom,
    "what stands still in windows of a video merged over time and space; in the decoder the less attended averaged into the rest",
    paper="arXiv:2505.21334",
    code="https://github.com/cokeshao/HoliTom",
    points=("before_llm", "llm:K"),
    needs=("column_mean", "last_row"),
    modality="video",
    reduction="merge",
    text_aware=True,
    exact=False,
    equivariant=False,
    default_keep=0.15,
    golden=("holitom", "holitom_llm"),
)
