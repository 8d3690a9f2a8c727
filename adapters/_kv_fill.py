"""Keys and values of tokens that do not run through a layer: projected from their residual, or copied from the layer below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.adapters._cache import PrunedLayer
from vlprune.errors import UnsupportedCallError

KeysValues = tuple[Tensor, Tensor]


def project_keys_values(attn: nn.Module, states: Tensor, rotary: Any) -> KeysValues:
    """(B, Hkv, L, d) rotated keys, and values, of an attention module for its input ``states`` (B, L, D)."""
    keys = _attention.project(attn, states, "k")
    if rotary is not None:
        keys = _attention.rotate(attn, keys, *rotary)
    return keys, _attention.project(attn, states, "v")


def last_keys_values(entry: Any, count: int, layer: int) -> KeysValues:
    """The last ``count`` entries that a cache layer holds."""
    keys = entry.stored_keys() if isinstance(entry, PrunedLayer) else None
    if keys is None:
        raise UnsupportedCallError(
            f"kv='copy_prev_layer' copies keys and values from layer {layer}, and there is no cache to copy from, or one that does not hold them as they were "
            "computed. Use the default cache (use_cache=True), or kv='project_only'."
        )
    values = entry.inner.values[..., : keys.shape[2], :]
    return keys[..., keys.shape[2] - count :, :], values[..., values.shape[2] - count :, :]


class Filled:
    """Stands for the cache of one layer's attention: what it is given are the keys and values of some rows, what it keeps and hands back are all.

    Args:
        cache: the real one, or ``None``.
        fill: from the keys and values of the rows that ran to those of all.
    """

    def __init__(self, cache: Any, fill: Callable[[Tensor, Tensor], KeysValues]) -> None:
        self._cache, self._fill = cache, fill

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeysValues:
        """As the cache's own."""
        keys, values = self._fill(key_states, value_states)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)


def mixed(runs: Tensor, own: KeysValues, other: KeysValues) -> KeysValues:
    """Keys and values of ``own`` where ``runs`` (B, L) is true, of ``other`` elsewhere."""
    choose = runs[:, None, :, None]
    return torch.where(choose, own[0], other[0]), torch.where(choose, own[1], other[1])
