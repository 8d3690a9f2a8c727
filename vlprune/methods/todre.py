"""ToDRE: keep diverse visual tokens before the decoder, and none once the text stops looking at them.

Reference: "Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv:2505.18757 v2. No official
code.

Convention: stage 2 acts after the paper's layer 7L/8, 1-based; 28 of 32 is ``LLMLayer(28)``, which looks at the
attention of 0-based layer 27. Other depths round half up (28 layers: 24.5 -> 25; the paper does not say). k is
``num_keep``.

Stage 1: from a pivot, repeatedly add the token with the smallest cumulative cosine similarity to the chosen ones (the
paper's pseudo-code, max-sum). v1's abstract calls it k-center, which is ``rule="maxmin"``.
Stage 2: drop every visual token where text-to-visual and visual-to-text attention are both below tau. Under a causal
mask visual tokens cannot look at text that follows, so the second share is 0 and the first decides.

Differences:
- Pivot: the largest CLS attention in the last *used* vision block (`feature_layer`; later blocks may not run), on the
  global thumbnail (tile 0) of a tiled image. The paper says the encoder's last layer. Without CLS it takes a random
  token; the default here is the one nearest to the mean, which needs no seed. The paper finds at most 0.3 points
  between them.
- Text before the image counts for nothing in stage 2 (visual-to-text attention is taken as 0), and each image of a
  prompt is judged by the attention paid to it alone, so that the images stay independent. For one image after which
  text follows this is the paper's rule.
- Kept tokens keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import BeforeLLM, Depth, LLMLayer
from vlprune.protocols import ScoreInputs, Scorer, Tap
from vlprune.reducers import Drop
from vlprune.scorers import Centrality, Constant, SignalScore
from vlprune.selectors import Diversity, TopK

STAGE2 = Depth(28, of=32)
PIVOTS = ("auto", "cls", "mean", "random")


@dataclass(frozen=True)
class OnThumbnail:
    """Scores of another scorer, limited to the first tile of a tiled image; videos keep all frames."""

    scorer: Scorer

    @property
    def needs(self) -> tuple[Tap, ...]:
        """What the scorer needs."""
        return self.scorer.needs

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); other tiles and separators get -inf."""
        scores = self.scorer(inputs)
        if inputs.grid is None or inputs.modality != "image":
            return scores
        return scores.masked_fill((inputs.grid[..., 0] > 0) | (inputs.grid[..., 1] < 0), -torch.inf)


@dataclass(frozen=True)
class Below:
    """Gate: acts on an item where a signal that is the same for all its tokens lies below ``threshold``."""

    tap: Tap
    threshold: float

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B,) bool."""
        return inputs.signal(self.tap)[:, 0] < self.threshold


def todre(
    facts: ModelFacts,
    keep: Keep = 0.1,
    *,
    rule: str = "maxsum",
    pivot: str = "auto",
    seed: int = 0,
    stage2: bool | None = None,
    tau: float = 0.1,
    layer: int | None = None,
) -> PruningMethod:
    """Keep diverse tokens, then drop all of an item where the text pays it less than ``tau`` of its attention.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item that stage 1 keeps.
        rule: ``"maxsum"`` (v2 of the paper) or ``"maxmin"`` (k-center).
        pivot: where stage 1 starts: ``"cls"``, ``"mean"`` (nearest to the mean), ``"random"``, or ``"auto"``: ``"cls"``
            where the vision tower has a CLS token, else ``"mean"``.
        seed: of the random pivot.
        stage2: whether to drop all later; by default yes, but not with ``keep=1.0``, which changes nothing. ``True``
            with ``keep=1.0`` is stage 2 alone.
        tau: share of the text's attention below which an item's tokens go.
        layer: decoder layer, counted from 0, before which stage 2 acts; by default 7/8 of the depth.
    """
    depth = facts.decoder_layers
    if pivot not in PIVOTS:
        raise OptionError(f"pivot={pivot!r}: one of {', '.join(map(repr, PIVOTS))}")
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
        raise OptionError(f"tau={tau!r}: a share of attention in [0, 1]")
    if layer is None:
        layer = STAGE2.resolve(depth)
    elif isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < max(depth, 2):
        raise OptionError(
            f"layer={layer!r}: from 1 (one layer must have attended) to {depth - 1}, the last decoder layer"
        )
    if pivot == "auto":
        pivot = "cls" if "cls_row" in facts.signals else "mean"
    start: dict[str, Scorer] = {
        "cls": SignalScore(Tap("cls_row", facts.feature_layer)),
        "mean": Centrality(),
        "random": RandomScore(seed),
    }
    budget = Budget(keep)
    stages = [Stage(BeforeLLM(), OnThumbnail(start[pivot]), Diversity(rule), Drop(), budget)]
    if stage2 or (stage2 is None and not budget.is_everything):
        mass = Tap("text_mass", layer - 1)
        nothing = Budget(0, allow_zero=True)
        stages.append(
            Stage(LLMLayer(layer), Constant(), TopK(), Drop(), nothing, gate=Below(mass, tau), gate_needs=(mass,))
        )
    return PruningMethod("todre", tuple(stages))


CARD = MethodCard(
    "todre",
    todre,
    "diverse tokens by greedy selection, then none at all where the text no longer looks",
    paper="arXiv:2505.18757",
    points=("before_llm", "llm:K"),
    needs=("text_mass",),  # and "cls_row" where the model has it
    text_aware=True,
    adaptive=True,
    default_keep=0.1,
)
