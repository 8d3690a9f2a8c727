"""While decoding, layers attend to a selection of the visual keys, chosen at every step from an earlier layer's attention.

The cache keeps every key. Before a layer runs on one new token, its cache layer is told which entries to hand out (`PrunedLayer.view`), and its
mask is cut to them, so the attention really reads fewer keys; where copying them out would cost more than it saves, the others are masked. What is
visual, what was chosen and what the step before looked like is a `Selection`, held by the cache layers: beams and interleaved generations take it
along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.adapters import _attention, _sequence
from vlprune.adapters._cache import PrunedLayer, View
from vlprune.adapters._decoder_taps import attention_of
from vlprune.errors import UnsupportedCallError, UnsupportedPointError
from vlprune.hooks import HookSet
from vlprune.method import DecodeSelect
from vlprune.pruner import ItemState, Pruner, Session


@dataclass(eq=False)
class Selection:
    """The visual keys of one generation, and which of them are looked at now. Shared by the cache layers from ``DecodeSelect.layer`` on.

    Attributes:
        visual: (B, n) entries of visual tokens; ``count`` (B,) of them count, the rest is filler. fewest, most: of ``count``, known on the host.
        keep: (B,) how many stay in each row; ``keep_fewest`` and ``keep_most`` on the host.
        others: (B, m) the entries up to ``entries`` that are not visual; the first ``entries - count`` count.
        previous: (B, n) attention at the step before. chosen: (B, keep_most) entries looked at; the first ``keep`` count.
    """

    visual: Tensor
    count: Tensor
    fewest: int
    most: int
    keep: Tensor
    keep_fewest: int
    keep_most: int
    others: Tensor
    entries: int
    previous: Tensor | None = None
    chosen: Tensor | None = None
    step: dict[Any, Any] = field(default_factory=dict)              # what the layers of one step share
    _last: tuple[Any, Selection] | None = None

    def rows(self, index: Tensor) -> Selection:
        """Of other batch rows (beams); asked with the same tensor by every layer, answered once."""
        return self._once(index, index)

    def repeat(self, repeats: int) -> Selection:
        """Every row repeated; asked by every layer, answered once."""
        return self._once(("repeat", repeats), torch.arange(self.visual.shape[0]).repeat_interleave(repeats))

    def _once(self, key: Any, index: Tensor) -> Selection:
        same = self._last is not None and (self._last[0] is key or (isinstance(key, tuple) and isinstance(self._last[0], tuple) and self._last[0] == key))
        if self._last is None or not same:
            pick = index.to(self.visual.device)
            parts: dict[str, Any] = {name: getattr(self, name) for name in ("visual", "count", "keep", "others", "previous", "chosen")}
            rows: dict[str, Any] = {name: None if part is None else part[pick] for name, part in parts.items()}
            made = replace(self, **rows, step={}, _last=None)
            self._last = (key, made)
        return self._last[1]

    def choose(self, select: DecodeSelect, attention: Tensor) -> None:
        """Choose by the head-mean attention (B, n) of this step, or stay with the last choice where it looks alike."""
        there = torch.arange(attention.shape[1], device=attention.device) < self.count[:, None]
        ranked = attention.masked_fill(~there, -torch.inf)
        if select.choose is None:
            best = ranked.argsort(dim=1, descending=True, stable=True)[:, : self.keep_most]
        else:
            best = select.choose(ranked, self.keep_most)
        chosen = torch.gather(self.visual, 1, best)
        attention = attention.masked_fill(~there, 0.0)
        if select.reuse is not None and self.previous is not None and self.chosen is not None:
            alike = functional.cosine_similarity(attention, self.previous, dim=1) >= select.reuse
            chosen = torch.where(alike[:, None], self.chosen, chosen)
        self.previous, self.chosen, self.step = attention, chosen, {}

    def view(self, total: int) -> tuple[Tensor, Tensor | None]:
        """(B, S) entries to look at when a layer holds ``total``, and which of them count (``None``: all)."""
        assert self.chosen is not None
        batch, device = self.visual.shape[0], self.visual.device
        grown = torch.arange(self.entries, total, device=device).expand(batch, -1)
        index = torch.cat([self.others, self.chosen, grown], dim=1)
        if self.fewest == self.most and self.keep_fewest == self.keep_most:
            return index, None
        of_others = torch.arange(self.others.shape[1], device=device) < (self.entries - self.count)[:, None]
        of_chosen = torch.arange(self.keep_most, device=device) < self.keep[:, None]
        return index, torch.cat([of_others, of_chosen, torch.ones_like(grown, dtype=torch.bool)], dim=1)


class DecodeSelects:
    """The `DecodeSelect` parts of a method on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner, backend: Callable[[], str]) -> None:
        self.layers, self.pruner, self.backend = layers, pruner, backend
        self.selects = sorted((s for s in pruner.method.decode_selects if not s.budget.is_everything), key=lambda s: s.layer)
        self.grouped = any(getattr(attention_of(layer), "num_key_value_groups", 1) > 1 for layer in layers if self.selects)
        stages = [stage for places in pruner.stages("decoder").values() for stage in places]
        for select in self.selects:
            if not 0 <= select.reads < select.layer < len(layers):
                raise UnsupportedPointError(
                    f"{pruner.method.name} selects keys from layer {select.layer} on by the attention of layer {select.reads}; "
                    f"it must read an earlier layer, and this decoder has layers 0 to {len(layers) - 1}"
                )
            late = next((stage.point for stage in stages if max(stage.point.layer, stage.restore or 0) > select.reads), None)
            if late is not None:
                raise UnsupportedPointError(
                    f"{pruner.method.name} selects keys while decoding by the attention of layer {select.reads}, so every layer from there on must hold "
                    f"the same keys; but tokens leave or return at {late.label}. Let them leave at llm:{select.reads} or earlier, or decode with all keys."
                )
            skip = next((skip for skip in pruner.method.layer_skips if skip.layer >= select.reads), None)
            if skip is not None:
                raise UnsupportedPointError(
                    f"{pruner.method.name} selects keys while decoding by the attention of layer {select.reads}, so every layer from there on must hold "
                    f"the same keys; but layer {skip.layer} is skipped at times. Skip earlier layers, or decode with all keys."
                )

    def attach(self, hooks: HookSet) -> None:
        """Hook the layers that are looked at."""
        for select in self.selects:
            hooks.after(attention_of(self.layers[select.reads]), self._reading(select))

    def governing(self, number: int) -> DecodeSelect | None:
        """Whose selection layer ``number`` sees."""
        return next((select for select in reversed(self.selects) if select.layer <= number), None)

    def note(self, session: Session, cache: Any, number: int) -> None:
        """A prefill reaches layer ``number``: remember which entries of its cache layer are going to be visual."""
        select = self.governing(number)
        entry = _entry(cache, number)
        if select is None or entry is None:
            return
        first = _entry(cache, select.layer)
        assert first is not None
        entry.view = None
        if number == select.layer:
            session.check_modality(session.states(select.tokens))
            past = entry.length if entry.keymap is None else entry.keymap.entries(entry.length)
            entry.selection = _extended(entry.selection, session, select, past)
        else:
            entry.selection = first.selection

    def cut(self, number: int, cache: Any, kwargs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """A decoding step reaches layer ``number``, whose arguments fit all its entries: fit them to the selection."""
        entry = _entry(cache, number)
        if entry is None:
            return kwargs
        entry.view = None
        state: Selection | None = entry.selection
        if state is None or state.chosen is None or hidden.shape[1] != 1 or self.governing(number) is None:
            return kwargs
        total = entry.slots if entry.slots is not None else 1 + (entry.length if entry.keymap is None else entry.keymap.entries(entry.length))
        if state.step.get("length") != entry.length:
            state.step = {"length": entry.length}
        device = hidden.device
        if ("view", device) not in state.step:
            state.step["view", device] = self._view(state, total, device)
        entry.view, columns, valid = state.step["view", device]
        mask = kwargs.get("attention_mask")
        if mask is None and valid is None:
            return kwargs
        key = ("mask", device, id(mask))
        if key not in state.step:
            cut = _sequence.cut_mask(mask, rows=None, columns=columns, columns_valid=valid, query_positions=None, backend=self.backend())
            state.step[key] = (cut, mask)                           # the mask is kept so that its id stays taken
        return {**kwargs, "attention_mask": state.step[key][0]}

    def _view(self, state: Selection, total: int, device: torch.device) -> tuple[View | None, Tensor, Tensor | None]:
        """What is copied out of a layer's entries, if anything is; the columns (B, S) that attention gets and which of them count (``None``: all)."""
        index, valid = (None if part is None else part.to(device) for part in state.view(total))
        assert index is not None
        if self.copies(index.shape[1], total):
            return View(index), index, valid
        places = index if valid is None else torch.where(valid, index, total)
        seen = torch.zeros(index.shape[0], total + 1, dtype=torch.bool, device=device).scatter(1, places, True)[:, :total]
        return None, torch.arange(total, device=device).expand(index.shape[0], -1), seen

    def copies(self, selected: int, total: int) -> bool:
        """Whether to copy the selected entries out, so that attention reads them alone, rather than to hide the others from it.

        Copied entries are read, written and read again. With grouped keys a mask costs more: it makes the host library copy all keys for every head.
        """
        return 3 * selected <= total or self.grouped or "flash" in self.backend()

    def _reading(self, select: DecodeSelect) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs.get("past_key_values")
            states = args[0] if args else kwargs["hidden_states"]
            first, entry = _entry(cache, select.layer), _entry(cache, select.reads)
            if self.pruner.session is not None or first is None or entry is None or first.selection is None or states.shape[1] != 1:
                return
            state: Selection = first.selection
            keys, theirs = entry.stored_keys(), first.stored_keys()
            if keys is None or theirs is None:
                raise UnsupportedCallError(
                    f"{self.pruner.method.name} reads keys while decoding, which a quantized cache does not hold as they were computed; use the default cache"
                )
            if keys.shape[2] != theirs.shape[2] + 1:
                raise UnsupportedCallError(
                    f"layers {select.reads} and {select.layer} hold {keys.shape[2]} and {theirs.shape[2]} keys: the cache was changed by hand, and "
                    f"{self.pruner.method.name} cannot tell which of them are visual. Start from a new cache."
                )
            with self.pruner.timed():
                queries = _attention.project(module, states, "q")
                if kwargs.get("position_embeddings") is not None:
                    queries = _attention.rotate(module, queries, *kwargs["position_embeddings"])
                rows = torch.arange(states.shape[0], device=states.device)
                mask = kwargs.get("attention_mask")
                allowed = _attention.mask_rows(mask, rows[:, None] * 0, rows, keys.shape[2] - 1, keys.shape[2], None)
                attention = _attention.attention_rows(module, queries, keys, allowed).mean(dim=1)[:, 0]          # (B, P)
                state.choose(select, torch.gather(attention.to(state.visual.device), 1, state.visual))

        return hook


def _entry(cache: Any, number: int) -> PrunedLayer | None:
    layers = getattr(cache, "layers", None)
    entry = layers[number] if layers and number < len(layers) else None
    return entry if isinstance(entry, PrunedLayer) else None


def looked_at(select: DecodeSelect, state: ItemState) -> int:
    """How many of an item's remaining keys a step sees."""
    number, protected = state.slots.numel(), state.item.protected
    if isinstance(select.budget.keep, int) and select.budget.keep >= number + protected:
        return number
    return max(0, select.budget.num_keep(number + protected) - protected)


def _extended(old: Selection | None, session: Session, select: DecodeSelect, past: int) -> Selection:
    """The selection once the items of this prefill stand behind ``past`` entries; nothing is chosen yet."""
    rows, device = session.layout.num_rows, session.device
    places: list[list[Tensor]] = [[] for _ in range(rows)]
    keep = [0] * rows
    for state in session.states(select.tokens):
        places[state.item.row].append(state.slots)
        keep[state.item.row] += looked_at(select, state)
    joined = [torch.cat(part) if part else torch.zeros(0, dtype=torch.long, device=device) for part in places]
    counts = [part.numel() for part in joined]
    visual = past + torch.stack([functional.pad(part, (0, max(counts) - part.numel())) for part in joined])
    count, keeps = (torch.tensor(numbers).to(device, non_blocking=True) for numbers in (counts, keep))
    fewest, most, keep_fewest, keep_most = min(counts), max(counts), min(keep), max(keep)
    entries = past + session.length
    if old is not None:                                              # a second turn with pictures: filler goes to the end again
        there = [torch.arange(v.shape[1], device=device) < c.to(device)[:, None] for v, c in ((old.visual, old.count), (visual, count))]
        order = (~torch.cat(there, dim=1)).to(torch.uint8).argsort(dim=1, stable=True)
        fewest, most, keep_fewest, keep_most = fewest + old.fewest, most + old.most, keep_fewest + old.keep_fewest, keep_most + old.keep_most
        visual = torch.gather(torch.cat([old.visual.to(device), visual], dim=1), 1, order)
        count, keeps = count + old.count.to(device), keeps + old.keep.to(device)
    there_now = torch.arange(visual.shape[1], device=device) < count[:, None]
    is_visual = torch.zeros(rows, entries + 1, dtype=torch.uint8, device=device)
    is_visual = is_visual.scatter(1, torch.where(there_now, visual, entries), 1)[:, :entries]    # filler falls off the end
    others = is_visual.argsort(dim=1, stable=True)[:, : entries - fewest]
    return Selection(visual, count, fewest, most, keeps, keep_fewest, keep_most, others, entries)
