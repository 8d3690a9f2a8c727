"""What all models that are nothing but a vision tower (with or without a text tower beside it) share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vlprune.adapter import Adapter
from vlprune.adapters._block_parts import mlp_bounds, mlp_parts
from vlprune.adapters._patch_bypass import BypassEngine
from vlprune.adapters._vision_engine import AttentionTap, VisionEngine
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point, VisionLayer, VisionMiddle
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
    def bias_keys(self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a block, called without a mask, with ``bias`` (B, L) added to the logits onto its keys."""

    @abstractmethod
    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Hook what stands around the blocks: where a call begins and ends, recorded states, pooling."""

    @property
    def signals(self) -> frozenset[str]:
        """Kinds of signals that this tower can be asked for."""
        if not self.taps:
            return frozenset()
        return frozenset({"column_mean", "vision_keys"} | ({"cls_row", "cls_row_heads"} if self.has_cls else set()))

    @property
    def facts(self) -> ModelFacts:
        """Depth and signals; there is no decoder."""
        depth = len(self.blocks)
        return ModelFacts(
            vision_layers=depth, feature_layer=depth - 1, global_vision_layers=tuple(range(depth)), has_cls=self.has_cls, signals=self.signals
        )

    def points(self) -> list[str]:
        """The input of every block, and the middle where a norm, an MLP and a sum follow the attention."""
        numbers = range(len(self.blocks))
        middles = [VisionMiddle(layer).label for layer in numbers] if all(mlp_bounds(block) for block in self.blocks) else []
        return [*(VisionLayer(layer).label for layer in numbers), *middles]

    def offers(self, point: Point) -> frozenset[str]:
        """Signals of the blocks whose attention ran before the point."""
        return self.signals if point.tower == "vision" and point.order > (0, 0) else frozenset()

    def dimensions(self) -> dict[str, TowerShape]:
        """The tower's shape."""
        return {"vision": self.shape}

    def default_method(self) -> tuple[str, float]:
        """Drop once, a third of the way up, what CLS attends to least."""
        return "cls_attention", 0.7

    def bypass_layers(self) -> tuple[int, ...]:
        """All, where a norm, an MLP and a sum follow the attention."""
        return tuple(range(len(self.blocks))) if self.alone and all(mlp_parts(block) for block in self.blocks) else ()

    def attach(self, hooks: HookSet, pruner: Pruner) -> None:
        """Put everything on."""
        engine = BypassEngine(
            self.blocks, pruner, prefix=self.prefix, taps=self.taps, patches=self.patches, sequence_first=self.sequence_first,
            padding_masks=self.padding_masks, shape=self.shape, check=self.check, bias_keys=self.bias_keys, alone=self.alone,
        )  # fmt: skip
        engine.attach(hooks)
        if engine.acts:
            self.attach_tower(hooks, engine)
