"""PruneVid: merge what stands still in a video over time and what is alike over space, then drop in the decoder what the question does not look at.

Reference: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", arXiv:2412.16117 (Findings of ACL 2025).
Official code: https://github.com/Visual-AI/PruneVid

Convention: before the LLM (the program's `merge_frames_dynamic`), frames are clustered (DPC-kNN, k = 7, a quarter as many clusters as frames) into windows,
a cell is still in its window if its mean cosine over pairs of frames is above tau = 0.8, and the still cells of a window and the moving ones of each of its
frames are clustered to half their number; sets of at most 14 stay whole. In the decoder, a token's score is the largest attention of any head and text token
after the video in 0-based layer 10 of 32, and of every set the share alpha = 0.4 goes on: ``LLMLayer(11)``. ``keep`` is what is left in the end; before that
``keep ** 0.5`` of the tokens go into the LLM (0.4 for 0.16), or ``merged``.

Other depths: the layer scales with depth.

Differences:
- Exactly ``keep`` stays. The program's numbers follow from how still a video is; here they are shared out over the same sets (`StillAndMoving`), and given
  the program's totals they are the program's. If the sets hold fewer tokens than asked for, still tokens of later frames stay unmerged, the least like their
  mean first.
- A still cluster's token takes the place of its centre in the window's first frame, a moving one that of its centre; the order is raster order. The program
  puts a window's still tokens before its moving ones, each set in the order of centrality.
- The noise on densities is left out. A window of one frame holds no still cells by rule; there the program divides by zero, to the same effect. If no two
  frames in a row share a cluster, the video is one window.
- Keys and values of layers before the drop keep what was dropped there: in the program, tokens decoded later do not see it in these layers either.
- With several videos, each is pruned by itself; newline tokens belong to no set and leave first.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import falling_budgets, given_layers, scaled_layers
from vlprune.points import BeforeLLM, Depth, LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.reducers.still_means import StillMeans
from vlprune.scorers import SignalScore
from vlprune.scorers.constant import Constant
from vlprune.selectors.set_shares import SetShares
from vlprune.selectors.still_and_moving import StillAndMoving
from vlprune.selectors.windows import ClusteredFrames

LAYER = Depth(11, of=32)
SHARES = (0.4, 0.16)


def prunevid(
    facts: ModelFacts,
    keep: Keep = 0.16,
    *,
    merged: Keep | None = None,
    layer: int | None = None,
    threshold: float = 0.8,
    segments: float = 0.25,
    cluster_ratio: float = 0.5,
) -> PruningMethod:
    """Merge over time and space before the language model, then drop by the question's attention.

    Args:
        facts: of the model.
        keep: share or number of a video's tokens that is left in the end.
        merged: share or number that is left after merging; by default the root of the share that ``keep`` is.
        layer: decoder layer, counted from 0, before which to drop; by default 11 of 32, scaled.
        threshold: mean cosine over the frames of a window above which a cell is still.
        segments: clusters of frames, as a share of the number of frames.
        cluster_ratio: share of a set of more than 14 tokens that its clusters are, where the budget leaves the choice.
    """
    before, after = falling_budgets(keep, SHARES, 2)
    if merged is not None:
        before = Budget(merged, "floor")
        if type(merged) is type(keep) and merged < keep:
            raise OptionError(f"merged={merged!r}: after merging there must be at least what is left in the end, keep={keep!r}")
    depth = facts.decoder_layers
    (place,) = scaled_layers((LAYER,), depth) if layer is None else given_layers("layer", (layer,), 1, depth)
    merge = StillAndMoving(ClusteredFrames(segments, threshold=threshold), "merge", ratio=cluster_ratio)
    asked = SignalScore(Tap("text_max", place - 1))
    stages = (Stage(BeforeLLM(), Constant(), merge, StillMeans(), before), Stage(LLMLayer(place), asked, SetShares(), Drop(), after))
    return PruningMethod("prunevid", stages)


CARD = MethodCard(
    "prunevid",
    prunevid,
    "still cells averaged over time, likes clustered over space; in the decoder, what the question looks at",
    paper="arXiv:2412.16117",
    code="https://github.com/Visual-AI/PruneVid",
    points=("before_llm", "llm:K"),
    needs=("text_max",),
    modality="video",
    reduction="merge",
    text_aware=True,
    exact=False,
    equivariant=False,
    default_keep=0.16,
    golden=("prunevid",),
)
