"""VidCom2: unusual frames of a video keep more tokens, and every frame keeps its outliers.

Reference: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", arXiv:2505.14454 (EMNLP 2025).
Official code: https://github.com/xuyang-liu16/VidCom2

Convention: the program's base ratio is ``keep``. Likeness to the video and to the frame, the frames' shares and the temperature of 0.01 are those of
`vlprune.scorers.frame_outliers`.

Differences:
- Exactly ``keep`` of a video stays. The program rounds every frame's number, and the total follows (129 instead of 128 tokens in one of its cases); here the
  base ratio is the one that leads to the total (`vlprune.kernels.allotment`). Every frame keeps a token while there are enough, as there.
- Newline tokens stay, as in the program, but count to ``keep``; ``separators="drop"`` lets them go. They stand in raster order; the LLaVA-Video path of
  the program puts a frame's newlines behind its tokens.
- A frame that would get more than it holds leaves the rest to the others; the program caps it.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers.frame_outliers import FrameOutliers
from vlprune.selectors import TopK


def vidcom2(facts: ModelFacts, keep: Keep = 0.25, *, temperature: float = 0.01, separators: str = "keep") -> PruningMethod:
    """Keep outliers of every frame, more of unusual frames, before the language model.

    Args:
        facts: of the model (unused).
        keep: share or number of a video's tokens that stay.
        temperature: of the softmax over frames; the lower, the more goes to the most unusual frame.
        separators: ``"keep"``: newline tokens stay and count; ``"drop"``: they go first.
    """
    stage = Stage(BeforeLLM(), FrameOutliers(temperature, separators), TopK(stable=True), Drop(), Budget(keep))
    return PruningMethod("vidcom2", (stage,))


CARD = MethodCard(
    "vidcom2",
    vidcom2,
    "outliers of every frame, more of them in frames that are unlike the video",
    paper="arXiv:2505.14454",
    code="https://github.com/xuyang-liu16/VidCom2",
    modality="video",
    default_keep=0.25,
    golden=("vidcom2",),
)
