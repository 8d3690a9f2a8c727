"""DyCoke: thin out the frames of a video before the decoder, and look at fewer of the remaining keys at every decoded token.

Reference: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv:2411.15024 (CVPR 2025).
Official code: https://github.com/KD-TAO/DyCoke

Convention: stage 1 keeps the first of four frames whole and ``int((1 - k) * n)`` tokens of the others (`vlprune.scorers.frame_groups`), so
``keep = (1 + 3 * (1 - k)) / 4`` of a long video: the README's k=0.7 is 0.475, the default here (the code's own default, 0.3, is 0.775). Stage 2, the
paper's dynamic pruning at layer 3 with ratio p: decoder layers from 3 on (0-based; read as in the program, and not scaled with depth) attend to the
``int(n * (1 - p))`` visual keys with the largest head-mean attention of the new token in layer 2, plus all text; ``decode_keep`` is ``1 - p``. The
choice of the step before stays while the cosine of the two attention vectors is at least ``reuse`` (0.9). All keys remain in the cache.

Differences:
- Exactly ``keep`` of a video stays, spread evenly over the thinned frames; the program's count follows from k. Kept tokens are in raster order, the
  program's in order of similarity within a frame.
- Slips of the program are behind ``variant="code"``: the third frame of the last of T % 4 == 0 frames stays whole, and an odd last frame vanishes.
  It also fails for four frames or fewer.
- A choice that is reused is reused: in the program the layers below reset it, so that such a step sees every key. Tokens generated since are seen too,
  which its kept list forgets.
- With several videos in a prompt stage 2 chooses among the keys of all of them.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import DecodeSelect, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.reducers import Drop
from vlprune.scorers.frame_groups import FrameGroups
from vlprune.selectors import TopK

LAYER = 3
DECODE_KEEP = 0.3


def dycoke(
    facts: ModelFacts, keep: Keep = 0.475, *, variant: str = "paper", decode_keep: Keep | None = None, layer: int | None = None, reuse: float = 0.9
) -> PruningMethod:
    """Keep what changes within groups of four frames; while decoding, look at what the last token looks at.

    Args:
        facts: of the model.
        keep: share or number of a video's tokens that stay in the prompt.
        variant: ``"paper"``, or ``"code"`` with the program's slips at the end of a video.
        decode_keep: share or number of each video's remaining keys that a decoded token sees; by default 0.3, or with ``keep=1.0`` all (1.0: all).
        layer: decoder layer, counted from 0, from which on it sees those only; 3 unless the model is shallower.
        reuse: cosine with the attention of the step before from which on its choice stays.
    """
    depth = facts.decoder_layers
    if layer is None:
        layer = max(1, min(LAYER, depth - 1))
    elif isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < max(depth, 2):
        raise OptionError(f"layer={layer!r}: from 1 (one layer must have attended) to {depth - 1}, the last decoder layer")
    if isinstance(reuse, bool) or not isinstance(reuse, (int, float)) or not -1.0 <= reuse <= 1.01:
        raise OptionError(f"reuse={reuse!r}: a cosine; 0.9 as published, above 1 to choose at every step")
    budget = Budget(keep)
    if decode_keep is None:
        decode_keep = 1.0 if budget.is_everything else DECODE_KEEP
    looked_at = Budget(decode_keep, "floor")
    selects = () if looked_at.is_everything or depth < 2 else (DecodeSelect(layer, looked_at, layer - 1, reuse),)
    stage = Stage(BeforeLLM(), FrameGroups(variant), TopK(), Drop(), budget)
    return PruningMethod("dycoke", (stage,), decode_selects=selects)


CARD = MethodCard(
    "dycoke",
    dycoke,
    "video tokens that change within groups of four frames; while decoding, the keys that the last token looks at",
    paper="arXiv:2411.15024",
    code="https://github.com/KD-TAO/DyCoke",
    modality="video",
    default_keep=0.475,
    golden=("dycoke", "dycoke_decode"),
    test_options={"decode_keep": 1.0},      # dropping equals masking in stage 1; stage 2 has a law of its own (tests/test_decode_select.py)
)
