"""PatchDropout: while a vision tower trains, every picture loses a random part of its patches at every step; nothing happens in evaluation.

Reference: "PatchDropout: Economizing Vision Transformers Using Patch Dropout", arXiv:2208.07220; the same in "Scaling Language-Image
Pre-training via Masking" (FLIP), arXiv:2212.00794. Code: https://github.com/huggingface/pytorch-image-models (`timm/layers/patch_dropout.py`),
https://github.com/mlfoundations/open_clip (`patch_dropout`)

Convention: patches leave behind the position embeddings, at ``VisionLayer(0)``. Their drop probability p is ``1 - keep``, and
``max(1, int(N * keep))`` patches stay. CLS and registers always stay. p between 0.5 and 0.75 trains two to three times as fast.

Training mode is that of the block (``model.train()``, ``model.eval()``). The draw differs by picture and by step; it is a sequence that
starts at ``seed`` when the method is applied, so give every process of a distributed run its own seed. Numbers are drawn on the CPU and
agree between devices.

With ``when="always"`` evaluation drops too, without randomness from call to call: one draw by seed for all pictures, as `random` does.

Differences:
- open_clip drops before the norm in front of its blocks, here it is behind it; the norm works patch by patch, so nothing changes.
- Survivors stay in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import VisionLayer
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

WHEN = ("training", "always")


@dataclass(frozen=True)
class FreshRandomScore:
    """Uniform random scores, drawn anew for every item and every call; only for stages that act in training."""

    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return torch.rand(inputs.tokens.shape[:2], generator=self.generator).to(inputs.tokens.device, non_blocking=True)


def patchdropout(facts: ModelFacts, keep: Keep = 0.5, *, seed: int = 0, when: str = "training") -> PruningMethod:
    """Drop random patches before the first block, in training.

    Args:
        facts: of the model (unused).
        keep: share or number of an image's patches.
        seed: where the sequence of draws starts.
        when: ``"training"``: nothing happens in evaluation; ``"always"``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed={seed!r}: an int is needed")
    check_when(when)
    point, budget = VisionLayer(0), Budget(keep, "floor")
    stages = [Stage(point, FreshRandomScore(seed), TopK(), Drop(), budget, training=True)]
    if when == "always":
        stages.append(Stage(point, RandomScore(seed), TopK(), Drop(), budget, training=False))
    return PruningMethod("patchdropout", tuple(stages))


def check_when(when: str) -> None:
    """An error for anything else."""
    if when not in WHEN:
        raise OptionError(f"when={when!r}: 'training' (nothing happens in evaluation) or 'always'")


CARD = MethodCard(
    "patchdropout",
    patchdropout,
    "random patches leave before the first block of a vision tower, in training only",
    paper="arXiv:2208.07220",
    code="https://github.com/huggingface/pytorch-image-models",
    points=("vision:K",),
    modality="image",
    equivariant=False,
    default_keep=0.5,
    test_options={"when": "always"},
)
