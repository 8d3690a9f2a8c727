"""open_clip: the vision transformer inside CLIP, CustomTextCLIP and CoCa, or alone; also timm towers inside them (SigLIP).

Pooled outputs: CLS pooling is right as it is; ``avg`` pooling and attention pooling are handed CLS and the survivors. Patch tokens
that a model returns besides (``output_tokens``) and intermediates have full length. open_clip itself is never imported here.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.adapters._tower import TowerAdapter
from vlprune.adapters._vision_engine import AttentionTap, VisionEngine
from vlprune.adapters.timm_vit import TimmVitAdapter, is_timm_vit, refuse_checkpointing
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet


def is_open_clip_vit(module: Any) -> bool:
    """Whether this is open_clip's VisionTransformer. Imports nothing."""
    return any(cls.__name__ == "VisionTransformer" and cls.__module__ == "open_clip.transformer" for cls in type(module).__mro__)


class OpenClipAdapter(TowerAdapter):
    """open_clip models with their own vision transformer."""

    name = "open_clip_vit"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """The tower itself, or a model that holds it as ``visual``."""
        return is_open_clip_vit(model) or is_open_clip_vit(getattr(model, "visual", None))

    @cached_property
    def tower(self) -> Any:
        """The vision transformer."""
        return self.model if is_open_clip_vit(self.model) else self.model.visual

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks."""
        return list(self.tower.transformer.resblocks)

    @property
    def sequence_first(self) -> bool:  # type: ignore[override]
        """Models from before ``batch_first`` run their blocks on (L, B, D)."""
        return not getattr(self.tower.transformer, "batch_first", False)

    @property
    def has_cls(self) -> bool:
        """Always there, whatever the pooling."""
        return True

    @property
    def prefix(self) -> int:
        """CLS."""
        return 1

    @property
    def patches(self) -> nn.Module | None:
        """The convolution of the patch embedding."""
        return self.tower.conv1  # type: ignore[no-any-return]

    @cached_property
    def taps(self) -> list[AttentionTap]:
        """Fused projections, read behind the first norm: a hook on `nn.MultiheadAttention` would cost its fast path."""
        found = []
        for block in self.tower.transformer.resblocks:
            attn = block.attn
            if getattr(attn, "in_proj_weight", None) is None or getattr(attn, "logit_scale", None) is not None:
                return []                                                # scaled cosine attention
            head_dim = attn.in_proj_weight.shape[1] // attn.num_heads
            found.append(AttentionTap(block.ln_1, partial(_query_key, attn), head_dim**-0.5, reads_output=True))
        return found

    @property
    def shape(self) -> TowerShape:
        """Read off the first block."""
        block: Any = self.tower.transformer.resblocks[0]
        width, heads = int(self.tower.transformer.width), int(block.attn.num_heads)
        return TowerShape(len(self.blocks), width, heads, heads, width // heads, int(block.mlp.c_proj.in_features), gated=False)

    def check(self) -> None:
        """Checkpointing replays the hooks in backward, when the call is over."""
        refuse_checkpointing(self.tower.transformer, "model.set_grad_checkpointing(False)")

    def bias_keys(self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As a mask (B H, L, L) in which all rows are one."""
        heads, length = int(self.tower.transformer.resblocks[0].attn.num_heads), bias.shape[1]
        return args[:1], {**kwargs, "attn_mask": bias.repeat_interleave(heads, dim=0)[:, None].expand(-1, length, -1)}

    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Begin and end of a call, intermediates, pooling."""

        def intermediates(original: Any, *args: Any, **kwargs: Any) -> Any:
            with engine.scope(recording=True):
                return original(*args, **kwargs)

        def average(original: Any, x: Tensor) -> Any:
            return original(engine.survivors(x))[0], original(x)[1]      # patch tokens that are returned stay complete

        hooks.before(self.tower, lambda module, args, kwargs: engine.enter())
        hooks.after(self.tower, lambda module, args, kwargs, output: engine.leave(), always=True)
        hooks.wrap(self.tower, "forward_intermediates", intermediates)
        pool = getattr(self.tower, "attn_pool", None)
        if isinstance(pool, nn.Module):
            parallel = getattr(self.tower, "attn_pool_type", "") == "parallel"       # "cascade" pools what the first one returned
            for module in (pool, self.tower.attn_pool_contrastive) if parallel else (pool,):
                hooks.before(module, lambda module, args, kwargs: ((engine.survivors(args[0]), *args[1:]), kwargs))
        elif self.tower.pool_type == "avg":
            hooks.wrap(self.tower, "_global_pool", average)


class OpenClipTimmAdapter(TimmVitAdapter):
    """open_clip models whose image tower is a timm vision transformer."""

    name = "open_clip_timm"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """A model that holds it as ``visual.trunk`` (or the wrapper around ``trunk``)."""
        if not type(model).__module__.startswith("open_clip."):
            return False
        return is_timm_vit(getattr(getattr(model, "visual", model), "trunk", None))

    @property
    def tower(self) -> Any:
        """The vision transformer."""
        holder: Any = getattr(self.model, "visual", self.model)
        return holder.trunk


def _query_key(attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """From the fused projection: `nn.MultiheadAttention`, or open_clip's own attention with its norms."""
    width = attn.in_proj_weight.shape[1]
    bias = attn.in_proj_bias
    projected = F.linear(states, attn.in_proj_weight[: 2 * width], None if bias is None else bias[: 2 * width])
    queries, keys = (part.reshape(*part.shape[:2], attn.num_heads, -1).transpose(1, 2) for part in projected.chunk(2, dim=-1))
    norm_q, norm_k = getattr(attn, "ln_q", None), getattr(attn, "ln_k", None)
    return (norm_q(queries) if norm_q is not None else queries), (norm_k(keys) if norm_k is not None else keys)


ADAPTERS = (OpenClipAdapter, OpenClipTimmAdapter)
