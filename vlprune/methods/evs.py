"""EVS: in a video, keep the tokens that changed since the frame before.

Reference: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv:2510.14624.
Official code: https://github.com/vllm-project/vllm (`vllm/multimodal/evs.py`)

Convention: the program's pruning rate q is ``1 - keep``; the number kept is ``int(total * (1 - q))`` over the whole
video.

This is vLLM's form: cosine distance of the embeddings to the same cell one frame earlier, first frame always kept,
the largest distances of the whole video stay. The paper's form (L1 distance of pixels) needs the frames, which the
model does not see; it is not offered.

Differences:
- A share below one frame's worth keeps one frame's worth, as the program does; a number is taken at its word, and
  below one frame's worth the first tokens of the first frame stay.
- Kept tokens keep their (M-)RoPE positions, as in vLLM.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers import TemporalDissimilarity
from vlprune.selectors import TopK


def evs(facts: ModelFacts, keep: Keep = 0.5) -> PruningMethod:
    """Keep what changed between frames, before the language model.

    Args:
        facts: of the model (unused).
        keep: share of the visual tokens of a whole video, at least one frame's worth; or their number.
    """
    stage = Stage(BeforeLLM(), TemporalDissimilarity(), TopK(stable=True), Drop(), Budget(keep, "floor", at_least_one_frame=True))
    return PruningMethod("evs", (stage,))


CARD = MethodCard(
    "evs",
    evs,
    "video tokens that differ from the same place one frame earlier",
    paper="arXiv:2510.14624",
    code="https://github.com/vllm-project/vllm",
    modality="video",
    default_keep=0.5,
    golden=("evs",),
)
