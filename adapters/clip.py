"""CLIP, SigLIP and ViT of Hugging Face transformers: the vision tower alone; a text tower beside it is untouched.

`CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`, `CLIPForImageClassification`, the same of SigLIP (SigLIP 2 in its
fixed-resolution form loads as SigLIP; `Siglip2Model` packs pictures of different sizes and is not served), `ViTModel` and its heads.

Pooled outputs: CLIP and ViT read CLS, which never leaves. SigLIP's attention head is handed the survivors, and so are the image
classifiers of CLIP and SigLIP, which average over the tokens of ``last_hidden_state`` inside their own forward.
"""

from __future__ import annotations

import threading
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.adapters._tower import TowerAdapter
from vlprune.adapters._vision_engine import AttentionTap, VisionEngine
from vlprune.errors import UnsupportedCallError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet

KINDS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit")
AVERAGING = ("CLIPForImageClassification", "SiglipForImageClassification")


def tower_of(model: nn.Module) -> nn.Module | None:
    """The module that embeds the picture and loops over the blocks."""
    module: Any = model
    while isinstance(module, nn.Module):
        if isinstance(getattr(module, "embeddings", None), nn.Module):
            return module
        module = getattr(module, "vision_model", None) or getattr(module, "vit", None)
    return None


class ClipAdapter(TowerAdapter):
    """The CLIP, SigLIP and ViT families of transformers."""

    name = "clip"
    padding_masks = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Models with such a vision tower and nothing behind it but heads."""
        return getattr(getattr(model, "config", None), "model_type", "") in KINDS and tower_of(model) is not None

    @cached_property
    def tower(self) -> nn.Module:
        """The vision tower."""
        tower = tower_of(self.model)
        assert tower is not None
        return tower

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the tower."""
        holder = getattr(self.tower, "encoder", self.tower)
        return list(getattr(holder, "layers", None) or holder.layer)  # type: ignore[arg-type]

    @property
    def has_cls(self) -> bool:
        """CLIP and ViT carry CLS, SigLIP does not."""
        embeddings: Any = self.tower.embeddings
        return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")

    @property
    def prefix(self) -> int:
        """CLS, if there is one."""
        return int(self.has_cls)

    @property
    def patches(self) -> nn.Module | None:
        """The convolution of the patch embedding."""
        embeddings: Any = self.tower.embeddings
        module = getattr(embeddings, "patch_embedding", None) or getattr(embeddings, "patch_embeddings", None)
        return getattr(module, "projection", module)

    @property
    def taps(self) -> list[AttentionTap]:
        """Separate query and key projections in every block."""
        found = []
        for block in self.blocks:
            attn: Any = getattr(block, "self_attn", None) or getattr(block, "attention", None)
            attn = attn if hasattr(attn, "q_proj") else getattr(attn, "attention", None)             # one level deeper before 5.20
            if attn is None:
                return []
            found.append(AttentionTap(attn, partial(_query_key, attn), _attention.scale_of(attn, int(attn.head_dim))))
        return found

    @property
    def shape(self) -> TowerShape:
        """From the tower's config."""
        config: Any = self.tower.config
        heads = int(config.num_attention_heads)
        return TowerShape(
            len(self.blocks), int(config.hidden_size), heads, heads, int(config.hidden_size) // heads, int(config.intermediate_size), gated=False
        )

    def bias_keys(self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the attention mask, second or by name."""
        config: Any = self.tower.config
        if "flash" in str(config._attn_implementation):
            raise UnsupportedCallError(
                "attention that counts merged tokens by their size adds to its logits, which flash attention does not take. Load the model with "
                "attn_implementation='sdpa', or switch the counting off where the method has an option for it (proportional=False)."
            )
        mask = bias[:, None, None]
        return ((args[0], mask, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "attention_mask": mask})

    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Begin and end of a call, recorded states, heads that read every token."""
        averages = threading.local()
        config: Any = self.tower.config

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
                raise UnsupportedCallError("output_attentions=True would return maps of different sizes by block; remove the pruning to look at attention maps")
            engine.enter()

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            try:
                return None if output is None else _full_output(engine, output, survivors_only=getattr(averages, "now", False))
            finally:
                engine.leave()

        hooks.before(self.tower, before)
        hooks.after(self.tower, after, always=True, first=True)
        head = getattr(self.tower, "head", None)
        if isinstance(head, nn.Module):
            hooks.before(head, lambda module, args, kwargs: ((engine.survivors(args[0]), *args[1:]), kwargs))
        if type(self.model).__name__ in AVERAGING:

            def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
                averages.now = True

            def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                averages.now = False

            hooks.before(self.model, begin)
            hooks.after(self.model, end, always=True)


def _query_key(attn: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    return _attention.project(attn, states, "q"), _attention.project(attn, states, "k")


def _full_output(engine: VisionEngine, output: Any, *, survivors_only: bool) -> Any:
    """Recorded states at full length. ``survivors_only``: the caller averages over ``last_hidden_state`` and shows it to nobody."""
    if isinstance(output, tuple):                                        # return_dict=False
        return tuple(engine.full_states(part) if isinstance(part, tuple) else part for part in output)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = engine.full_states(output.hidden_states)
    if survivors_only:
        output.last_hidden_state = engine.survivors(output.last_hidden_state)
    return output


ADAPTERS = (ClipAdapter,)
