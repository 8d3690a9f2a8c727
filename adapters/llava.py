"""LLaVA: LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision of Hugging Face transformers.

Tiles, newline tokens and pooled frames: vision signals take the road of the features. Where the model packs tiles or pools
frames, its own function runs a second time on the signals, so every visual token knows its score whatever the packing. An item
is a whole image (all its tiles and newlines) or a whole video; newline tokens carry the lowest score of their image.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._experts import expert_layers
from vlprune.adapters._packed_tower import Cells, PackedTower, halved, strided
from vlprune.adapters._projector import sensitivity
from vlprune.adapters._vision import ATTENTION_KINDS, CLS_KINDS, STATE_KINDS, VisionTaps
from vlprune.adapters._vision_engine import VisionEngine
from vlprune.adapters._vlm import Features, VisionLanguageAdapter, item_lengths, modules_named
from vlprune.adapters.clip import ClipAdapter
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point, parse_point
from vlprune.protocols import Tap
from vlprune.pruner import SURVIVES, Pruner
from vlprune.tokens import VisualItem, raster_grid, square_grid


class InnerTower(ClipAdapter):
    """A tower inside a larger model."""

    alone = False
    engine: VisionEngine

    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Remember the engine."""
        super().attach_tower(hooks, engine)
        self.engine = engine


class LlavaAdapter(VisionLanguageAdapter):
    """The LLaVA family."""

    name = "llava"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """LLaVA-1.5, NeXT, NeXT-Video and OneVision."""
        kind = getattr(getattr(model, "config", None), "model_type", "")
        return kind in ("llava", "llava_next", "llava_next_video", "llava_onevision") and hasattr(getattr(model, "model", model), "vision_tower")

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the vision tower."""
        encoder = modules_named(self.core.vision_tower, ("encoder", "vision_model.encoder"))  # type: ignore[arg-type]
        return list(encoder.layers) if encoder is not None and hasattr(encoder, "layers") else []  # type: ignore[arg-type]

    @property
    def has_cls(self) -> bool:
        """CLIP towers carry a CLS token, SigLIP towers do not."""
        return any(name.endswith("class_embedding") for name, _ in self.core.vision_tower.named_parameters())  # type: ignore[union-attr]

    @property
    def vision_signals(self) -> frozenset[str]:  # type: ignore[override]
        """What this tower can be asked."""
        if not self.blocks:
            return frozenset()
        kinds = ATTENTION_KINDS | STATE_KINDS | {"pixels"} | ({"sensitivity"} if self.projector is not None else set())
        return frozenset(kinds if self.has_cls else kinds - CLS_KINDS)

    @property
    def projector(self) -> nn.Module | None:
        """Features of the tower to visual tokens."""
        found = getattr(self.core, "multi_modal_projector", None)
        return found if isinstance(found, nn.Module) else None

    @property
    def patches(self) -> nn.Module | None:
        """The convolution that cuts the picture."""
        embeddings = modules_named(self.core.vision_tower, ("embeddings", "vision_model.embeddings"))  # type: ignore[arg-type]
        return getattr(embeddings, "patch_embedding", None)

    @property
    def facts(self) -> ModelFacts:
        """Depths; the feature layer is the block whose output LLaVA projects."""
        depth = len(self.blocks)
        chosen = getattr(self.model.config, "vision_feature_layer", -1)
        chosen = chosen[-1] if isinstance(chosen, (list, tuple)) else chosen
        feature = chosen + depth if chosen < 0 else chosen - 1                           # hidden_states[i] leaves block i - 1
        return ModelFacts(
            decoder_layers=self.decoder_depth,
            vision_layers=depth,
            feature_layer=min(max(feature, 0), max(depth - 1, 0)),
            global_vision_layers=tuple(range(depth)),
            has_cls=self.has_cls,
            signals=self.vision_signals | self.offers_in_decoder,
            expert_layers=expert_layers(self.decoder),
        )

    def dimensions(self) -> dict[str, Any]:
        """Widths of both towers; CLIP and SigLIP have no gate."""
        config = self.model.config.vision_config
        heads, width = config.num_attention_heads, config.hidden_size
        tower = TowerShape(len(self.blocks), width, heads, heads, width // heads, config.intermediate_size, gated=False)
        return {**super().dimensions(), "vision": tower}

    @cached_property
    def inner(self) -> InnerTower | None:
        """The tower as a model of its own, where it can be cut inside: CLIP and SigLIP, each feature one visual token."""
        tower: Any = self.core.vision_tower
        return InnerTower(tower) if InnerTower.matches(tower) and self.model.config.model_type in ("llava", "llava_next") else None

    @cached_property
    def video_tower(self) -> InnerTower | None:
        """The same for videos, whose frames are pooled: several features one visual token."""
        tower: Any = self.core.vision_tower
        return InnerTower(tower) if InnerTower.matches(tower) and self.model.config.model_type in ("llava_next_video", "llava_onevision") else None

    def points(self) -> list[str]:
        """Also the blocks of the tower up to the feature layer."""
        tower = self.inner or self.video_tower
        inside = [] if tower is None else [label for label in tower.points() if parse_point(label).layer <= self.facts.feature_layer]
        return [*inside, *super().points()]

    def offers(self, point: Point) -> frozenset[str]:
        """In the tower what it has."""
        if point.tower == "vision":
            videos = frozenset({"patch_states"} if self.video_tower is not None else ())
            return videos if self.inner is None else self.inner.offers(point)
        return super().offers(point)

    def attach_tower(self, hooks: HookSet, pruner: Pruner) -> None:
        """The tower's own engine, which collects the signals; what survived it goes the road of the features."""
        if self.video_tower is not None and any(stage.video is not None for stage in pruner.method.stages):
            self._attach_video_tower(hooks, pruner, self.video_tower)
            return
        if self.inner is None:
            super().attach_tower(hooks, pruner)
        assert self.inner is not None
        self.inner.attach(hooks, pruner)

        def hand_over(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            session = self.inner.engine.session  # type: ignore[union-attr]
            if session is None:
                return
            stays = torch.ones(session.original.shape, device=session.device)
            mask = stays.new_zeros(stays.shape[0], session.num_original).scatter(1, session.original, stays)
            signals = {tap: values for tap, values in session.signals.items() if isinstance(tap, Tap)}
            for tap, values in {**signals, SURVIVES: mask}.items():
                front = values.new_ones(values.shape[0], session.prefix, *values.shape[2:])
                pruner.vision[tap] = torch.cat([front, values], dim=1)
            pruner.vision["session"] = session

        hooks.after(self.blocks[-1], hand_over)
        self._attach_road(hooks, pruner)

    def _attach_video_tower(self, hooks: HookSet, pruner: Pruner, tower: InnerTower) -> None:
        """Stages over the frames of a video."""
        config, onevision = self.model.config, self.model.config.model_type == "llava_onevision"
        tower_config: Any = tower.tower.config

        def cells(patches: int) -> Cells:
            side = math.isqrt(patches)
            return halved(side) if onevision else strided(side, int(config.spatial_pool_stride))

        engine = PackedTower(
            tower.blocks, pruner, prefix=tower.prefix, cells=cells, shape=tower.shape, backend=lambda: str(tower_config._attn_implementation)
        )
        engine.attach(hooks)
        tower.attach_tower(hooks, engine)  # type: ignore[arg-type]
        hooks.wrap(self.core, "get_video_features", engine.videos)
        self._attach_road(hooks, pruner)

    def attach_vision(self, hooks: HookSet, pruner: Pruner) -> None:
        """Tap the tower, and send the signals through the packing."""
        VisionTaps([block.self_attn for block in self.blocks], pruner, blocks=self.blocks).attach(hooks)  # type: ignore[misc]
        self._attach_road(hooks, pruner)

    def _attach_road(self, hooks: HookSet, pruner: Pruner) -> None:
        """Signals made elsewhere, and the packing."""
        for tap in pruner.taps("vision"):
            if tap.kind == "pixels" and self.patches is not None:
                hooks.before(self.patches, self._pixels_hook(tap))
            elif tap.kind == "sensitivity" and self.projector is not None:
                hooks.after(self.projector, self._sensitivity_hook(tap))
        hooks.after(self.core.vision_tower, self._note_tower)  # type: ignore[arg-type]
        if hasattr(self.core, "pack_image_features"):
            hooks.wrap(self.core, "pack_image_features", self._pack_signals)
        if hasattr(self.core, "apply_pooling"):
            hooks.wrap(self.core, "apply_pooling", self._pool_signals)
        if isinstance(getattr(self.core, "vision_resampler", None), nn.Module):
            hooks.wrap(self.core.vision_resampler, "forward", self._pool_signals)

    def _pixels_hook(self, tap: Tap) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            patches = torch.nn.functional.unfold(args[0].float(), module.kernel_size, stride=module.stride).mT     # (tiles, P, 3 p p)
            self.pruner.vision[tap] = torch.nn.functional.pad(patches, (0, 0, int(self.has_cls), 0))

        return hook

    def _sensitivity_hook(self, tap: Tap) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with self.pruner.timed():
                values, flops = sensitivity(module, args[0] if args else kwargs["image_features"], tap.options)
            if "pooled" in self.pruner.vision:                           # the projector stands behind the pooling: these are the tokens' own
                widths, channels = self.pruner.vision.get("packed", ([], torch.ones_like(values[..., None])))
                self.pruner.vision["packed"] = ([(tap, 1), *widths], torch.cat([values[..., None], channels], dim=-1))
            else:
                skip = self.pruner.vision["tower"][1] - values.shape[1]
                self.pruner.vision[tap] = torch.nn.functional.pad(values, (skip, 0))
            self.pruner.vision["flops"] = self.pruner.vision.get("flops", 0.0) + flops

        return hook

    def _note_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        self.pruner.vision["tower"] = (int(states.shape[0]), int(states.shape[1]))

    def _tokens_only(self) -> dict[Tap, Tensor]:
        """Signals without the CLS column: (tiles, P) or (tiles, P, C)."""
        skip = 1 if self.has_cls and getattr(self.model.config, "vision_feature_select_strategy", "default") == "default" else 0
        return {tap: values[:, skip:] for tap, values in self.pruner.vision.items() if isinstance(tap, Tap)}

    def _stacked(self) -> tuple[list[tuple[Tap, int]], Tensor | None]:
        """All signals as channels (tiles, P, C) with a last channel of ones, and how many channels each has."""
        signals = self._tokens_only()
        widths = [(tap, 1 if values.dim() == 2 else values.shape[2]) for tap, values in signals.items()]
        if not signals:
            return [], None
        parts = [values if values.dim() == 3 else values[..., None] for values in signals.values()]
        return widths, torch.cat([*parts, torch.ones_like(parts[0][..., :1])], dim=-1)

    def _pack_signals(self, original: Any, image_features: Any, *args: Any, **kwargs: Any) -> Any:
        packed = original(image_features, *args, **kwargs)
        ones = [torch.ones(*feature.shape[:2], 1) for feature in image_features]         # on the CPU: where separators come to stand
        flags, _ = original(ones, *args, **{**kwargs, "image_newline": torch.zeros(1)})
        self.pruner.vision["separators"] = [flag.flatten() < 0.5 for flag in flags]
        widths, stacked = self._stacked()
        if stacked is not None:
            tiles = stacked.split([feature.shape[0] for feature in image_features])
            newline = kwargs.get("image_newline")
            if newline is not None:
                kwargs = {**kwargs, "image_newline": torch.zeros(stacked.shape[-1], device=stacked.device)}
            with torch.no_grad():
                signals, _ = original(tiles, *args, **kwargs)
            self.pruner.vision["packed"] = (widths, list(signals))
        return packed

    def _pool_signals(self, original: Any, features: Tensor) -> Any:
        pooled = original(features)
        self.pruner.vision["pooled"] = True
        widths, stacked = self._stacked()
        if stacked is not None:
            with torch.no_grad():
                self.pruner.vision["packed"] = (widths, original(stacked))               # (frames, p, C)
        return pooled

    def features_of(self, modality: str, output: Any, arguments: dict[str, Any], signals: dict[Tap, Tensor]) -> Features:
        """Items and their signals, in the order of the packed tokens."""
        lengths = item_lengths(output)
        pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))     # the second name in transformers 5.17
        frames = int(pixels.shape[1]) if modality == "video" and isinstance(pixels, Tensor) else 1
        packed = self.pruner.vision.get("packed")
        segments, tokens = self.pruner.vision.get("tower", (0, 0))
        separators = self.pruner.vision.get("separators") or [None] * len(lengths)
        grids = [
            self._video_grid(length, frames) if modality == "video" else self._image_grid(length, separator)
            for length, separator in zip(lengths, separators, strict=True)
        ]
        if packed is None:
            plain = self._tokens_only()
            alone = self.model.config.model_type == "llava"                              # one feature is one token, and that is all
            project = self.projector.forward if alone and self.projector is not None else None   # not the call: no hooks
            return Features(lengths, grids, {tap: list(values) for tap, values in plain.items()}, segments * tokens, segments, project=project)
        widths, channels = packed
        if isinstance(channels, Tensor):                                                 # frames of all videos, pooled
            items = list(channels.reshape(len(lengths), -1, channels.shape[-1]))
        else:
            items = [part.reshape(-1, part.shape[-1]) for part in channels]
        items = [torch.cat([part, part.new_zeros(length - part.shape[0], part.shape[1])]) for part, length in zip(items, lengths, strict=True)]
        found = Features(lengths, grids, {}, segments * tokens, segments)
        start = 0
        for tap, width in widths:
            found.signals[tap] = [_fill_separators(part[:, start : start + width], part[:, -1]) for part in items]
            start += width
        return found

    def _items(self, modality: str, mask: Tensor, output: Any, found: Features) -> list[tuple[VisualItem, Features, int]]:
        """Transformers 5.17 appends the newline of a OneVision video after encoding: one separator more an item."""
        lengths = item_lengths(output)
        if modality == "video" and int(mask.sum()) == sum(lengths) + len(lengths):
            newline = torch.tensor([[0, -1, -1]])
            grids = [None if grid is None else torch.cat([grid, newline]) for grid in found.grids]
            signals = {tap: [torch.cat([part, part.amin(dim=0, keepdim=True)]) for part in parts] for tap, parts in found.signals.items()}
            found = replace(found, lengths=[length + 1 for length in found.lengths], grids=grids, signals=signals)
            output = [torch.empty(length + 1, 1, device="meta") for length in lengths]
        return super()._items(modality, mask, output, found)

    @staticmethod
    def _video_grid(length: int, frames: int) -> Tensor | None:
        """Frame, row and column; a newline at the end is a separator (row and column -1)."""
        per_frame, extra = divmod(length, frames)
        grid = square_grid(per_frame * frames, frames)
        return None if grid is None else torch.cat([grid, torch.tensor([[frames - 1, -1, -1]]).expand(extra, -1)])

    def _image_grid(self, length: int, separator: Tensor | None) -> Tensor | None:
        """The base tile is frame 0, the mosaic of tiles frame 1; newlines are separators (row and column -1)."""
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        base = raster_grid(1, side, side)
        if length == side * side:
            return base
        if separator is None or not bool(separator[-1]):
            return None
        mosaic = separator[side * side :]
        if mosaic.numel() == 1:
            return torch.cat([base, torch.tensor([[0, -1, -1]])])
        width = int(torch.nonzero(mosaic)[0]) + 1
        grid = raster_grid(1, mosaic.numel() // width, width)
        grid[:, 0] = 1
        grid[mosaic, 1:] = -1
        return torch.cat([base, grid])


def _fill_separators(values: Tensor, real: Tensor) -> Tensor:
    """Give separators (where ``real`` is 0) the lowest value of their item, or zeros if it is a vector; drop a channel axis of one."""
    lowest = values.masked_fill(real[:, None] < 0.5, float("inf")).amin(dim=0) if values.shape[1] == 1 else torch.zeros_like(values[0])
    filled = torch.where(real[:, None] < 0.5, lowest, values)
    return filled[:, 0] if filled.shape[1] == 1 else filled


ADAPTERS = (LlavaAdapter,)
