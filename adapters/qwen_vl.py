"""Qwen-VL: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE of Hugging Face transformers, images and videos.

The vision tower runs on patches of all pictures packed into one sequence (in Qwen2.5-VL permuted into windows), and merges
2 x 2 of them into a visual token afterwards. A signal of a visual token is the mean over its patches, in the order of the
features. An item is a whole image or a whole video; where timestamps stand between the frames of a video it is still one item.
Qwen3-VL adds features of earlier vision blocks behind the first decoder layers (DeepStack): they follow the surviving rows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._experts import expert_layers
from vlprune.adapters._projector import sensitivity
from vlprune.adapters._tower_sequence import TowerSequence
from vlprune.adapters._vision import ATTENTION_KINDS, CLS_KINDS, STATE_KINDS, VisionTaps
from vlprune.adapters._vlm import Features, VisionLanguageAdapter
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point
from vlprune.protocols import Tap
from vlprune.pruner import SURVIVES, Pruner
from vlprune.tokens import VisualItem, raster_grid

FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class QwenVLAdapter(VisionLanguageAdapter):
    """The Qwen-VL family."""

    name = "qwen_vl"
    vision_signals = frozenset((ATTENTION_KINDS | STATE_KINDS | {"pixels", "sensitivity"}) - CLS_KINDS)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._local = threading.local()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts."""
        kind = getattr(getattr(model, "config", None), "model_type", "")
        core = getattr(model, "model", model)
        return kind in FAMILY and hasattr(core, "visual") and hasattr(core, "language_model")

    @property
    def tower(self) -> nn.Module:
        """The vision tower with its merger."""
        return self.core.visual  # type: ignore[return-value]

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the vision tower."""
        return list(self.tower.blocks)  # type: ignore[arg-type]

    @property
    def merge(self) -> int:
        """Side of the square of patches that become one visual token."""
        return int(self.tower.spatial_merge_size)  # type: ignore[arg-type]

    @property
    def multimodal_rope(self) -> bool:
        """Position ids have time, height and width."""
        return True

    @property
    def facts(self) -> ModelFacts:
        """Depths; visual tokens are made from the last block. In Qwen2.5-VL only some blocks see the whole picture."""
        depth = len(self.blocks)
        whole = getattr(self.tower, "fullatt_block_indexes", None)
        return ModelFacts(
            decoder_layers=self.decoder_depth,
            vision_layers=depth,
            feature_layer=depth - 1,
            global_vision_layers=tuple(range(depth)) if whole is None else tuple(sorted(int(block) for block in whole)),
            has_cls=False,
            signals=self.vision_signals | self.offers_in_decoder,
            expert_layers=expert_layers(self.decoder),
        )

    def dimensions(self) -> dict[str, Any]:
        """Shapes of both towers; of a mixture of experts, what one token runs through."""
        text: Any = self.decoder.config
        vision: Any = self.tower.config
        first: Any = self.blocks[0]
        experts, ratio, width = getattr(text, "num_experts_per_tok", None), getattr(vision, "mlp_ratio", None), int(first.attn.dim)
        decoder = TowerShape(
            layers=self.decoder_depth,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            hidden=experts * text.moe_intermediate_size if experts else text.intermediate_size,
            vocabulary=text.vocab_size,
        )
        tower = TowerShape(
            layers=len(self.blocks),
            width=width,
            heads=vision.num_heads,
            kv_heads=vision.num_heads,
            head_dim=width // vision.num_heads,
            hidden=int(width * ratio) if ratio else vision.intermediate_size,
            gated=hasattr(first.mlp, "gate_proj"),
        )
        return {"decoder": decoder, "vision": tower}

    def points(self) -> list[str]:
        """Also the blocks of the tower."""
        return [*(f"vision:{layer}" for layer in range(len(self.blocks))), *super().points()]

    def offers(self, point: Point) -> frozenset[str]:
        """In the tower what earlier blocks give; the merger stands behind it."""
        if point.tower == "vision":
            return self.vision_signals - {"sensitivity"} if point.layer > 0 else frozenset({"pixels"})
        return super().offers(point)

    # hooks

    def attach(self, hooks: HookSet, pruner: Pruner) -> None:
        """Also lead DeepStack's features to the surviving rows."""
        super().attach(hooks, pruner)
        if hasattr(self, "engine") and hasattr(self.decoder, "_deepstack_process"):
            hooks.wrap(self.decoder, "_deepstack_process", self._deepstack)

    def attach_vision(self, hooks: HookSet, pruner: Pruner) -> None:
        """Tap the tower, and note what it is given."""
        VisionTaps([block.attn for block in self.blocks], pruner, self._query_key, self.blocks).attach(hooks)  # type: ignore[misc]
        hooks.before(self.tower, self._before_tower)
        for tap in pruner.taps("vision"):
            if tap.kind == "pixels":
                hooks.before(self.tower, self._pixels_hook(tap))
            elif tap.kind == "sensitivity":
                hooks.before(self.tower.merger, self._sensitivity_hook(tap))  # type: ignore[arg-type]
        if hasattr(self.tower, "fullatt_block_indexes"):
            hooks.wrap(self.tower, "permute_input_for_window_attn", self._note_windows)

    def attach_tower(self, hooks: HookSet, pruner: Pruner) -> None:
        """Taps and stages; the features of blocks that DeepStack reads must be complete."""
        self.attach_vision(hooks, pruner)
        tower: Any = self.tower
        TowerSequence(
            self.blocks, pruner, merge=self.merge**2, items=self._tower_items, full=getattr(tower, "deepstack_visual_indexes", ()),
            shape=self.dimensions()["vision"], backend=lambda: str(tower.config._attn_implementation),
        ).attach(hooks, tower)  # fmt: skip

    def _tower_items(self) -> list[VisualItem]:
        """What the tower is about to run on, with places in its own order of tokens."""
        windows: Tensor | None = self.pruner.vision.get("windows")
        shapes = [(t, h // self.merge, w // self.merge) for t, h, w in self.pruner.vision["grid"]]
        places = torch.arange(sum(t * h * w for t, h, w in shapes)) if windows is None else windows.argsort()
        modality = getattr(self._local, "encoding", "") or "image"
        parts = torch.split(places, [t * h * w for t, h, w in shapes])
        return [VisualItem(0, part, modality, number, raster_grid(*shape)) for number, (part, shape) in enumerate(zip(parts, shapes, strict=True))]

    def _around_features(self, modality: str) -> Any:
        """Qwen3-VL encodes videos by calling its own ``get_image_features``: that inner call is part of the video."""
        around = super()._around_features(modality)

        def outermost(original: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "encoding", ""):
                return original(*args, **kwargs)
            self._local.encoding = modality
            try:
                return around(original, *args, **kwargs)
            finally:
                self._local.encoding = ""

        return outermost

    def _before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grids before anything heavy is queued."""
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        self.pruner.vision["grid"] = grid.tolist()

    def _pixels_hook(self, tap: Tap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            self.pruner.vision["whole", tap] = given.float().unflatten(0, (-1, self.merge**2)).mean(dim=1)     # in the features' order already

        return hook

    def _sensitivity_hook(self, tap: Tap) -> Callable[..., Any]:
        """The merger takes the patches of a token side by side; its norm stands before its two layers."""

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            block: Any = self.blocks[0]
            patches = (args[0] if args else kwargs["x"]).reshape(1, -1, self.merge**2 * block.norm1.weight.shape[0])
            norm: Any = getattr(module, "ln_q", None) or module.norm

            def prepare(x: Tensor) -> Tensor:
                single = x.reshape(-1, norm.weight.shape[0])
                return norm(single.to(norm.weight.dtype)).reshape(x.shape)  # type: ignore[no-any-return]

            def merge(x: Tensor, module: nn.Module = module) -> Tensor:
                return module.forward(x.reshape(-1, patches.shape[-1] // self.merge**2)).reshape(*x.shape[:-1], -1)  # type: ignore[no-any-return]

            with self.pruner.timed():
                values, flops = sensitivity(module, patches, tap.options, prepare, merge)
            self.pruner.vision["tokens", tap] = values[0]
            self.pruner.vision["flops"] = self.pruner.vision.get("flops", 0.0) + flops

        return hook

    def _note_windows(self, original: Callable[..., Any], tensor: Tensor, window_index: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.pruner.vision["windows"] = window_index
        return original(tensor, window_index, *args, **kwargs)

    # signals

    def _query_key(self, attn: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, list[int] | None]:
        """Rotated (1, H, S, d) queries and keys with the lengths of the segments; segments of equal length become a batch."""
        projected: Tensor = attn.qkv(states).reshape(states.shape[0], 3, attn.num_heads, -1)  # type: ignore[operator]
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
        cos, sin = kwargs["position_embeddings"]
        queries, keys = rotate(projected[:, 0], projected[:, 1], cos, sin)  # (S, H, d)
        lengths = self._segments(kwargs["cu_seqlens"])
        if len(set(lengths)) == 1:
            queries, keys = (part.reshape(-1, lengths[0], *part.shape[1:]).transpose(1, 2) for part in (queries, keys))
            return queries, keys, None
        return queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], lengths

    def _segments(self, bounds: Tensor) -> list[int]:
        """Lengths of the segments, read once for all blocks that share them."""
        known = self.pruner.vision.setdefault("segments", {})
        if id(bounds) not in known:
            known[id(bounds)] = (bounds.diff().tolist(), bounds)  # the tensor keeps its id taken
        return known[id(bounds)][0]  # type: ignore[no-any-return]

    def _per_token(self, values: Tensor) -> Tensor:
        """(segments, patches) or (segments, patches, C) in the tower's order to (tokens,) or (tokens, C) in the features' order."""
        return self._unpermuted(values.reshape(-1, self.merge**2, *values.shape[2:]).float().mean(dim=1))

    def _unpermuted(self, tokens: Tensor) -> Tensor:
        """From the tower's order to the features'."""
        windows: Tensor | None = self.pruner.vision.get("windows")
        return tokens if windows is None else tokens[windows.argsort().to(tokens.device, non_blocking=True)]

    def features_of(self, modality: str, output: Any, arguments: dict[str, Any], signals: dict[Tap, Tensor]) -> Features:
        """One item per row of the grid, frames of a video included."""
        grid: list[tuple[int, int, int]] = self.pruner.vision["grid"]
        shapes = [(t, h // self.merge, w // self.merge) for t, h, w in grid]
        lengths = [t * h * w for t, h, w in shapes]
        found = Features(
            lengths,
            [raster_grid(*shape) for shape in shapes],
            patches=sum(t * h * w for t, h, w in grid),
            segments=sum(t for t, _, _ in grid),
        )
        for tap, values in signals.items():
            if isinstance(tap, Tap):
                found.signals[tap] = list(torch.split(self._per_token(values), lengths))
            elif isinstance(tap, tuple) and isinstance(tap[1], Tap):
                found.signals[tap[1]] = list(torch.split(values if tap[0] == "whole" else self._unpermuted(values), lengths))
        session = self.pruner.vision.get("session")
        if session is not None and session.index is not None:
            stays = torch.zeros(sum(lengths), device=session.device).index_fill(0, session.index[0], 1.0)
            found.signals[SURVIVES] = list(torch.split(self._unpermuted(stays), lengths))
        return found

    # decoder

    def _deepstack(self, original: Callable[..., Any], hidden: Tensor, mask: Tensor, embeds: Tensor) -> Any:
        """Add each surviving visual token its own feature. ``mask`` is (B, L), ``embeds`` (visual tokens, D), both of the full prompt."""
        session = self.pruner.session
        restored = session is not None and len(session.trace.decoder_lengths) == self.decoder_depth  # behind the last layer
        if session is None or session.index is None or restored:
            return original(hidden, mask, embeds)

        def add(states: Tensor, index: Tensor | None) -> Tensor:
            if index is None:
                return original(states, mask, embeds)  # type: ignore[no-any-return]
            key = ("deepstack", id(index))
            if key not in session.memo:
                here = mask.to(index.device)
                number = (here.flatten().cumsum(0) - 1).clamp(min=0).reshape(here.shape)  # of each visual token in ``embeds``
                session.memo[key] = (torch.gather(here, 1, index), torch.gather(number, 1, index), index)
            visual, number = (part.to(states.device) for part in session.memo[key][:2])  # (B, Lc)
            return torch.where(visual[..., None], states + embeds.to(states.device, states.dtype)[number], states)

        for cut in session.cuts:
            if cut.restore is not None:  # rows that only skip a few layers do not miss what is added between them
                cut.before = add(cut.before, cut.undo[0])
        return add(hidden, session.index)


ADAPTERS = (QwenVLAdapter,)
