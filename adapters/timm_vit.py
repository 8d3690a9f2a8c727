"""timm's VisionTransformer, and what derives from it (distilled DeiT). timm itself is never imported here.

Pooled outputs: ``pool`` is handed CLS, registers and the survivors, whatever it does with them (``avg``, ``max``, ``avgmax``,
``map``, ``prr``); token pooling and no pooling get everything. ``forward_features`` and ``forward_head`` may be called one after
the other: the survivors are remembered for the very tensor that ``forward_features`` returned, as long as it lives (also through
``detach``). Features that were copied or changed in between are pooled as they stand, over all their tokens.

``forward_intermediates`` returns full-length maps: a dropped patch shows the state that it had when it left.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vlprune.adapters import _attention
from vlprune.adapters._tower import TowerAdapter
from vlprune.adapters._vision_engine import AttentionTap, VisionEngine
from vlprune.errors import UnsupportedCallError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.protocols import gather_tokens

WHOLE = (None, "", "token")                                              # what pool does with these needs every token, or CLS alone


def is_timm_vit(module: Any) -> bool:
    """Whether this is timm's VisionTransformer or a class derived from it. Imports nothing."""
    return any(cls.__name__ == "VisionTransformer" and cls.__module__ == "timm.models.vision_transformer" for cls in type(module).__mro__)


class TimmVitAdapter(TowerAdapter):
    """timm vision transformers."""

    name = "timm_vit"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """By the module that the class comes from."""
        return is_timm_vit(model)

    @property
    def tower(self) -> Any:
        """The vision transformer."""
        return self.model

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks."""
        return list(self.tower.blocks)

    @property
    def has_cls(self) -> bool:
        """SigLIP-like and average-pooled ones may have none."""
        return getattr(self.tower, "cls_token", None) is not None

    @property
    def prefix(self) -> int:
        """CLS, distillation token and registers."""
        return int(self.tower.num_prefix_tokens)

    @property
    def patches(self) -> nn.Module | None:
        """The convolution of the patch embedding."""
        return getattr(self.tower.patch_embed, "proj", None)

    @cached_property
    def taps(self) -> list[AttentionTap]:
        """Blocks with one fused projection, with or without norms on queries and keys; not differential or parallel ones."""
        found = []
        for block in self.tower.blocks:
            attn: Any = getattr(block, "attn", None)
            if not isinstance(getattr(attn, "qkv", None), nn.Module) or hasattr(attn, "lambda_init"):
                return []
            found.append(AttentionTap(attn, partial(_query_key, attn), _attention.scale_of(attn, int(attn.head_dim))))
        return found

    @property
    def shape(self) -> TowerShape:
        """Read off the first block."""
        block, width = self.tower.blocks[0], int(self.tower.embed_dim)
        attn = getattr(block, "attn", None) or next((m for m in block.modules() if hasattr(m, "num_heads")), None)
        heads = int(getattr(attn, "num_heads", 1))
        mlp = getattr(block, "mlp", None)
        hidden, gated = _mlp_width(mlp) if mlp is not None else (4 * width, False)
        return TowerShape(len(self.blocks), width, heads, heads, int(getattr(attn, "head_dim", width // heads)), hidden, gated=gated)

    def check(self) -> None:
        """Checkpointing replays the hooks in backward, when the call is over."""
        refuse_checkpointing(self.tower, "model.set_grad_checkpointing(False)")

    def bias_keys(self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As the attention mask."""
        return args[:1], {**kwargs, "attn_mask": bias[:, None, None]}

    def attach_tower(self, hooks: HookSet, engine: VisionEngine) -> None:
        """Begin and end of a call, intermediates, pooling."""
        seen: Any = WeakTensorKeyDictionary()

        def note(output: Any) -> None:
            features = output[0] if isinstance(output, tuple) else output.get("image_features") if isinstance(output, dict) else output
            session = engine.session
            index = None if session is None else session.counted()
            if isinstance(features, Tensor) and index is not None:
                seen[features] = index

        def features(original: Any, *args: Any, **kwargs: Any) -> Any:
            with engine.scope():
                output = original(*args, **kwargs)
                note(output)
            return output

        def intermediates(original: Any, *args: Any, **kwargs: Any) -> Any:
            with engine.scope(recording=True):
                output = original(*args, **kwargs)
                note(output)
            return output

        def pool(original: Any, x: Tensor, pool_type: Any = None) -> Any:
            kind = self.tower.global_pool if pool_type is None else pool_type
            attentive = getattr(self.tower, "attn_pool", None) is not None
            index = None if kind in WHOLE and not attentive else _index_of(seen, x)
            return original(x if index is None else gather_tokens(x, index), *(() if pool_type is None else (pool_type,)))

        hooks.wrap(self.tower, "forward_features", features)
        hooks.wrap(self.tower, "forward_intermediates", intermediates)
        hooks.wrap(self.tower, "pool", pool)


def refuse_checkpointing(module: Any, remedy: str) -> None:
    """Raise if this call would be recomputed, hooks included, in backward."""
    if getattr(module, "grad_checkpointing", False) and torch.is_grad_enabled():
        raise UnsupportedCallError(
            f"gradient checkpointing of {type(module).__module__.partition('.')[0]} runs the blocks' hooks a second time in backward, when it is no longer "
            f"known which tokens stayed. Switch it off with {remedy}, or run under torch.no_grad()."
        )


def _query_key(attn: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    return _attention.project(attn, states, "q"), _attention.project(attn, states, "k")


def _mlp_width(mlp: nn.Module) -> tuple[int, bool]:
    """Hidden width and whether there is a gate (SwiGLU, packed or not)."""
    second: Any = getattr(mlp, "fc2", None)
    hidden = int(second.in_features) if second is not None else 0
    packed: Any = getattr(mlp, "fc1", None)
    return hidden, hasattr(mlp, "fc1_g") or (packed is not None and int(packed.out_features) == 2 * hidden)


def _index_of(seen: Any, x: Tensor) -> Tensor | None:
    """Survivors of features that `forward_features` returned: the same tensor, or one on the same memory."""
    if x in seen:
        return seen[x]  # type: ignore[no-any-return]
    for features, index in list(seen.items()):
        if features.shape == x.shape and features.data_ptr() == x.data_ptr() and features.device == x.device:
            return index  # type: ignore[no-any-return]
    return None


ADAPTERS = (TimmVitAdapter,)
