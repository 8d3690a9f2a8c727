"""How a decoder is held: every layer's arguments are cut to the rows that are there, and the rows come back at the end.

A decoder hands every layer the arguments of the full sequence. Pre-hooks on the layers cut them (one function, `_sequence`),
stages shorten the hidden states, a hook on the last layer puts every row back in its place. Decoding needs no state of its own:
the cache layers know which positions they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _sequence
from vlprune.adapters._cache import KeyMap, PrunedLayer, wrap_cache
from vlprune.adapters._decode_select import DecodeSelects
from vlprune.adapters._decoder_taps import DecoderTaps, attention_of
from vlprune.errors import UnsupportedCallError, UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.method import Attend, Bypass, LayerSkip
from vlprune.protocols import Tap
from vlprune.pruner import Collect, ItemState, Pruner, Session


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm behind the last layer."""
    named = (getattr(decoder, name, None) for name in ("norm", "final_layernorm", "ln_f"))
    return next((module for module in named if isinstance(module, nn.Module)), None)


class DecoderEngine:
    """The stages, taps and skips of a method on one decoder.

    Args:
        decoder: module with ``layers`` whose loop passes every layer the same keyword arguments.
        can_renumber: whether position ids are one-dimensional, so that survivors can be renumbered.
    """

    def __init__(self, decoder: nn.Module, pruner: Pruner, *, can_renumber: bool = True) -> None:
        self.decoder, self.pruner = decoder, pruner
        self.layers: list[nn.Module] = list(decoder.layers)  # type: ignore[arg-type]
        self.stages = pruner.stages("decoder")
        self.taps = DecoderTaps(self.layers, pruner, final_norm(decoder))
        self.selects = DecodeSelects(self.layers, pruner, lambda: self.backend)
        self.causal = bool(getattr(attention_of(self.layers[0]), "is_causal", True))
        self.tower_cuts = bool(pruner.stages("vision"))
        self.renumber = pruner.positions == "renumber" and bool(self.stages or self.tower_cuts)
        if self.renumber and not can_renumber:
            raise UnsupportedModelError(
                "positions='renumber' is not defined for multimodal (M-)RoPE ids with time, height and width. Use positions='preserve'."
            )

    @property
    def backend(self) -> str:
        """Name of the attention implementation."""
        return str(getattr(self.decoder.config, "_attn_implementation", "") or "")

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in this decoder."""
        method = self.pruner.method
        return bool(self.stages or self.tower_cuts or method.bypasses or method.attends or method.layer_skips or self.selects.selects)

    def attach(self, hooks: HookSet) -> None:
        """Put the hooks on."""
        if not self.acts:
            return
        if "flex" in self.backend:
            raise UnsupportedModelError("flex attention masks cannot be cut; load the model with attn_implementation='sdpa' or 'eager'")
        if "flash" in self.backend and any(getattr(attention_of(layer), "sliding_window", None) for layer in self.layers):
            raise UnsupportedModelError(
                "flash attention counts a sliding window in the tokens that are there, not in positions, so a pruned prompt would see too far back. "
                "Load the model with attn_implementation='sdpa' or 'eager'."
            )
        for number, layer in enumerate(self.layers):
            hooks.before(layer, self._before_layer(number))
        self.taps.attach(hooks)
        self.selects.attach(hooks)
        for bypass in self.pruner.method.bypasses:
            self._attach_bypass(hooks, bypass)
        for skip in self.pruner.method.layer_skips:
            hooks.wrap(self.layers[skip.layer], "forward", self._skipping(skip))
        hooks.after(self.layers[-1], self._after_last, first=True)
        hooks.after(self.decoder, self._after_decoder, first=True)

    # going in

    def _before_layer(self, number: int) -> Callable[..., Any]:
        stages = self.stages.get(number, [])
        method = self.pruner.method
        bypasses = [bypass for bypass in method.bypasses if bypass.layer == number]
        attends = [attend for attend in method.attends if attend.layer == number]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            session, cache = self.pruner.session, kwargs.get("past_key_values")
            if number == 0 and (session is not None or self.pruner.method.layer_skips):
                self._enter(session, cache, kwargs, hidden)
            entry = self._entry(cache, number)
            if session is None:
                if entry is None or (entry.keymap is None and entry.selection is None):
                    return None
                kwargs = kwargs if entry.keymap is None else self._cut_decode(kwargs, entry, hidden)
                return args, self.selects.cut(number, cache, kwargs, hidden)
            hidden = session.bring_back(number, hidden)
            if number == 0:
                hidden = session.leave_tower(hidden)
                self.taps.note_raters(session, hidden)
            for stage in stages:
                shortened = session.reduce(stage, hidden, self._collector(session, number, kwargs, entry, hidden))
                hidden = hidden if shortened is None else shortened
            session.trace.decoder_lengths.append([session.length] * session.layout.num_rows)   # filler runs too
            self.selects.note(session, cache, number)
            kwargs = self._cut_prefill(session, kwargs, entry, self._keys_left(session, bypasses, attends))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _enter(self, session: Session | None, cache: Any, kwargs: dict[str, Any], hidden: Tensor) -> None:
        """First layer: check the arguments, wrap the cache, note what came before."""
        _sequence.check_aligned(kwargs, hidden.shape[1], type(self.layers[0]).__name__)
        _sequence.check_checkpointing(self.layers[0])
        if cache is not None:
            wrap_cache(cache, len(self.layers))
        if session is not None:
            entry = self._entry(cache, 0)
            session.trace.past_length = 0 if entry is None else int(entry.length)
            session.trace.kv_element_bytes = hidden.element_size()

    @staticmethod
    def _entry(cache: Any, number: int) -> PrunedLayer | None:
        layers = getattr(cache, "layers", None)
        if not layers or number >= len(layers):
            return None
        entry = layers[number]
        return entry if isinstance(entry, PrunedLayer) else None

    def _collector(self, session: Session, number: int, kwargs: dict[str, Any], entry: PrunedLayer | None, hidden: Tensor) -> Collect:
        def collect(tap: Tap, group: list[ItemState]) -> Tensor:
            if tap.tower == "vision":
                return torch.stack([session.signals[tap, id(state.item)][state.original] for state in group])
            return self.taps.collect(
                session, tap, group, lambda: self._cut_prefill(session, kwargs, entry, None, expect=False), entry, hidden, number
            )

        return collect

    # cutting

    def _cut_prefill(
        self, session: Session, kwargs: dict[str, Any], entry: PrunedLayer | None, active: Tensor | None, *, expect: bool = True
    ) -> dict[str, Any]:
        """The layer's arguments for the rows that are there; tells the cache layer which positions it is about to get."""
        index = session.index
        keymap, past = self._next_keymap(session, entry, active)
        if entry is not None and expect:
            entry.pending = (keymap, past + session.layout.length)
        if index is None and keymap is None and active is None:
            return kwargs
        memo, cut = session.memo, dict(kwargs)

        def once(name: str, source: Any, make: Callable[[], Any]) -> Any:
            key = (name, id(source), id(index), id(keymap), id(active))
            if key not in memo:
                memo[key] = (make(), source, index, keymap, active)      # the rest keeps the ids taken
            return memo[key][0]

        if index is not None:
            if kwargs.get("position_embeddings") is not None:
                cut["position_embeddings"] = once(
                    "rotary", kwargs["position_embeddings"], lambda: self._rotary(session, kwargs, index, entry)
                )
            if "flash" in self.backend:
                cut["position_ids"] = None                               # gaps would read as several packed sequences
            elif kwargs.get("position_ids") is not None:
                cut["position_ids"] = once("ids", kwargs["position_ids"], lambda: _sequence.take_rows(kwargs["position_ids"], index, -1))
        if "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
            cut["attention_mask"] = once("mask", mask, lambda: self._mask(session, mask, keymap, entry, past, active))
        return cut

    def _mask(self, session: Session, mask: Any, keymap: KeyMap | None, entry: PrunedLayer | None, past: int, active: Tensor | None) -> Any:
        length, index = session.layout.length, session.index
        device = session.device
        bias = session.key_bias() if self.pruner.method.size_bias else None
        if index is None and keymap is None and active is None:
            return mask
        places = index if index is not None else torch.arange(length, device=device).expand(session.layout.num_rows, -1)
        if entry is not None and keymap is not None:
            columns, valid = keymap.positions(past + length, entry.slots)
            bias = keymap.biases(columns.shape[1])
        else:
            columns, valid = places, session.valid
            if active is not None:
                valid = active if valid is None else valid & active
        return _sequence.cut_mask(
            mask, rows=index, columns=columns, columns_valid=valid, query_positions=past + places, backend=self.backend, causal=self.causal, bias=bias
        )

    def _next_keymap(self, session: Session, entry: PrunedLayer | None, active: Tensor | None) -> tuple[KeyMap | None, int]:
        """Which positions the layer's cache holds once this call is through, and how long it was before."""
        if entry is None:
            return None, 0
        past, index = entry.length, session.index
        if index is None and active is None:
            return entry.keymap, past
        key = ("keymap", id(entry.keymap), past, id(index), id(active))
        if key not in session.memo:
            rows, length = session.layout.num_rows, session.layout.length
            places = index if index is not None else torch.arange(length, device=session.device).expand(rows, -1)
            valid = session.valid if active is None else active if session.valid is None else session.valid & active
            gone = torch.tensor(session.gone).to(session.device, non_blocking=True)
            if entry.keymap is not None:
                before, before_valid = entry.keymap.positions(past)
                gone = gone + entry.keymap.dropped
            else:
                before, before_valid = torch.arange(past, device=session.device).expand(rows, -1), None
            if valid is not None or before_valid is not None:
                ones = [torch.ones_like(part, dtype=torch.bool) for part in (before, places)]
                valid = torch.cat([ones[0] if before_valid is None else before_valid, ones[1] if valid is None else valid], dim=1)
            after = self._whole_after(session) if valid is None else length              # from here on nothing left: may be rolled back
            first = places[:, : places.shape[1] - (length - after)]
            bias = session.key_bias() if self.pruner.method.size_bias else None
            earlier = None if entry.keymap is None else entry.keymap.biases(before.shape[1])
            if bias is not None or earlier is not None:
                zeros = [torch.zeros(part.shape, device=session.device) for part in (before, places)]
                bias = torch.cat([zeros[0] if earlier is None else earlier, zeros[1] if bias is None else bias], dim=1)
                bias = bias[:, : before.shape[1] + first.shape[1]]
            made = KeyMap(torch.cat([before, past + first], dim=1), valid, past + after, gone, bias)
            session.memo[key] = (made, entry.keymap, index, active)
        return session.memo[key][0], past

    @staticmethod
    def _whole_after(session: Session) -> int:
        """Position after which every row is complete: behind the last visual token and the last padding."""
        visual = max(int(item.positions[-1]) for item in session.layout.items)
        padding = torch.nonzero(~session.layout.valid_mask())[:, 1]
        return 1 + max(visual, int(padding.max()) if padding.numel() else -1)

    def _rotary(self, session: Session, kwargs: dict[str, Any], index: Tensor, entry: PrunedLayer | None) -> Any:
        if not self.renumber:
            return tuple(_sequence.take_rows(part, index, -2) for part in kwargs["position_embeddings"])
        ids = _sequence.take_rows(self._plain_ids(kwargs), index, -1)
        ids = ids - session.moved()
        if entry is not None and entry.keymap is not None:
            ids = ids - entry.keymap.dropped[:, None]
        return self._rotary_at(kwargs, ids)

    def _rotary_at(self, kwargs: dict[str, Any], ids: Tensor) -> Any:
        like = kwargs["position_embeddings"][0]
        return self.decoder.rotary_emb(like, position_ids=ids)  # type: ignore[operator]

    @staticmethod
    def _plain_ids(kwargs: dict[str, Any]) -> Tensor:
        ids = kwargs.get("position_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise UnsupportedCallError("positions='renumber' needs position ids of shape (batch, length) in every layer; use positions='preserve'.")
        return ids

    def _cut_decode(self, kwargs: dict[str, Any], entry: PrunedLayer, hidden: Tensor) -> dict[str, Any]:
        """A call without new visual tokens on a pruned cache: the mask is cut to the keys this layer holds."""
        keymap, past, new = entry.keymap, entry.length, hidden.shape[1]
        assert keymap is not None
        cut = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None or keymap.valid is not None or keymap.bias is not None:

            def make_mask() -> Any:
                columns, valid = keymap.positions(past + new, entry.slots)
                places = None if new == 1 else past + torch.arange(new, device=columns.device).expand(columns.shape[0], -1)
                return _sequence.cut_mask(
                    mask,
                    rows=None,
                    columns=columns,
                    columns_valid=valid,
                    query_positions=places,
                    backend=self.backend,
                    causal=self.causal,
                    bias=keymap.biases(columns.shape[1]),
                )

            cut["attention_mask"] = keymap.once("mask", mask, past, make_mask)
        if self.renumber and kwargs.get("position_embeddings") is not None:
            ids = self._plain_ids(kwargs)
            cut["position_embeddings"] = keymap.once("rotary", ids, past, lambda: self._rotary_at(kwargs, ids - keymap.dropped[:, None]))
        return cut

    # coming out

    def _after_last(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Full length again: every row that left comes back with the state it left with."""
        session = self.pruner.session
        if session is None or not session.cuts:
            return None
        if isinstance(output, tuple):
            return (session.restore(output[0]), *output[1:])
        return session.restore(output)

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Recorded hidden states come back at full length too."""
        session = self.pruner.session
        states = getattr(output, "hidden_states", None)
        if session is None or not session.history or states is None:
            return None
        full = session.layout.length
        restored = []
        for number, state in enumerate(states):              # entry i left layer i - 1; the first one entered layer 0
            layer = max(number - 1, 0)
            cuts = [cut for cut in session.history if cut.layer <= layer and (cut.restore is None or cut.restore > layer)]
            restored.append(state if state is None or state.shape[1] == full else session.restore(state, cuts))
        output.hidden_states = tuple(restored)
        return output

    # skips

    def _keys_left(self, session: Session, bypasses: list[Bypass], attends: list[Attend]) -> Tensor | None:
        """(B, Lc) keys of this layer that may be seen, or ``None`` if all may; the rows that run are noted for the hooks below."""
        active = None
        if not (bypasses or attends):
            return active
        visual = session.layout.visual_mask().to(session.device)
        visual = visual if session.index is None else torch.gather(visual, 1, session.index)
        for bypass in bypasses:
            runs = bypass.rows(visual)
            session.signals["bypass", id(bypass)] = runs
            if bypass.kv == "active_only" and bypass.part != "mlp":
                active = runs if active is None else active & runs
        for attend in attends:
            keys = attend.keys(visual)
            active = keys if active is None else active & keys
        return active

    def _attach_bypass(self, hooks: HookSet, bypass: Bypass) -> None:
        layer = self.layers[bypass.layer]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            session = self.pruner.session
            if session is None:
                return None
            first = output[0] if isinstance(output, tuple) else output
            runs = session.signals["bypass", id(bypass)].to(first.device)[..., None]
            first = torch.where(runs, first, torch.zeros((), dtype=first.dtype, device=first.device))  # residual + 0 is the residual
            return (first, *output[1:]) if isinstance(output, tuple) else first

        if bypass.part in ("attn", "block"):
            hooks.after(attention_of(layer), hook)
        if bypass.part in ("mlp", "block"):
            hooks.after(layer.mlp, hook)  # type: ignore[arg-type]

    def _skipping(self, skip: LayerSkip) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            entry = self._entry(kwargs.get("past_key_values"), skip.layer)
            position = 0 if entry is None else entry.length
            phase = "prefill" if hidden.shape[1] > 1 or position == 0 else "decode"
            step = 0 if entry is None or phase == "prefill" else entry.steps
            if entry is not None:
                entry.steps = 0 if phase == "prefill" else entry.steps + 1
            if skip.run(phase, step, position):
                return original(*args, **kwargs)
            if entry is not None:
                entry.skip(hidden)
            return hidden

        return forward
