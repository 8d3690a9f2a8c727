"""What all models that are nothing but a vision tower (with or without a text tower beside it) share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import nn

from vlprune.adapter import Adapter
from vlprune.adapters._vision_engine import AttentionTap, VisionEngine
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point
from vlprune.pruner import Pruner


class TowerAdapter(Adapter):
    """Base of CLIP, SigLIP and ViT of transformers, open_clip and timm. Only the vision tower is pruned.

    Attributes:
        sequence_first: whether the blocks work on (L, B, D).
        padding_masks: whether a two-dimensional mask is (B, L) padding.
        alone: whether the tower is the whole model.
    """

    sequence_first: bool = False
    padding_masks: bool = False
    alone: bool = True

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Blocks of the tower, in order."""

    @property
    @abstractmethod
    def prefix(self) -> int:
        """Tokens in front of the patches (CLS, distillation, registers)."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether the first token is CLS."""

    @property
    @abstractmethod
    def taps(self) -> list[AttentionTap]:
        """Where the attention of each block can be read; empty if it cannot."""

    @property
    @abstractmethod
    def patches(self) -> nn.Module | None:
        """The convolution that cuts the picture."""

    @property
    @abstractmethod
    def shape(self) -> TowerShape:
        """Widths and depth."""

    @property
    def check(self) -> Callable[[], None] | None:
        """Called before the first block; raises if this call cannot be pruned."""
        return None

    @abstractmethod
    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Hook what stands around the blocks: where a call begins and ends, recorded states, pooling."""

    @property
    def signals(self) -> frozenset[str]:
        """Kinds of signals that this tower can be asked for."""
        if not self.taps:
            return frozenset()
        return frozenset({"column_mean", "vision_keys"} | ({"cls_row"} if self.has_cls else set()))

    @property
    def facts(self) -> ModelFacts:
        """Depth and signals; there is no decoder."""
        depth = len(self.blocks)
        return ModelFacts(
            vision_layers=depth, feature_layer=depth - 1, global_vision_layers=tuple(range(depth)), has_cls=self.has_cls, signals=self.signals
        )

    def points(self) -> list[str]:
        """The input of every block."""
        return [f"vision:{layer}" for layer in range(len(self.blocks))]

    def offers(self, point: Point) -> frozenset[str]:
        """Signals of the blocks before the point."""
        return self.signals if point.tower == "vision" and point.layer > 0 else frozenset()

    def dimensions(self) -> dict[str, TowerShape]:
        """The tower's shape."""
        return {"vision": self.shape}

    def default_method(self) -> tuple[str, float]:
        """Drop once, a third of the way up, what CLS attends to least."""
        return "cls_attention", 0.7

    def attach(self, hooks: HookSet, pruner: Pruner) -> None:
        """Put everything on."""
        engine = VisionEngine(
            self.blocks, pruner, prefix=self.prefix, taps=self.taps, patches=self.patches, sequence_first=self.sequence_first,
            padding_masks=self.padding_masks, shape=self.shape, check=self.check, alone=self.alone,
        )  # fmt: skip
        engine.attach(hooks)
        if engine.acts:
            self.attach_tower(hooks, engine)
