"""A-CLIP: while a vision tower trains, the patches that a teacher's CLS token attends to stay, in squares; nothing happens in evaluation.

Reference: "Attentive Mask CLIP", arXiv:2212.08653 (ICCV 2023). Official code: https://github.com/microsoft/A-CLIP

Convention: patches leave behind the position embeddings, at ``VisionLayer(0)``. Score: CLS attention of an averaged copy of the tower (EMA,
momentum 0.996), mean over heads and blocks; the best cells of 2 x 2 patches stay, 25 of 49, that is 100 of 196: ``keep=0.51``.

`AttentionRecord` makes a tower of its own the teacher:

    teacher, record = copy.deepcopy(model).eval(), AttentionRecord()
    watching = vlprune.apply(teacher, record.card)
    handle = vlprune.apply(model, "aclip", source=record)
    for pictures in loader:
        with torch.no_grad():
            teacher(pictures)                               # leaves the scores that the next step uses
        model(pictures) ... optimizer.step()
        ema_update(teacher, model)

Without ``source`` the model is its own teacher and needs no second pass: patches leave before block ``layer``, by the attention of the blocks
before it. ``when="always"`` drops in evaluation too.

Differences:
- The paper scores the whole picture once and cuts the map out for each augmented view. Here the teacher sees the view that the model sees, or
  ``source`` returns what it cut out itself.
- The recorded mean leaves out the teacher's last block, which runs after the point where scores are taken.
- The auxiliary losses (SimCLR, BYOL) and the second masked view are the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods.patchdropout import check_when
from vlprune.points import Depth, VisionLayer
from vlprune.protocols import ScoreInputs, Tap, gather_tokens
from vlprune.reducers import Drop
from vlprune.selectors import TopK
from vlprune.selectors.cell_topk import CellTopK

LAYER = Depth(4, of=12)
#: ``(inputs) -> (B, N)``: scores of all patches of the pictures that the model is about to see.
Source = Callable[[ScoreInputs], Tensor]


@dataclass(frozen=True)
class MeanSignal:
    """Mean of a signal over several blocks."""

    taps: tuple[Tap, ...]

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The signal of each block."""
        return self.taps

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return torch.stack([inputs.signal(tap) for tap in self.taps]).mean(dim=0)


@dataclass(frozen=True)
class Given:
    """Scores from outside, for all patches of an image; those of the patches still there are picked."""

    source: Source

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        scores, wanted = self.source(inputs), (inputs.tokens.shape[0], inputs.num_original or inputs.tokens.shape[1])
        if tuple(scores.shape) != wanted:
            raise OptionError(f"source gave scores of shape {tuple(scores.shape)}, but the model sees {wanted} (pictures, patches); score those")
        scores = scores.to(inputs.tokens.device)
        return scores if inputs.original is None else gather_tokens(scores, inputs.original)


class AttentionRecord:
    """Keeps the mean CLS attention of the tower that its ``card`` is applied to, for one use as ``source``."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None
        self.card = MethodCard("attention_record", self._build, "notes the mean CLS attention of a teacher", points=("vision:K",), modality="image")

    def _build(self, facts: ModelFacts, keep: Keep = 0.5) -> PruningMethod:
        last = facts.vision_layers - 1
        watch = _Watch(_attention(facts, last).taps, self)
        return PruningMethod("attention_record", (Stage(VisionLayer(last), watch, TopK(), Drop(), Budget(keep)),))

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); the teacher has to run again before the next use."""
        if self.scores is None:
            raise OptionError("the teacher has not run since its scores were used last: run it on the same pictures before the model")
        scores, self.scores = self.scores, None
        return scores


@dataclass(frozen=True)
class _Watch(MeanSignal):
    record: AttentionRecord

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        self.record.scores = super().__call__(inputs)
        return self.record.scores


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float = 0.996) -> None:
    """Move the teacher's weights towards the student's; its buffers become the student's."""
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs.to(mine), 1 - momentum)
    for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
        own.copy_(other)


def attentive_mask(
    facts: ModelFacts, keep: Keep = 0.51, *, source: Source | None = None, layer: int | None = None, side: int = 2, when: str = "training"
) -> PruningMethod:
    """Drop what a teacher's CLS token attends to least, in training.

    Args:
        facts: of the model.
        keep: share or number of an image's patches.
        source: function from `ScoreInputs` to scores (B, N) of the pictures at hand, such as an `AttentionRecord`; by default the attention
            of the model's own blocks before ``layer``.
        layer: vision block, counted from 0, before which patches leave; by default 0 with a source, else a third of the way up.
        side: rows and columns of the squares that stay or leave together; 1 for single patches.
        when: ``"training"``: nothing happens in evaluation; ``"always"``.
    """
    check_when(when)
    depth, lowest = facts.vision_layers, 0 if source is not None else 1
    if source is not None and not callable(source):
        raise OptionError(f"source={source!r}: a function from ScoreInputs to scores (B, N), such as vlprune.methods.aclip.AttentionRecord()")
    if layer is None:
        layer = 0 if source is not None else LAYER.resolve(depth)
    elif isinstance(layer, bool) or not isinstance(layer, int) or not lowest <= layer < max(depth, lowest + 1):
        first = "" if source is not None else " (one block must have attended; with `source`, 0 is possible)"
        raise OptionError(f"layer={layer!r}: from {lowest}{first} to {depth - 1}, the last vision block")
    scorer = Given(source) if source is not None else _attention(facts, layer)
    stage = Stage(VisionLayer(layer), scorer, CellTopK(side), Drop(), Budget(keep), training=True if when == "training" else None)
    return PruningMethod("aclip", (stage,))


def _attention(facts: ModelFacts, before: int) -> MeanSignal:
    """Mean over the blocks before block ``before``; a tower without CLS gives the attention received."""
    kind = "cls_row" if facts.has_cls else "column_mean"
    return MeanSignal(tuple(Tap(kind, block) for block in range(before)))


CARD = MethodCard(
    "aclip",
    attentive_mask,
    "squares of patches that a teacher's CLS attends to stay, in training only",
    paper="arXiv:2212.08653",
    code="https://github.com/microsoft/A-CLIP",
    points=("vision:K",),
    needs=("cls_row",),
    modality="image",
    default_keep=0.51,
    test_options={"when": "always"},
)
