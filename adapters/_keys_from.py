"""Keys and values of a layer made of what an earlier block was given (`vlprune.method.KeysFrom`), in prompts and while decoding.

The states are noted at the input of the earlier block, for the tokens of the call. What the layer's own attention projects is thrown away where it
computed any; the cache gets the others, and a layer that shares those of a lower one keeps the same tensors, not a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.adapters._cache import PrunedLayer
from vlprune.adapters._decoder_taps import attention_of
from vlprune.adapters._kv_fill import Filled, KeysValues
from vlprune.errors import UnsupportedPointError
from vlprune.hooks import HookSet
from vlprune.method import KeysFrom
from vlprune.pruner import Pruner


class EarlierKeys:
    """The `KeysFrom` parts of a method on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner) -> None:
        self.layers, self.pruner, name = layers, pruner, pruner.method.name
        self.parts: dict[int, KeysFrom] = {}
        self._seen = threading.local()
        for part in pruner.method.keys_from:
            if not part.layer < len(layers):
                raise UnsupportedPointError(f"{name} acts in layer {part.layer}; this decoder has layers 0 to {len(layers) - 1}")
            if part.layer in self.parts:
                raise UnsupportedPointError(f"{name} says twice where the keys of layer {part.layer} come from")
            leaves = [layer for layer in pruner.stages("decoder") if part.source < layer <= part.layer]
            back = [stage for stage in pruner.method.stages if stage.restore is not None and part.source < stage.restore <= part.layer]
            if leaves or back:
                raise UnsupportedPointError(
                    f"{name} makes keys of layer {part.layer} from the input of layer {part.source}, and tokens leave or return between the two. Let them do "
                    f"so at layer {part.source} or before it."
                )
            rows = [one for one in pruner.method.bypasses if one.layer == part.layer and one.part != "mlp"]
            if any(one.kv != "project_only" or one.phase != "prefill" for one in rows) or any(skip.layer == part.layer for skip in pruner.method.layer_skips):
                raise UnsupportedPointError(
                    f"{name} makes keys of layer {part.layer} from those of an earlier one: tokens can pass by that layer in prompts, with kv='project_only', "
                    "and in no other way"
                )
            self._check_share(part)
            attn: Any = attention_of(layers[part.layer])
            if part.query is not None and not isinstance(getattr(attn, "q_proj", None), nn.Module):
                raise UnsupportedPointError(f"{name} has queries of its own for layer {part.layer}; looked for q_proj in {type(attn).__name__}")
            self.parts[part.layer] = part

    def _check_share(self, part: KeysFrom) -> None:
        if part.share is None:
            return
        config: Any = getattr(attention_of(self.layers[part.layer]), "config", None)
        types, rope = getattr(config, "layer_types", None) or [], getattr(config, "rope_parameters", None) or {}
        if any(kind in rope for kind in types) and types[part.layer] != types[part.share]:
            raise UnsupportedPointError(
                f"{self.pruner.method.name} lets layer {part.layer} use the keys of layer {part.share}, and this decoder rotates them differently "
                f"({types[part.share]}, {types[part.layer]})."
            )

    def attach(self, hooks: HookSet) -> None:
        """Note the states, and wrap the attention of the layers."""
        if not self.parts:
            return
        for source in sorted({part.source for part in self.parts.values()}):
            hooks.before(self.layers[source], self._note(source))
        for number, part in self.parts.items():
            attn: Any = attention_of(self.layers[number])
            hooks.wrap(attn, "forward", self._around(number, attn))
            if part.query is not None:
                query = part.query
                hooks.wrap(attn.q_proj, "forward", lambda original, states, query=query: query(states))
        hooks.after(self.layers[max(self.parts)], lambda *_: self._states().clear(), always=True)

    def keys_values(self, number: int, rotary: Any) -> KeysValues:
        """(B, Hkv, L, d) rotated keys, and values, of a layer for all tokens of the call."""
        attn, states = attention_of(self.layers[number]), self._states()[self.parts[number].source]
        keys, values = self.parts[number].project(states if rotary is None else states.to(rotary[0].device))
        keys = _attention.by_head(attn, keys, "k")
        if rotary is not None:
            keys = _attention.rotate(attn, keys, *rotary)
        return keys, _attention.by_head(attn, values, "v")

    def shared(self, number: int, cache: Any) -> PrunedLayer | None:
        """The lower cache layer whose entries a layer uses, where there is a growing cache."""
        share, layers = self.parts[number].share, getattr(cache, "layers", None)
        if share is None or not layers or len(layers) <= number:
            return None
        both = (layers[share], layers[number])
        return layers[share] if all(isinstance(one, PrunedLayer) and one.slots is None and one.can_share for one in both) else None

    def given(self, number: int, cache: Any, rotary: Any) -> Any:
        """What stands for the cache in the attention of a layer: whatever it is handed, it keeps the keys made of the earlier states."""
        lower, session = self.shared(number, cache), self.pruner.session
        if lower is not None and session is not None:
            session.trace.shared_kv.add(number)
        return Filled(cache, lambda keys, values: self.keys_values(number, rotary)) if lower is None else Shared(cache, lower)

    def _states(self) -> dict[int, Tensor]:
        return self._seen.__dict__.setdefault("states", {})  # type: ignore[no-any-return]

    def _note(self, source: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._states()[source] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _around(self, number: int, attn: nn.Module) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            session = self.pruner.session
            rows = None if session is None else session.memo.get(("rows", number, "attn"))
            if rows is None or rows.index is None:                       # else the bypass fills in the keys of those that do not ask
                kwargs["past_key_values"] = self.given(number, kwargs.get("past_key_values"), kwargs.get("position_embeddings"))
            return original(*args, **kwargs)

        return forward


class Shared(Filled):
    """Stands for the cache of a layer that uses the entries of a lower one."""

    def __init__(self, cache: Any, lower: PrunedLayer) -> None:
        super().__init__(cache, lambda keys, values: (keys, values))
        self._lower = lower

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeysValues:
        """The lower layer's entries, these tokens' among them; this layer keeps the same tensors."""
        return self._cache.layers[layer_idx].hold(self._lower)  # type: ignore[no-any-return]
