"""Key-value caches whose layers hold fewer entries than the conversation has tokens.

Each layer of the user's cache is wrapped. Towards the model the wrapper reports the *logical* length (every token counts), so
positions, masks and ``generate`` go on as before; inside are only the kept entries, and a `KeyMap` that says where they stood.
The state of a generation therefore lives in its cache: interleaved generations, beams, crops and second turns need no handle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from vlprune.errors import UnsupportedCallError
from vlprune.protocols import GenerationState

#: transformers 5.17 has no ``BaseQuantizedLayer``: there every quantized layer is a ``QuantizedLayer``.
_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


class KeyMap:
    """Where the entries of a pruned cache layer stood. Immutable and shared by the layers of a stage.

    Attributes:
        prefix: (B, P) logical positions of the first P entries.
        valid: (B, P) false on filler entries of short rows, or ``None``.
        tail: logical position from which on every token is there.
        dropped: (B,) how many tokens of each row are missing.
        bias: (B, P) added to the attention logits of the first P entries (log sizes of merged tokens), or ``None``.
    """

    def __init__(self, prefix: Tensor, valid: Tensor | None, tail: int, dropped: Tensor, bias: Tensor | None = None) -> None:
        self.prefix, self.valid, self.tail, self.dropped, self.bias = prefix, valid, tail, dropped, bias
        self._last: tuple[Any, KeyMap] | None = None
        self._memo: dict[str, tuple[Any, int, Any]] = {}

    def once(self, name: str, source: Any, length: int, make: Callable[[], Any]) -> Any:
        """``make()`` for the first layer of a stage that asks in a step; the same result for the others."""
        known = self._memo.get(name)
        if known is None or known[0] is not source or known[1] != length:
            known = self._memo[name] = (source, length, make())
        return known[2]

    def entries(self, length: int) -> int:
        """How many entries a layer of logical ``length`` holds."""
        return self.prefix.shape[1] + length - self.tail

    def positions(self, length: int, slots: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, P') logical positions of all entries and which of them count; ``slots``: size of a static buffer."""
        batch, device = self.prefix.shape[0], self.prefix.device
        total = self.entries(length) if slots is None else slots
        grown = torch.arange(self.tail, self.tail + total - self.prefix.shape[1], device=device).expand(batch, -1)
        positions = torch.cat([self.prefix, grown], dim=1)
        valid = None if self.valid is None else torch.cat([self.valid, torch.ones_like(grown, dtype=torch.bool)], dim=1)
        if slots is not None:                                            # unwritten slots of a static buffer: point past the end
            written = positions < length
            valid = written if valid is None else valid & written
            positions = positions.clamp(max=slots - 1)
        return positions, valid

    def biases(self, total: int) -> Tensor | None:
        """(B, total) of the first ``total`` entries."""
        return None if self.bias is None else functional.pad(self.bias, (0, total - self.bias.shape[1]))

    def rows(self, index: Tensor) -> KeyMap:
        """The map for other batch rows (beams); asked with the same tensor by every layer, answered once."""
        if self._last is not None and self._last[0] is index:
            return self._last[1]
        pick = index.to(self.prefix.device)
        valid, bias = (None if part is None else part[pick] for part in (self.valid, self.bias))
        made = KeyMap(self.prefix[pick], valid, self.tail, self.dropped[pick], bias)
        self._last = (index, made)
        return made


class View:
    """Some entries (B, S) of layers that hold more, copied row by row; shared by the layers of a step."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self._flat: dict[tuple[int, int], Tensor] = {}

    def take(self, stored: Tensor) -> Tensor:
        """(B, H, S, d) of (B, H, P, d)."""
        batch, heads, total, width = stored.shape
        if (heads, total) not in self._flat:
            first = total * torch.arange(batch * heads, device=stored.device).view(batch, heads, 1)
            self._flat[heads, total] = (first + self.index[:, None]).flatten()
        # whole rows: on a CPU 15 to 50 times as fast as torch.gather, which moves number by number
        return stored.reshape(-1, width).index_select(0, self._flat[heads, total]).view(batch, heads, -1, width)


class PrunedLayer(CacheLayerMixin):
    """A cache layer that holds only kept entries and reports the logical length."""

    def __init__(self, inner: CacheLayerMixin) -> None:
        # no super().__init__(): keys, values and the rest are the inner layer's, through __getattr__
        self.inner = inner
        self.keymap: KeyMap | None = None
        self.length = int(inner.get_seq_length())
        self.pending: tuple[KeyMap | None, int] | None = None
        self.selection: Any = None              # `_decode_select.Selection`, what decoding looks at
        self.view: View | None = None           # entries that the coming update hands to attention; None: all
        self.state: GenerationState | None = None       # what policies remember, shared by the layers
        self.missing = False                    # a token passed by and left no entry (`LayerSkip` with nothing in the cache)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """As the inner layer, so that masks are made the same way."""
        return bool(getattr(self.inner, "is_compileable", False))

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """As the inner layer."""
        return bool(getattr(self.inner, "is_croppable", False))

    is_sliding = False

    @property
    def slots(self) -> int | None:
        """Size of a static buffer, ``None`` for a growing one."""
        return int(self.inner.get_max_length()) if self.is_compileable else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Prepare the inner layer."""
        self.inner.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries; the layer's hook has said before which logical positions they are."""
        out = self.inner.update(key_states, value_states, *args, **kwargs)
        if self.pending is not None:
            (self.keymap, self.length), self.pending = self.pending, None
        else:
            self.length += key_states.shape[-2]
        if self.view is not None:
            view, self.view = self.view, None
            return view.take(out[0]), view.take(out[1])
        return out

    @property
    def can_share(self) -> bool:
        """Whether the entries are plain tensors that another layer can hold, too."""
        return type(self.inner) is DynamicLayer and self.selection is None

    def hold(self, lower: PrunedLayer) -> tuple[Tensor, Tensor]:
        """Instead of `update`: have the entries of a lower layer, which has been updated in this call, as the same tensors."""
        inner: Any = self.inner
        if not inner.is_initialized:
            inner.lazy_initialization(lower.inner.keys, lower.inner.values)
        inner.keys, inner.values = lower.inner.keys, lower.inner.values
        self.keymap, self.length, self.pending = lower.keymap, lower.length, None
        return inner.keys, inner.values

    def skip(self, hidden: Tensor) -> None:
        """The layer does not run: its tokens (B, L, D) count, but leave no entry."""
        batch, device = hidden.shape[0], hidden.device
        length = self.length + hidden.shape[1] if self.pending is None else self.pending[1]
        if self.keymap is not None:
            before, valid = self.keymap.positions(self.length)
            dropped, bias = self.keymap.dropped, self.keymap.biases(before.shape[1])
        else:
            before, valid, bias = torch.arange(self.length, device=device).expand(batch, -1), None, None
            dropped = torch.zeros(batch, dtype=torch.long, device=device)
        self.missing = True
        self.keymap, self.pending = KeyMap(before, valid, length, dropped + (length - self.length), bias), None
        self.length = length

    def edit(self, keep: Tensor) -> None:
        """Keep only the entries ``keep`` (B, K), ascending, of the P that are stored; a growing cache in the model's own numbers."""
        keys = self.stored_keys()
        if keys is None or self.slots is not None:
            raise UnsupportedCallError("only a growing, unquantized cache can be edited; use cache_implementation='dynamic'.")
        if self.selection is not None:
            raise UnsupportedCallError("a method that selects keys while decoding counts on them all; this cache cannot be edited.")
        batch, device = keep.shape[0], keys.device
        if self.keymap is None:
            before, valid, bias = torch.arange(self.length, device=device).expand(batch, -1), None, None
            dropped = torch.zeros(batch, dtype=torch.long, device=device)
        else:
            before, valid = self.keymap.positions(self.length)
            dropped, bias = self.keymap.dropped, self.keymap.biases(before.shape[1])
        places = keep[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.inner.keys = torch.gather(self.inner.keys, 2, places)
        self.inner.values = torch.gather(self.inner.values, 2, places[..., :1].expand(-1, -1, -1, self.inner.values.shape[3]))
        lost = keys.shape[2] - keep.shape[1]
        valid, bias = (None if part is None else torch.gather(part, 1, keep) for part in (valid, bias))
        self.keymap = KeyMap(torch.gather(before, 1, keep), valid, self.length, dropped + lost, bias)

    def get_seq_length(self) -> int:
        """Logical length: every token of the conversation counts."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; the layer's hook cuts the mask."""
        if self.slots is not None:
            return self.slots, 0
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """As the inner layer."""
        return int(self.inner.get_max_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number); not past the point where tokens were dropped."""
        new_length = self.length - abs(tokens_to_remove)
        if self.keymap is not None and new_length < self.keymap.tail:
            raise UnsupportedCallError(
                f"the cache cannot be rolled back to {new_length} tokens: {self.keymap.tail} tokens of it are a pruned prompt. "
                "Start from a new cache instead."
            )
        if self.selection is not None and (new_length if self.keymap is None else self.keymap.entries(new_length)) < self.selection.entries:
            raise UnsupportedCallError(
                f"the cache cannot be rolled back to {new_length} tokens, into a prompt whose keys are selected while decoding. Start from a new cache instead."
            )
        self.inner.crop(tokens_to_remove)  # type: ignore[attr-defined]
        self.length = new_length

    def reset(self) -> None:
        """Empty the layer."""
        self.inner.reset()
        self.keymap, self.length, self.pending, self.selection = None, 0, None, None
        self.state, self.missing = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.inner.reorder_cache(beam_idx)
        if self.keymap is not None:
            self.keymap = self.keymap.rows(beam_idx)
        if self.selection is not None:
            self.selection = self.selection.rows(beam_idx)
        if self.state is not None:
            self.state = self.state.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self.inner.batch_select_indices(indices)  # type: ignore[attr-defined]
        if self.keymap is not None:
            self.keymap = self.keymap.rows(indices)
        if self.selection is not None:
            self.selection = self.selection.rows(indices)
        if self.state is not None:
            self.state = self.state.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.inner.batch_repeat_interleave(repeats)  # type: ignore[attr-defined]
        if self.keymap is not None:
            rows = torch.arange(self.keymap.prefix.shape[0]).repeat_interleave(repeats)
            self.keymap = self.keymap.rows(rows)
        if self.state is not None:
            self.state = self.state.repeat(repeats)
        if self.selection is not None:
            self.selection = self.selection.repeat(repeats)

    def stored_keys(self) -> Tensor | None:
        """(B, H, P, d) entries in the model's own numbers, or ``None`` where the inner layer keeps them otherwise."""
        keys = getattr(self.inner, "keys", None)
        if not self.inner.is_initialized or keys is None or isinstance(self.inner, _QUANTIZED):
            return None
        entries = self.length if self.keymap is None else self.keymap.entries(self.length)
        return keys[..., :entries, :]


class SlidingPrunedLayer(PrunedLayer):
    """For layers with a sliding window: holds every kept entry; the window is in the mask, counted in logical positions."""

    is_sliding = True


def wrap_layer(layer: Any) -> PrunedLayer:
    """Wrap one layer of a cache, or say why it cannot be pruned."""
    if isinstance(layer, PrunedLayer):
        return layer
    if getattr(layer, "is_sliding", False):
        if getattr(layer, "is_compileable", False):
            raise UnsupportedCallError("static sliding-window caches cannot hold a pruned prompt; use cache_implementation='dynamic'.")
        if layer.get_seq_length() == 0:
            return SlidingPrunedLayer(DynamicLayer())
        if layer.keys.shape[-2] < layer.get_seq_length():
            raise UnsupportedCallError("this sliding-window cache was filled before pruning was applied; start from a new cache.")
        whole = DynamicLayer()                                           # nothing has slid out of it yet
        whole.lazy_initialization(layer.keys, layer.values)
        whole.keys, whole.values = layer.keys, layer.values
        return SlidingPrunedLayer(whole)
    if not isinstance(layer, (DynamicLayer, cache_utils.StaticLayer)) or isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
        raise UnsupportedCallError(
            f"cache layers of type {type(layer).__name__} cannot hold a pruned prompt. Use the default cache (cache_implementation='dynamic'), "
            "or remove the pruning for this model."
        )
    return PrunedLayer(layer)


def wrap_cache(cache: Any, num_layers: int) -> None:
    """Wrap every layer of a cache, once, creating those that it would create on first use."""
    layers = cache.layers
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) < num_layers:
            layers.append(cache.layer_class_to_replicate())
    wrapped = [wrap_layer(layer) for layer in layers[:num_layers]]
    layers[:num_layers] = wrapped
