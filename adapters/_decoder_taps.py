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
from vlprune.protocols import Tap
from vlprune.pruner import ItemState, Pruner, Session

ROW_KINDS = ("last_row", "text_rows", "text_mass")


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer."""
    for name in ("self_attn", "self_attention", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(f"{type(layer).__name__}: looked for self_attn or attention and found neither")


class DecoderTaps:
    """Collects what the stages of a method want to know about decoder layers."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner) -> None:
        self.layers, self.pruner = layers, pruner
        self.first_use = pruner.taps("decoder")

    def attach(self, hooks: HookSet) -> None:
        """Hook the layers that run before the point that looks; a tap at the point's own layer is probed there."""
        for tap, point_layer in self.first_use.items():
            if tap.layer >= point_layer:
                continue
            layer = self.layers[tap.layer]
            if tap.kind in ROW_KINDS:
                hooks.after(attention_of(layer), self._clocked(self._rows_hook(tap)))
            else:
                hooks.after(attention_of(layer), self._clocked(self._transition_hook(tap, 0)))
                hooks.after(layer.mlp, self._clocked(self._transition_hook(tap, 3)))  # type: ignore[arg-type]

    def _clocked(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> None:
            with self.pruner.timed():
                hook(*args)

        return timed

    def probe(self, session: Session, tap: Tap, group: list[ItemState], kwargs: dict[str, Any], entry: PrunedLayer | None, hidden: Tensor) -> Tensor:
        """(G, n) attention of a layer that has not run yet, from its own norm and projections on its input."""
        layer = self.layers[tap.layer]
        if tap.kind not in ROW_KINDS:
            raise UnsupportedCallError(f"signal {tap} needs the layer to have run; ask for an earlier layer")
        states = layer.input_layernorm(hidden)  # type: ignore[operator]
        return self._rows(session, tap, group, attention_of(layer), states, kwargs, entry, ran=False)

    def _store(self, session: Session, tap: Tap, group: list[ItemState], values: Tensor) -> None:
        """Keep (G, n, ...) values by original number, so that later stages can look after further drops."""
        for state, value in zip(group, values, strict=True):
            full = value.new_zeros(state.item.num_tokens, *value.shape[1:])
            full[state.original] = value
            session.signals[tap, id(state.item)] = full

    def _rows_hook(self, tap: Tap) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            session = self.pruner.session
            if session is None:
                return
            states = args[0] if args else kwargs["hidden_states"]
            layers = getattr(kwargs.get("past_key_values"), "layers", None)
            entry = layers[tap.layer] if layers else None
            for group in session.groups():
                values = self._rows(session, tap, group, module, states, kwargs, entry, ran=True)
                self._store(session, tap, group, values)

        return hook

    def _rows(
        self, session: Session, tap: Tap, group: list[ItemState], attn: nn.Module, states: Tensor, kwargs: dict[str, Any], entry: Any, *, ran: bool
    ) -> Tensor:
        session.move(states.device)
        rows, positions, weights = self._queries(session, tap, group)
        slots = session.slots_of(rows, positions)                                        # (G, T)
        queries = _attention.project(attn, states[rows[:, None], slots], "q")            # (G, H, T, d)
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            cos, sin = (_rows_of(part, rows, slots) for part in rotary)
            queries = _attention.rotate(attn, queries, cos, sin)
        keys, past = self._keys(session, attn, states, rotary, entry, ran)
        causal = bool(getattr(attn, "is_causal", True))
        filler = session.valid if past == 0 else None
        allowed = _attention.mask_rows(kwargs.get("attention_mask"), slots, rows, past, keys.shape[2], filler, causal)
        own_keys = keys if keys.shape[0] == len(group) and _in_order(group) else keys[rows]
        probabilities = _attention.attention_rows(attn, queries, own_keys, allowed)      # (G, T, S)
        received = (probabilities * weights[..., None]).sum(dim=1)                       # (G, S)
        columns = torch.stack([state.slots for state in group]) + past
        picked = torch.gather(received, 1, columns)                                      # (G, n)
        width = queries.shape[1] * queries.shape[3]
        session.trace.scorer_flops += 2.0 * width * (rows.shape[0] * slots.shape[1] * (keys.shape[2] + states.shape[-1]))
        if not (ran and entry is not None):
            session.trace.scorer_flops += 2.0 * states.shape[0] * states.shape[1] * states.shape[-1] * keys.shape[1] * keys.shape[3]
        return picked.sum(dim=1, keepdim=True).expand_as(picked) if tap.kind == "text_mass" else picked

    def _queries(self, session: Session, tap: Tap, group: list[ItemState]) -> tuple[Tensor, Tensor, Tensor]:
        """Batch rows (G,), original positions (G, T) and weights (G, T) of the text tokens that look at each item."""
        key = ("queries", tap.kind == "last_row", tuple(id(state.item) for state in group))
        if key not in session.memo:
            layout = session.layout
            wanted = [
                torch.tensor([layout.last_token(state.item.row)]) if tap.kind == "last_row" else layout.text_after(state.item) for state in group
            ]
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
            for group in session.groups():
                rows = torch.tensor([state.item.row for state in group]).to(both.device, non_blocking=True)
                slots = torch.stack([state.slots for state in group])
                self._store(session, tap, group, both[rows[:, None], slots])

        return hook


def _in_order(group: list[ItemState]) -> bool:
    return all(state.item.row == number for number, state in enumerate(group))


def _rows_of(part: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Rotary table (..., B or 1, L, d) at (G, T) slots of batch rows (G,)."""
    own = part[..., rows, :, :] if part.shape[-3] > 1 else part.expand(*part.shape[:-3], rows.shape[0], *part.shape[-2:])
    places = slots[..., None].expand(*own.shape[:-2], slots.shape[1], own.shape[-1])
    return torch.gather(own, -2, places)
