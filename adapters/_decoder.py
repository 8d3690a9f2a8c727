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
from vlprune.adapters._bypass import Bypasses, Rows, fill_layer
from vlprune.adapters._cache import KeyMap, PrunedLayer, wrap_cache
from vlprune.adapters._decode_select import DecodeSelects
from vlprune.adapters._decoder_taps import DecoderTaps, attention_of
from vlprune.adapters._experts import Experts
from vlprune.adapters._head_attention import HeadAttention
from vlprune.adapters._text_calls import cached_length
from vlprune.errors import UnsupportedCallError, UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.method import Attend, LayerSkip
from vlprune.protocols import GenerationState, Tap
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
        self.bypasses = Bypasses(self.layers, pruner, lambda: self.backend)
        self.experts = Experts(self.layers, pruner)
        self.causal = bool(getattr(attention_of(self.layers[0]), "is_causal", True))
        self.tower_cuts = bool(pruner.stages("vision"))
        self.renumber = pruner.positions == "renumber" and bool(self.stages or self.tower_cuts)
        if self.renumber and not can_renumber:
            raise UnsupportedModelError(
                "positions='renumber' is not defined for multimodal (M-)RoPE ids with time, height and width. Use positions='preserve'."
            )
        skips: tuple[Any, ...] = (*pruner.method.bypasses, *pruner.method.layer_skips)
        if self.renumber and any(part.kv == "active_only" for part in skips):
            raise UnsupportedModelError(
                f"{pruner.method.name} leaves out keys of tokens that go on (kv='active_only'), so how many tokens left differs from layer to layer and "
                "positions='renumber' has no meaning. Use positions='preserve'."
            )

    @property
    def backend(self) -> str:
        """Name of the attention implementation."""
        return str(getattr(self.decoder.config, "_attn_implementation", "") or "")

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in this decoder."""
        method = self.pruner.method
        return bool(self.stages or self.tower_cuts or self.bypasses.acts or method.attends or method.layer_skips or self.selects.selects or self.experts.masks)

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
        self.bypasses.attach(hooks)
        self.experts.attach(hooks)
        HeadAttention(self.layers, self.pruner).attach(hooks)
        for skip in self.pruner.method.layer_skips:
            hooks.wrap(self.layers[skip.layer], "forward", self._skipping(skip))
        hooks.after(self.layers[-1], self._after_last, first=True)
        hooks.after(self.decoder, self._after_decoder, first=True)

    # going in

    def _before_layer(self, number: int) -> Callable[..., Any]:
        stages = self.stages.get(number, [])
        method = self.pruner.method
        attends = [attend for attend in method.attends if attend.layer == number and attend.keys is not None]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            session, cache = self.pruner.session, kwargs.get("past_key_values")
            if number == 0 and (session is not None or method.follows_decoding):
                self._enter(session, cache, kwargs, hidden)
            entry = self._entry(cache, number)
            if session is None:
                self.bypasses.before_step(number, hidden)
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
            rows = None
            if number in self.bypasses.prompt:
                if self.bypasses.chooses_attention(number):
                    self.taps.probe(session, lambda: self._cut_prefill(session, kwargs, entry, None, expect=False), entry, hidden, number)
                rows = self.bypasses.choose(session, number, hidden, self._collector(session, number, kwargs, entry, hidden))
                session.memo["collect", number] = self._collector(session, number + 1, kwargs, entry, hidden)      # for the MLP: behind the attention
            active = self._keys_left(session, number, attends)
            if rows is None:
                kwargs = self._cut_prefill(session, kwargs, entry, active)
            else:
                kwargs = self._cut_rows(session, number, kwargs, entry, active, rows)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _enter(self, session: Session | None, cache: Any, kwargs: dict[str, Any], hidden: Tensor) -> None:
        """First layer: check the arguments, wrap the cache, note what came before."""
        if session is not None or hidden.shape[1] > 1:
            _sequence.check_aligned(kwargs, hidden.shape[1], type(self.layers[0]).__name__)
        _sequence.check_checkpointing(self.layers[0])
        if cache is not None and (session is None or "idle" not in session.memo):
            wrap_cache(cache, len(self.layers))
        if self.pruner.method.follows_decoding:
            self._follow(session, cache, hidden)
        if session is not None:
            entry = self._entry(cache, 0)
            session.trace.past_length = cached_length(cache) if entry is None else int(entry.length)
            session.trace.kv_element_bytes = hidden.element_size()

    def _follow(self, session: Session | None, cache: Any, hidden: Tensor) -> None:
        """Find the state of this generation, kept by its cache, and tell it that a call starts."""
        first = self._entry(cache, 0)
        state = None if first is None else first.state
        if state is None:
            state = GenerationState()
        for number in range(len(self.layers)):
            entry = self._entry(cache, number)
            if entry is not None:
                entry.state = state
        position = 0 if first is None else first.length
        state.begin("prefill" if session is not None or hidden.shape[1] > 1 or position == 0 else "decode", position)
        if state.phase == "prefill":
            state.trace = None if session is None else session.trace
        elif state.trace is not None:
            state.trace.decode_steps += 1
        self.pruner.generation = state

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
        """Position after which every row is complete: behind the last token that could leave and the last padding."""
        visual = max((int(state.item.positions[-1]) for state in session.every()), default=-1)
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

    def _keys_left(self, session: Session, number: int, attends: list[Attend]) -> Tensor | None:
        """(B, Lc) keys of this layer that may be seen, or ``None`` if all may; the rows that run are noted for the parts."""
        active = None
        for bypass, runs in self.bypasses.masks(session, number):
            if bypass.kv == "active_only" and bypass.part != "mlp":
                active = runs if active is None else active & runs
        for attend in attends:
            assert attend.keys is not None
            keys = attend.keys(session.mask_of(attend.tokens))
            active = keys if active is None else active & keys
        return active

    def _cut_rows(
        self, session: Session, number: int, kwargs: dict[str, Any], entry: PrunedLayer | None, active: Tensor | None, rows: Rows
    ) -> dict[str, Any]:
        """The layer's arguments for an attention that only some rows ask in."""
        if rows.kv == "active_only" and rows.index is not None:
            return self._cut_prefill(RowsOnly.of(session, rows), kwargs, entry, None if active is None else torch.gather(active, 1, rows.index))
        past = 0 if entry is None else entry.length if entry.keymap is None else entry.keymap.entries(entry.length)
        if self._asks_all(kwargs, session, rows):
            rows.index = None
            session.trace.queries.pop(number, None)
        index = rows.index
        if index is None and rows.kv == "active_only":
            active = rows.mask if active is None else active & rows.mask
        cut = self._cut_prefill(session, kwargs, entry, active)
        if index is None:                                                # computed for all, thrown away where they do not run
            return cut
        rows.rotary = cut.get("position_embeddings")
        cut = dict(cut)
        if rows.rotary is not None:
            cut["position_embeddings"] = tuple(_sequence.take_rows(part, index, -2) for part in rows.rotary)
        if cut.get("position_ids") is not None:
            cut["position_ids"] = _sequence.take_rows(cut["position_ids"], index, -1)
        mask = cut.get("attention_mask")
        if mask is None:
            total = past + session.length if entry is None or entry.slots is None else entry.slots
            limit = (past + index)[:, None, :, None] if self.causal else total
            cut["attention_mask"] = torch.arange(total, device=index.device)[None, None, None, :] <= limit
            if not self.causal:
                cut["attention_mask"] = None
        else:
            cut["attention_mask"] = torch.gather(
                mask.expand(index.shape[0], *mask.shape[1:]), 2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            )
        return cut

    def _asks_all(self, kwargs: dict[str, Any], session: Session, rows: Rows) -> bool:
        """Whether to let every row ask and throw some answers away, where that is better or the only way.

        A few rows among all keys need a mask, which costs twice the pairs of a causal kernel, and flash attention has none.
        """
        if rows.kv == "active_only" or rows.index is None:
            return False
        return rows.kv == "full" or "flash" in self.backend or (kwargs.get("attention_mask") is None and 2 * rows.index.shape[1] > session.length)

    def _skipping(self, skip: LayerSkip) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("past_key_values")
            entry, state = self._entry(cache, skip.layer), self.pruner.generation
            assert state is not None
            if skip.run(state.phase, state.step, state.position):
                if entry is not None and entry.missing:
                    raise UnsupportedCallError(
                        f"{self.pruner.method.name} let earlier tokens of this cache skip layer {skip.layer} and leave no keys there, and now the layer runs "
                        "(a second turn, or a schedule that rises again): it would miss them. Start from a new cache, or choose kv='project_only' or "
                        "'copy_prev_layer'."
                    )
                return original(*args, **kwargs)
            if state.trace is not None and state.phase == "decode":
                for part in ("attn", "mlp"):
                    state.trace.decode_skipped[skip.layer, part] = state.trace.decode_skipped.get((skip.layer, part), 0.0) + 1.0
            if entry is None:
                return hidden
            if skip.kv == "active_only":
                entry.skip(hidden)
            else:
                layer: Any = self.layers[skip.layer]
                fill_layer(cache, self.layers, skip.layer, layer.input_layernorm(hidden), kwargs.get("position_embeddings"), skip.kv)
            return hidden

        return forward


class RowsOnly(Session):
    """A prompt as one layer's attention sees it that runs on some rows alone: the others are as if they had left, for this layer."""

    parent: Session
    running: Rows

    @classmethod
    def of(cls, session: Session, rows: Rows) -> RowsOnly:
        """A view; nothing of the session changes."""
        assert rows.index is not None
        assert rows.counts is not None
        made = cls.__new__(cls)
        vars(made).update(vars(session))
        made.parent, made.running = session, rows
        made.index = rows.index if session.index is None else torch.gather(session.index, 1, rows.index)
        made.valid, made.lengths = rows.valid, list(rows.counts)
        made.gone = [gone + before - now for gone, before, now in zip(session.gone, session.lengths, rows.counts, strict=True)]
        return made

    def key_bias(self) -> Tensor | None:
        """Of the rows that are there."""
        bias = self.parent.key_bias()
        return None if bias is None or self.running.index is None else torch.gather(bias, 1, self.running.index)
