"""FastVID: cut a video where it changes, keep every frame's salient tokens, and fold the rest of a segment into anchors.

Reference: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv:2503.11187 (NeurIPS 2025).
Official code: https://github.com/LunarShen/FastVID

Convention: the program's c, tau (DySeg), d (STPrune), p and beta (DTM) are ``segments``, ``threshold``, ``context``, ``every`` and ``beta``; its retention
ratio is ``keep``. It acts on the LLM's input and keeps positions: ``BeforeLLM()``.

Differences:
- Exactly ``keep`` stays. The program rounds down three times, the tokens of a frame, their part that are anchors, and the anchors of each frame with some
  (79 instead of 86 in one of its cases); here what is left over goes to anchors. Given the program's total, the numbers are the program's.
- Attention is what CLS (without one: every token) pays in the block whose output is used. The program for LLaVA-OneVision loads SigLIP's pooling head, which
  these models do not have, for it and for the features of frames; its program for Qwen2.5-VL takes attention of the encoder and means over frames, as here.
  ``frames="states"`` takes the means before the projector.
- Frames with anchors may have too few tokens for them (from about ``keep=0.5`` on), where the program fails. The best-scored of the others stay then.
- Whether anchors draw on their own frame alone depends on whether every frame of the segment has some. The program asks whether a frame has the usual number of
  anchors, which is the same but for very small numbers.
- The noise on densities is left out. Newline tokens are neither kept, while there are others, nor merged.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._vision import attention_tap
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers.anchor_means import AnchorMeans
from vlprune.scorers import SignalScore
from vlprune.selectors.anchors import Anchors

FRAMES = ("tokens", "states")


def fastvid(
    facts: ModelFacts,
    keep: Keep = 0.1,
    *,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    every: int = 4,
    beta: float = 0.6,
    frames: str = "tokens",
) -> PruningMethod:
    """Keep salient tokens and merge the others into anchors, segment by segment.

    Args:
        facts: of the model.
        keep: share or number of a video's tokens that stay, salient ones and anchors together.
        segments: cut at least into so many segments (or frames).
        threshold: cosine of neighbouring frames below which to cut as well.
        context: share of these that are anchors.
        every: anchors stand in every so many frames of a segment, counted back from its last.
        beta: least weight of an anchor in what it becomes.
        frames: a frame's feature is the mean of its ``"tokens"``, or of its ``"states"`` before the projector.
    """
    if frames not in FRAMES:
        raise OptionError(f"frames={frames!r}: 'tokens' or 'states'")
    if isinstance(segments, bool) or not isinstance(segments, int) or segments < 1:
        raise OptionError(f"segments={segments!r}: a whole number from 1")
    features = Tap("vision_states", facts.feature_layer) if frames == "states" else None
    anchors = Anchors(features, segments - 1, threshold, context, every)
    return PruningMethod("fastvid", (Stage(BeforeLLM(), SignalScore(attention_tap(facts)), anchors, AnchorMeans(beta), Budget(keep)),))


CARD = MethodCard(
    "fastvid",
    fastvid,
    "salient tokens of every frame, and anchors into which the rest of a segment is folded",
    paper="arXiv:2503.11187",
    code="https://github.com/LunarShen/FastVID",
    needs=("cls_row",),  # "column_mean" without CLS
    modality="video",
    reduction="merge",
    exact=False,
    equivariant=False,
    default_keep=0.1,
    golden=("fastvid",),
)
