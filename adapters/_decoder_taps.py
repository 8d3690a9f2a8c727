"""Signals from inside a decoder: attention rows of a few text tokens, and how modules transform each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.adapters._cache import PrunedLayer
from vlprune.errors import UnsupportedCallError, UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.kernels.some_heads import pick_heads
from vlprune.protocols import Tap
from vlprune.pruner import ItemState, Pruner, Session

#: Attention rows of text tokens, onto the item's columns.
ROW_KINDS = ("last_row", "text_rows", "text_mass", "text_max", "rater_rows", "rater_rows_plus")
COLUMN_KINDS = ("received",)
RATER_KINDS = ("rater_rows", "rater_rows_plus")
KEY_KINDS = ("key_l1", "text_key_l1")
#: Made from the hidden states at the point; no layer is looked into.
STATE_KINDS = ("normed", "text_states", "text_normed", "text_valid")


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    for name in ("self_attn", "self_attention", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(f"{type(layer).__name__}: looked for self_attn or attention and found neither")


class DecoderTaps:
    """Collects what the stages of a method want to know about decoder layers."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner, norm: nn.Module | None = None) -> None:
        self.layers, self.pruner, self.norm = layers, pruner, norm
        self.first_use = pruner.taps("decoder")

    def attach(self, hooks: HookSet) -> None:
        """Hook the layers that run before the point that looks; a tap at the point's own layer is probed there."""
        for tap, point_layer in self.first_use.items():
            if tap.layer >= point_layer or tap.kind in STATE_KINDS:
                continue
            layer = self.layers[tap.layer]
            if tap.kind in (*ROW_KINDS, *KEY_KINDS, *COLUMN_KINDS):
                hooks.after(attention_of(layer), self._clocked(self._attention_hook(tap)))
            else:
                hooks.after(attention_of(layer), self._clocked(self._transition_hook(tap, 0)))
                hooks.after(layer.mlp, self._clocked(self._transition_hook(tap, 3)))  # type: ignore[arg-type]

    def _clocked(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> None:
            with self.pruner.timed():
                hook(*args)

        return timed

    def collect(
        self, session: Session, tap: Tap, group: list[ItemState], kwargs: Callable[[], dict[str, Any]], entry: PrunedLayer | None, hidden: Tensor, number: int
    ) -> Tensor:
        """A decoder signal (G, n, ...) or (G, T, ...) for the point at the input of layer ``number``; ``kwargs()`` are that layer's, cut."""
        if tap.kind in STATE_KINDS:
            return self._states(session, tap, group, hidden)
        if tap.layer == number and ("probed", tap) not in session.memo:  # has not run yet: its own norm and projections on the point's input
            if tap.kind == "transition":
                raise UnsupportedCallError(f"signal {tap} needs the layer to have run; ask for an earlier layer")
            layer = self.layers[tap.layer]
            states = layer.input_layernorm(hidden)  # type: ignore[operator]
            return self._look(session, tap, group, attention_of(layer), states, kwargs(), entry, ran=False)
        stored = [session.signals[tap, id(state.item)] for state in group]
        if not tap.kind.startswith("text_key"):
            return torch.stack([values[state.original] for values, state in zip(stored, group, strict=True)])
        most = max(values.shape[0] for values in stored)
        return torch.stack([torch.cat([values, values[-1:].expand(most - values.shape[0])]) for values in stored])

    def probe(
        self, session: Session, kwargs: Callable[[], dict[str, Any]], entry: PrunedLayer | None, hidden: Tensor, number: int
    ) -> None:
        """Before a layer whose attention runs on some rows only: look at what later choices want to know of it, as if all ran."""
        taps = [tap for tap in self.first_use if tap.layer == number and tap.kind in (*ROW_KINDS, *KEY_KINDS, *COLUMN_KINDS)]
        if not taps:
            return
        layer: Any = self.layers[number]
        with torch.no_grad(), self.pruner.timed():
            states = layer.input_layernorm(hidden)
            for tap in taps:
                for group in (group for tokens in self.pruner.tap_sets(tap) for group in session.groups(tokens)):
                    self._store(session, tap, group, self._look(session, tap, group, attention_of(layer), states, kwargs(), entry, ran=False))
                session.memo["probed", tap] = True

    def _states(self, session: Session, tap: Tap, group: list[ItemState], hidden: Tensor) -> Tensor:
        """Hidden states at the point, of the item or of the text after it, as they are or behind the decoder's final norm."""
        rows, positions, weights = self._queries(session, tap, group)
        if tap.kind == "text_valid":
            return weights > 0
        slots = torch.stack([state.slots for state in group]) if tap.kind == "normed" else session.slots_of(rows, positions)
        states = hidden[rows[:, None], slots]
        if tap.kind == "text_states":
            return states.float()
        if self.norm is None:
            raise UnsupportedModelError(f"signal {tap}: looked for the decoder's final norm (norm, final_layernorm or ln_f) and did not find it")
        return self.norm(states).float()  # type: ignore[no-any-return]

    def _store(self, session: Session, tap: Tap, group: list[ItemState], values: Tensor) -> None:
        """Keep (G, n, ...) values by original number, so that later stages can look after further drops."""
        if tap.kind.startswith("text_key"):
            for state, value, count in zip(group, values, self._text_counts(session, group), strict=True):
                session.signals[tap, id(state.item)] = value[:count]
            return
        for state, value in zip(group, values, strict=True):
            full = value.new_zeros(state.item.num_tokens, *value.shape[1:])
            full[state.original] = value
            session.signals[tap, id(state.item)] = full

    @staticmethod
    def _text_counts(session: Session, group: list[ItemState]) -> list[int]:
        return [int(session.layout.text_after(state.item).numel()) for state in group]

    def _attention_hook(self, tap: Tap) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            session = self.pruner.session
            if session is None or ("probed", tap) in session.memo:
                return
            states = args[0] if args else kwargs["hidden_states"]
            layers = getattr(kwargs.get("past_key_values"), "layers", None)
            entry = layers[tap.layer] if layers else None
            for group in (group for tokens in self.pruner.tap_sets(tap) for group in session.groups(tokens)):
                values = self._look(session, tap, group, module, states, kwargs, entry, ran=True)
                self._store(session, tap, group, values)

        return hook

    def _look(
        self, session: Session, tap: Tap, group: list[ItemState], attn: nn.Module, states: Tensor, kwargs: dict[str, Any], entry: Any, *, ran: bool
    ) -> Tensor:
        """A signal of one attention module from its input ``states`` (B, Lc, D)."""
        session.move(states.device)
        rotary = kwargs.get("position_embeddings")
        keys, past = self._keys(session, attn, states, rotary, entry, ran)
        rows, positions, weights = self._queries(session, tap, group)
        slots = session.slots_of(rows, positions)                                        # (G, T)
        columns = torch.stack([state.slots for state in group]) + past
        if not (ran and entry is not None):
            session.trace.scorer_flops += 2.0 * states.shape[0] * states.shape[1] * states.shape[-1] * keys.shape[1] * keys.shape[3]
        if tap.kind in COLUMN_KINDS:
            received = self._received(session, tap, attn, states, kwargs, keys, past)    # (B, S)
            return torch.gather(received[rows], 1, columns)
        if tap.kind in KEY_KINDS:
            return torch.gather(keys.float().abs().sum(dim=(1, 3))[rows], 1, columns if tap.kind == "key_l1" else slots + past)
        queries = _attention.project(attn, states[rows[:, None], slots], "q")            # (G, H, T, d)
        if rotary is not None:
            cos, sin = (_rows_of(part, rows, slots) for part in rotary)
            queries = _attention.rotate(attn, queries, cos, sin)
        causal = bool(getattr(attn, "is_causal", True))
        filler = session.valid if past == 0 else None
        allowed = _attention.mask_rows(kwargs.get("attention_mask"), slots, rows, past, keys.shape[2], filler, causal)
        own_keys = keys if keys.shape[0] == len(group) and _in_order(group) else keys[rows]
        width = queries.shape[1] * queries.shape[3]
        session.trace.scorer_flops += 2.0 * width * (rows.shape[0] * slots.shape[1] * (keys.shape[2] + states.shape[-1]))
        attention = _attention.attention_rows(attn, queries, own_keys, allowed)          # (G, H, T, S)
        attention = torch.gather(attention, 3, columns[:, None, None].expand(-1, *attention.shape[1:3], -1))   # (G, H, T, n)
        if tap.kind == "text_max":
            return attention.masked_fill(weights[:, None, :, None] == 0, 0.0).amax(dim=(1, 2))
        if tap.kind in RATER_KINDS:
            weights = self._rater_weights(session, group)
        if tap.kind == "rater_rows_plus":
            response = position_response(attn, rotary, rows, slots, columns - past, queries.shape[-1])
            return rater_rows_plus(attention, weights, response, int(tap.options[0]))
        received = (attention.mean(dim=1) * weights[..., None]).sum(dim=1)               # (G, n)
        return received.sum(dim=1, keepdim=True).expand_as(received) if tap.kind == "text_mass" else received

    def _received(self, session: Session, tap: Tap, attn: nn.Module, states: Tensor, kwargs: dict[str, Any], keys: Tensor, past: int) -> Tensor:
        """(B, S) attention onto every key, from all entries that are neither padding nor filler; once for all groups of a layer."""
        key = ("received", tap, id(session.index))
        if key not in session.memo:
            queries, rotary = _attention.project(attn, states, "q"), kwargs.get("position_embeddings")
            if rotary is not None:
                queries = _attention.rotate(attn, queries, *rotary)
            heads, share = session.memo.get(("heads", tap.layer)), 1.0
            if heads is not None:                                        # heads that do not answer pay no attention
                share = heads.shape[1] / queries.shape[1]
                queries, keys = pick_heads(queries, heads), pick_heads(keys, heads, queries.shape[1] // keys.shape[1])
            filler = session.valid if past == 0 else None
            batch, width = torch.arange(states.shape[0], device=states.device), queries.shape[1] * queries.shape[3]
            mask, causal = kwargs.get("attention_mask"), bool(getattr(attn, "is_causal", True))

            def mask_rows(slots: Tensor) -> Tensor:
                return _attention.mask_rows(mask, slots.expand(states.shape[0], -1), batch, past, keys.shape[2], filler, causal)

            session.trace.scorer_flops += 2.0 * width * states.shape[0] * states.shape[1] * (keys.shape[2] + states.shape[-1])
            how = str(tap.options[0]) if tap.options else "sum"
            known = self._means_causal(session, attn, mask, past)
            plain = _attention.plain_mask(mask, past, states.shape[1], keys.shape[2], filler, causal, known)
            session.memo[key] = (share * _attention.received(attn, queries, keys, mask_rows, session.real_tokens(), how, plain=plain), session.index)
        return session.memo[key][0]  # type: ignore[no-any-return]

    def _means_causal(self, session: Session, attn: nn.Module, mask: Any, past: int) -> bool:
        """Whether a layer's mask with four dimensions means "causal, and no padding or filler": no window, nothing added to the logits."""
        config = getattr(attn, "config", None)
        kinds, number = getattr(config, "layer_types", None), getattr(attn, "layer_idx", None)
        windows = [getattr(attn, "sliding_window", getattr(config, "sliding_window", None)), getattr(config, "attention_chunk_size", None)]
        windows.append(kinds is not None and number is not None and kinds[number] != "full_attention")
        biased = self.pruner.method.size_bias or (past > 0 and isinstance(mask, Tensor) and mask.dtype != torch.bool)   # an earlier turn's tokens may be merged
        return session.plain and not any(windows) and not biased

    # raters

    def note_raters(self, session: Session, hidden: Tensor) -> None:
        """Before the first layer: which text tokens each item's embeddings point at more than at the average one."""
        if not any(tap.kind in RATER_KINDS for tap in self.first_use):
            return
        tap = Tap("text_states", 0)
        for group in session.groups():
            rows, _, weights = self._queries(session, tap, group)
            visual = hidden[rows[:, None], torch.stack([state.slots for state in group])].float()         # (G, n, D)
            chosen = text_raters(visual, self._states(session, tap, group, hidden), weights > 0)
            for state, value, count in zip(group, chosen, self._text_counts(session, group), strict=True):
                session.signals["raters", id(state.item)] = value[:count]

    def _rater_weights(self, session: Session, group: list[ItemState]) -> Tensor:
        """(G, T) one over the number of raters where a text token is one, else 0."""
        stored = [session.signals["raters", id(state.item)] for state in group]
        most = max(values.shape[0] for values in stored)
        raters = torch.stack([torch.cat([values, values.new_zeros(most - values.shape[0])]) for values in stored]).float()
        return raters / raters.sum(dim=1, keepdim=True)

    def _queries(self, session: Session, tap: Tap, group: list[ItemState]) -> tuple[Tensor, Tensor, Tensor]:
        """Batch rows (G,), original positions (G, T) and weights (G, T) of the text tokens that look at each item."""
        last = 0 if tap.kind != "last_row" else int(tap.options[0]) if tap.options else 1
        key = ("queries", last, tuple(id(state.item) for state in group))
        if key not in session.memo:
            layout = session.layout
            wanted = [layout.last_tokens(state.item.row, last) if last else layout.text_after(state.item) for state in group]
            most = max(int(w.numel()) for w in wanted)
            positions = torch.stack([torch.cat([w, w[-1:].expand(most - w.numel())]) for w in wanted])
            weights = torch.stack([(torch.arange(most) < w.numel()).float() / w.numel() for w in wanted])
            rows = torch.tensor([state.item.row for state in group])
            session.memo[key] = tuple(x.to(session.device, non_blocking=True) for x in (rows, positions, weights))
        return session.memo[key]  # type: ignore[no-any-return]

    def _keys(self, session: Session, attn: nn.Module, states: Tensor, rotary: Any, entry: Any, ran: bool) -> tuple[Tensor, int]:
        """(B, Hkv, S, d) rotated keys, past ones first, and how many are past."""
        stored = entry.stored_keys() if isinstance(entry, PrunedLayer) else None
        if ran and stored is not None:
            return stored, stored.shape[2] - states.shape[1]
        keys = _attention.project(attn, states, "k")
        if rotary is not None:
            keys = _attention.rotate(attn, keys, *rotary)
        if not isinstance(entry, PrunedLayer) or session.trace.past_length == 0:
            return keys, 0
        if stored is None:
            raise UnsupportedCallError(
                "this method reads attention over earlier turns, which a quantized cache does not hold as it was computed. "
                "Use the default cache, or a method that needs no attention (see `vlprune methods`)."
            )
        return torch.cat([stored, keys], dim=2), stored.shape[2]

    def _transition_hook(self, tap: Tap, offset: int) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            session = self.pruner.session
            if session is None:
                return
            before = (args[0] if args else kwargs["hidden_states"]).float()
            session.move(before.device)
            after = (output[0] if isinstance(output, tuple) else output).float()
            size_in, size_out = before.norm(dim=-1), after.norm(dim=-1)                  # (B, Lc)
            cosine = (before * after).sum(dim=-1) / (size_in * size_out).clamp(min=1e-8)
            weight = (1 - cosine).exp() * session.real_tokens()
            values = torch.stack([size_out / size_in, cosine, weight.sum(dim=1, keepdim=True).expand_as(cosine)], dim=-1)
            parts = session.memo.setdefault(("transition", tap), {})
            parts[offset] = values
            if len(parts) < 2:
                return
            both = torch.cat([parts[0], parts[3]], dim=-1)                               # (B, Lc, 6)
            for group in (group for tokens in self.pruner.tap_sets(tap) for group in session.groups(tokens)):
                rows = torch.tensor([state.item.row for state in group]).to(both.device, non_blocking=True)
                slots = torch.stack([state.slots for state in group])
                self._store(session, tap, group, both[rows[:, None], slots])

        return hook


def text_raters(visual: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """(G, T) bool: text tokens (G, T, D) that get more than the average share when every visual token (G, n, D) spreads itself over the text."""
    pointed = (visual @ text.mT).masked_fill(~valid[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)     # (G, T)
    average = pointed.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True)
    found = (pointed > average) & valid
    return torch.where(found.any(dim=1, keepdim=True), found, valid)     # all alike (one text token): all of them


def position_response(attn: nn.Module, rotary: Any, rows: Tensor, slots: Tensor, columns: Tensor, width: int) -> Tensor:
    """(G, T, n) logits that positions alone would give: vectors of ones, rotated to the places of queries ``slots`` and keys ``columns``."""
    if rotary is None:
        raise UnsupportedCallError("rater_rows_plus divides by what rotary positions alone would give, and this decoder has no rotary positions")
    sides = []
    for places in (slots, columns):
        cos, sin = (_rows_of(part, rows, places) for part in rotary)
        sides.append(_attention.rotate(attn, cos.new_ones(*places.shape[:1], 1, places.shape[1], width), cos, sin)[:, 0].float())
    return sides[0] @ sides[1].mT * width**-0.5


def rater_rows_plus(attention: Tensor, weights: Tensor, response: Tensor, num_heads: int) -> Tensor:
    """SparseVLM+: attention (G, H, T, n) over ``response`` (G, T, n), then the mean over raters and over the heads with most of it.

    ``weights`` (G, T) are one over the number of raters at raters, else 0. Nothing keeps the response away from zero: as released.
    """
    by_head = ((attention / response[:, None]) * weights[:, None, :, None]).sum(dim=2)   # (G, H, n)
    best = by_head.sum(dim=2).topk(min(num_heads, by_head.shape[1]), dim=1).indices
    return by_head.gather(1, best[..., None].expand(-1, -1, by_head.shape[2])).mean(dim=1)


def _in_order(group: list[ItemState]) -> bool:
    return all(state.item.row == number for number, state in enumerate(group))


def _rows_of(part: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Rotary table (..., B or 1, L, d) at (G, T) slots of batch rows (G,)."""
    own = part[..., rows, :, :] if part.shape[-3] > 1 else part.expand(*part.shape[:-3], rows.shape[0], *part.shape[-2:])
    places = slots[..., None].expand(*own.shape[:-2], slots.shape[1], own.shape[-1])
    return torch.gather(own, -2, places)
