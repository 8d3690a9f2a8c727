"""The middle of the flow: tokens and signals in, kept rows out. Pure tensors; knows no model and no part by name."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlprune.budget import Budget
from vlprune.errors import NotFiniteError, OptionError
from vlprune.method import Bypass, PruningMethod, Stage
from vlprune.points import BeforeLLM, Point
from vlprune.protocols import GenerationState, Reduced, ScoreInputs, Selection, Tap, gather_tokens, mark
from vlprune.tokens import TokenLayout, VisualItem
from vlprune.trace import PointRecord, Trace

TEXT_KINDS = ("text_states", "text_normed", "text_key_l1")
TEXT_VALID = Tap("text_valid", 0)
SURVIVES = Tap("survives", 0)


@dataclass
class ItemState:
    """A visual item on its way through the model.

    Attributes:
        slots: (n,) places of its remaining tokens in the current, shortened row.
        original: (n,) their numbers within the item before any reduction.
        sizes: (n,) how many original tokens each stands for, or ``None``.
        roles: (n,) what the last stage with roles kept each as, or ``None``.
    """

    item: VisualItem
    slots: Tensor
    original: Tensor
    sizes: Tensor | None = None
    roles: Tensor | None = None


@dataclass
class Cut:
    """One reduction of the sequence: rows ``order`` of the sequence before it stay.

    Attributes:
        order: (B, L') places in the sequence before the cut. Short rows repeat their last place.
        before: (B, L, D) hidden states before the cut, for the rows that left.
        layer: decoder layer before which it happened.
        restore: layer before which the rows come back, ``None`` for the output.
    """

    order: Tensor
    before: Tensor
    layer: int
    restore: int | None = None
    last: Tensor | None = None              # (B, L') clamps places to the row's own length; None: no row is short
    undo: Any = None


#: ``(tap, items) -> (G, n) or (G, n, C)``: the signal, aligned with each item's current tokens.
Collect = Callable[[Tap, list[ItemState]], Tensor]


@dataclass
class Session:
    """One prefill call: what is where, what stayed, what was seen. Belongs to one thread and one forward pass."""

    pruner: Pruner
    layout: TokenLayout
    device: torch.device
    index: Tensor | None = None             # (B, Lc) original place of every current row entry; None: nothing left yet
    valid: Tensor | None = None             # (B, Lc) false on repeated entries of short rows; None: no row is short
    lengths: list[int] = field(default_factory=list)    # entries of each row, filler not counted
    pads: list[int] = field(default_factory=list)       # of these, padding
    gone: list[int] = field(default_factory=list)       # tokens of each row that left; padding not counted
    items: list[ItemState] = field(default_factory=list)
    rows: dict[str, list[ItemState]] = field(default_factory=dict)      # "text" and "all": one item a row
    stale: set[str] = field(default_factory=set)            # sets of which nobody knows what is left: a stage chose among "all" tokens
    cuts: list[Cut] = field(default_factory=list)
    history: list[Cut] = field(default_factory=list)    # every cut of the call, also those of skips that ended
    signals: dict[Any, Any] = field(default_factory=dict)
    nan_flags: list[tuple[str, Tensor]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    memo: dict[Any, Any] = field(default_factory=dict)
    projectors: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)     # by id of the item, see `ScoreInputs.project`
    plain: bool = False                     # masks, windows aside, mean "causal, and no padding" and nothing else

    def __post_init__(self) -> None:
        self.lengths = [self.layout.length] * self.layout.num_rows
        self.pads = (~self.layout.valid_mask()).sum(dim=1).tolist()
        self.gone = [0] * self.layout.num_rows
        if not self.items:
            for item in self.layout.items:
                slots = item.positions.to(self.device, non_blocking=True)
                self.items.append(ItemState(item, slots, torch.arange(item.num_tokens, device=self.device)))
        for tokens in self.pruner.row_sets:
            found = self.layout.token_rows(tokens, self.pruner.protect)
            self.rows[tokens] = [
                ItemState(item, item.positions.to(self.device, non_blocking=True), torch.arange(item.num_tokens, device=self.device)) for item in found
            ]

    def states(self, tokens: str = "visual") -> list[ItemState]:
        """The items of a set of tokens."""
        if tokens in self.stale:
            raise OptionError(
                f"{self.pruner.method.name} chooses among {tokens} tokens behind a stage that chose among all tokens, so how many are left is not known. "
                "Let the stage for all tokens act last."
            )
        return self.items if tokens == "visual" else self.rows[tokens]

    def every(self) -> list[ItemState]:
        """The items of all sets."""
        return [*self.items, *(state for states in self.rows.values() for state in states)]

    @property
    def length(self) -> int:
        """Current length of the (padded) rows."""
        return max(self.lengths)

    def move(self, device: torch.device) -> None:
        """Follow the hidden states to the device of the next layers (``device_map``); free where they are there already."""
        if device == self.device:
            return
        self.device = device
        self.memo.clear()
        self.index = None if self.index is None else self.index.to(device)
        self.valid = None if self.valid is None else self.valid.to(device)
        self.signals = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.signals.items()}
        for state in self.every():
            state.slots, state.original = state.slots.to(device), state.original.to(device)
            state.sizes = None if state.sizes is None else state.sizes.to(device)
            state.roles = None if state.roles is None else state.roles.to(device)

    def real_tokens(self) -> Tensor:
        """(B, Lc) bool: entries that are neither padding nor filler."""
        key = ("real", id(self.index))
        if key not in self.memo:
            real = self.layout.valid_mask().to(self.device, non_blocking=True)
            if self.index is not None:
                real = torch.gather(real, 1, self.index)
            self.memo[key] = (real if self.valid is None else real & self.valid, self.index)
        return self.memo[key][0]  # type: ignore[no-any-return]

    def mask_of(self, tokens: str) -> Tensor:
        """(B, Lc) bool: entries of a set of tokens, protected ones included; filler repeats what it repeats."""
        key = ("set", tokens, id(self.index))
        if key not in self.memo:
            mask = self.layout.set_mask(tokens).to(self.device, non_blocking=True)
            self.memo[key] = (mask if self.index is None else torch.gather(mask, 1, self.index), self.index)
        return self.memo[key][0]  # type: ignore[no-any-return]

    def key_bias(self) -> Tensor | None:
        """(B, Lc) log of how many tokens each entry stands for; ``None`` while all stand for themselves."""
        if not any(state.sizes is not None for state in self.every()):
            return None
        bias = torch.zeros(self.layout.num_rows, self.length, device=self.device)
        for state in self.every():
            if state.sizes is not None:
                bias[state.item.row, state.slots] = state.sizes.float().log()
        return bias

    def moved(self) -> Tensor:
        """(B, Lc) how many tokens that stood before each entry have left; padding does not count."""
        assert self.index is not None
        before = self.layout.valid_mask().to(self.device, non_blocking=True).cumsum(dim=1)
        return torch.gather(before, 1, self.index) - self.real_tokens().cumsum(dim=1)

    def slots_of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Current places (G, T) of original positions (G, T) that are all still there, in batch rows (G,)."""
        if self.index is None:
            return positions
        return torch.searchsorted(self.index[rows].contiguous(), positions.contiguous())

    def groups(self, tokens: str = "visual") -> list[list[ItemState]]:
        """Items that can be scored in one call: same current and original size, same modality, both with or without grid."""
        found: dict[Any, list[ItemState]] = defaultdict(list)
        for state in self.states(tokens):
            lacks = (state.item.grid is None, state.sizes is None, state.roles is None)
            item = state.item
            found[state.slots.numel(), item.num_tokens, item.num_frames, item.modality, lacks, item.protected].append(state)
        return list(found.values())

    @property
    def idle(self) -> bool:
        """Whether budgets alone say that nothing of this prompt leaves or passes by, and nothing else acts on what the cache holds."""
        method = self.pruner.method
        masks = any(bypass.in_prompts and bypass.rows is not None for bypass in method.bypasses)
        keeps = any(attend.keys is not None or not attend.stateless for attend in method.attends)
        if method.follows_decoding or keeps or method.decode_selects or method.keys_from or method.route_masks or masks:
            return False
        return all(
            num_to_keep(part.budget, state.item) >= state.slots.numel()
            for part in self.pruner.choosing() if part.budget is not None for state in self.states(part.tokens)
        )  # fmt: skip

    def reduce(self, stage: Stage, hidden: Tensor, collect: Collect) -> Tensor | None:
        """Run a stage on ``hidden`` (B, Lc, D); returns the shortened hidden states, or ``None`` if everything stays."""
        self.move(hidden.device)
        before = [state.slots.numel() for state in self.states(stage.tokens)]
        chosen: list[tuple[list[ItemState], Selection, Reduced]] = []
        alone = getattr(stage.selector, "one_by_one", False)             # the data say how many stay, so every item has a number of its own
        for group in self.groups(stage.tokens):
            for part in [[state] for state in group] if alone else [group]:
                chosen.extend(self._choose(stage, part, hidden, collect))
        changed = bool(chosen)
        if changed:
            self._record(stage.point, before, chosen, stage.tokens)
            hidden = self._shorten(stage.point.layer, stage.restore, hidden, chosen, stage.tokens)
        else:
            self._record(stage.point, before, [], stage.tokens)
        return hidden if changed else None

    def _choose(self, stage: Stage, group: list[ItemState], hidden: Tensor, collect: Collect) -> list[tuple[list[ItemState], Selection, Reduced]]:
        current = group[0].slots.numel()
        self.check_modality(group)
        num_keep = min(current, num_to_keep(stage.budget, group[0].item))
        if current == 0 or num_keep == current:
            return []
        with torch.no_grad(), self.pruner.timed():      # choosing has no gradient; merging does
            found = self._select(stage, group, hidden, num_keep, collect)
        if found is None:
            return []
        group, inputs, selection = found
        if stage.reducer.exact:
            return [(group, selection, Reduced())]
        slots = torch.stack([state.slots for state in group])
        rows = torch.tensor([state.item.row for state in group]).to(hidden.device, non_blocking=True)
        inputs = replace(inputs, tokens=hidden[rows[:, None], slots])
        if torch.is_grad_enabled():                     # features that are merged before the projector carry gradients too
            features = {tap: collect(tap, group) for tap in stage.needs if tap.kind == "vision_states"}
            inputs = replace(inputs, signals={**inputs.signals, **features})
        return [(group, selection, stage.reducer(inputs, selection))]

    def _select(
        self, stage: Stage | Bypass, group: list[ItemState], hidden: Tensor, num_keep: int, collect: Collect
    ) -> tuple[list[ItemState], ScoreInputs, Selection] | None:
        inputs = self._inputs(stage, group, hidden, num_keep, collect)
        if stage.gate is not None:
            acts = stage.gate(inputs).tolist()      # the one host read of an adaptive method
            group = [state for state, act in zip(group, acts, strict=True) if act]
            if not group:
                return None
            if not all(acts):
                inputs = self._inputs(stage, group, hidden, num_keep, collect)
        assert stage.scorer is not None
        scores = stage.scorer(inputs).float()
        flops = getattr(stage.scorer, "flops", None)                     # of scorers that are nets of their own
        self.trace.scorer_flops += 0.0 if flops is None else flops(inputs)
        if scores.shape != inputs.tokens.shape[:2]:
            expected = tuple(inputs.tokens.shape[:2])
            raise OptionError(f"scorer {type(stage.scorer).__name__} returned shape {tuple(scores.shape)}, expected {expected} (items, tokens)")
        self._check_finite(stage, scores)
        return group, inputs, (TOP if stage.selector is None else stage.selector)(scores, inputs)

    def _inputs(self, stage: Stage | Bypass, group: list[ItemState], hidden: Tensor, num_keep: int, collect: Collect) -> ScoreInputs:
        rows = torch.tensor([state.item.row for state in group]).to(hidden.device, non_blocking=True)
        slots = torch.stack([state.slots for state in group])                        # (G, n)
        original = torch.stack([state.original for state in group])
        grid = None
        if group[0].item.grid is not None:
            grids = torch.stack([state.item.grid for state in group if state.item.grid is not None])
            grid = gather_tokens(grids.to(hidden.device, non_blocking=True), original)
        sizes = torch.stack([s.sizes for s in group if s.sizes is not None]) if group[0].sizes is not None else None
        return ScoreInputs(
            tokens=hidden[rows[:, None], slots],
            num_keep=num_keep,
            grid=grid,
            original=original,
            num_original=group[0].item.num_tokens,
            modality=group[0].item.modality,
            signals={tap: collect(tap, group) for tap in stage.needs},
            sizes=sizes,
            text_valid=collect(TEXT_VALID, group) if any(tap.kind in TEXT_KINDS for tap in stage.needs) else None,
            project=self.projectors.get(id(group[0].item)) if stage.point.layer == 0 and stage.point.tower == "decoder" else None,
            num_frames=group[0].item.num_frames if grid is not None and group[0].item.modality == "video" else None,
            roles=torch.stack([s.roles for s in group if s.roles is not None]) if group[0].roles is not None else None,
        )

    def _check_finite(self, stage: Stage | Bypass, scores: Tensor) -> None:
        """NaN is an error. On a GPU the flag is read once, at the end of the forward, not here."""
        flag = scores.isnan().any()
        if flag.device.type == "cpu" and bool(flag):
            raise nan_error(self.pruner.method.name, stage.point.label)
        if flag.device.type != "cpu":
            self.nan_flags.append((stage.point.label, flag))

    def finish(self) -> None:
        """Read the NaN flags that were left for the end of the forward pass."""
        for label, flag in self.nan_flags:
            if bool(flag):
                raise nan_error(self.pruner.method.name, label)

    def _shorten(
        self, layer: int, restore: int | None, hidden: Tensor, chosen: list[tuple[list[ItemState], Selection, Reduced]], tokens: str = "visual"
    ) -> Tensor:
        num_rows, length = hidden.shape[:2]
        device = hidden.device
        places = torch.arange(length, device=device)
        old_lengths = torch.tensor(self.lengths).to(device, non_blocking=True)
        keep = places[None, :] < old_lengths[:, None]                                # (B, Lc)
        gone = [0] * num_rows
        put: list[tuple[Tensor, list[ItemState], Tensor, Reduced]] = []
        undo_items = [(s.slots, s.original, s.sizes, s.roles) for s in self.every()]
        for group, selection, reduced in chosen:
            rows = torch.tensor([state.item.row for state in group]).to(device, non_blocking=True)
            slots = torch.stack([state.slots for state in group])
            stay = torch.gather(slots, 1, selection.keep_indices)                    # (G, K)
            mark(keep, rows, slots, False)
            mark(keep, rows, stay, True)
            for number, (state, kept) in enumerate(zip(group, selection.keep_indices, strict=True)):
                gone[state.item.row] += state.slots.numel() - kept.numel()
                state.original = state.original[kept]
                if selection.roles is not None:
                    state.roles = selection.roles[number]
                elif state.roles is not None:
                    state.roles = state.roles[kept]
            put.append((rows, group, stay, reduced))
        undo = (self.index, self.valid, self.lengths, self.pads, self.gone, undo_items, set(self.stale))
        real = [length - pads - lost for length, pads, lost in zip(self.lengths, self.pads, gone, strict=True)]
        new_length = max(real)
        pads = [min(count, new_length - tokens) for count, tokens in zip(self.pads, real, strict=True)]
        if pads != self.pads:                           # padding that no longer evens out the rows leaves too
            padding = ~self.real_tokens() & keep
            from_the_end = padding.flip(1).cumsum(dim=1).flip(1)
            keep &= ~(padding & (from_the_end > torch.tensor(pads).to(device, non_blocking=True)[:, None]))
        lengths = [tokens + count for tokens, count in zip(real, pads, strict=True)]
        order, valid, last = compact(keep, lengths)
        rank = keep.cumsum(dim=1) - 1
        shortened = gather_tokens(hidden, order)
        touched = {id(state) for group, _, _ in chosen for state in group}
        for rows, group, stay, reduced in put:
            slots = rank[rows[:, None], stay]
            for number, state in enumerate(group):
                state.slots = slots[number]
                if reduced.sizes is not None:
                    state.sizes = reduced.sizes[number]
                elif state.sizes is not None:
                    state.sizes = None
            if reduced.tokens is not None:
                shortened = shortened.index_put((rows[:, None], slots), reduced.tokens.to(shortened.dtype))
        for name, states in (("visual", self.items), *self.rows.items()):
            if tokens == "all" and name != "all":
                self.stale.add(name)                    # which of its tokens left is in the data
                continue
            for state in states:
                if id(state) in touched:
                    continue
                if name == "all" and gone[state.item.row]:      # visual or text tokens left: these are among all tokens, with what protects them
                    there = keep[state.item.row, state.slots].to(torch.uint8)
                    stay = there.argsort(descending=True, stable=True)[: state.slots.numel() - gone[state.item.row]]
                    state.slots, state.original = state.slots[stay], state.original[stay]
                    state.sizes = None if state.sizes is None else state.sizes[stay]
                    state.roles = None if state.roles is None else state.roles[stay]
                state.slots = rank[state.item.row, state.slots]
        self.cuts.append(Cut(order, hidden, layer, restore, last, undo))
        self.history.append(self.cuts[-1])
        self.index = order if self.index is None else torch.gather(self.index, 1, order)
        self.valid, self.lengths, self.pads = valid, lengths, pads
        self.gone = [before + now for before, now in zip(self.gone, gone, strict=True)]
        return shortened

    def pick(self, bypass: Bypass, states: Tensor, collect: Collect) -> tuple[Tensor, list[int]] | None:
        """Which entries run through a part of a layer, (B, Lc) bool, and how many of each row; ``None``: all. ``states`` (B, Lc, D) are what scorers see."""
        assert bypass.budget is not None
        self.move(states.device)
        mine = self.states(bypass.tokens)
        runs = torch.arange(states.shape[1], device=states.device) < torch.tensor(self.lengths).to(states.device, non_blocking=True)[:, None]
        counts, chosen = list(self.lengths), []
        for group in self.groups(bypass.tokens):
            current = group[0].slots.numel()
            num_keep = min(current, num_to_keep(bypass.budget, group[0].item))
            if num_keep == current:
                continue
            self.check_modality(group)
            rows = torch.tensor([state.item.row for state in group]).to(states.device, non_blocking=True)
            slots = torch.stack([state.slots for state in group])
            mark(runs, rows, slots, False)
            with torch.no_grad(), self.pruner.timed():
                if num_keep == 0 or bypass.scorer is None:
                    selection = Selection(slots.new_zeros(len(group), 0))
                else:
                    found = self._select(bypass, group, states, num_keep, collect)
                    assert found is not None
                    selection = found[2]
            mark(runs, rows, torch.gather(slots, 1, selection.keep_indices), True)
            for state in group:
                counts[state.item.row] -= current - num_keep
            chosen.append((group, selection, Reduced()))
        self._record(bypass.point, [state.slots.numel() for state in mine], chosen, bypass.tokens, self.trace.bypasses)
        return (runs, counts) if chosen else None

    def leave_tower(self, hidden: Tensor) -> Tensor:
        """What stages inside the vision tower dropped does not enter the decoder either; ``hidden`` (B, L, D) are its inputs."""
        states = [state for state in self.items if (SURVIVES, id(state.item)) in self.signals]
        if not states:
            return hidden
        self.check_modality(states)
        before = [state.slots.numel() for state in self.items]
        masks = [self.signals[SURVIVES, id(state.item)] > 0.5 for state in states]
        masks = [mask if state.item.grid is None else mask | (state.item.grid[:, 1] < 0).to(mask.device) for mask, state in zip(masks, states, strict=True)]
        counts = torch.stack([mask.sum() for mask in masks]).tolist()     # one host read, before any decoder layer
        chosen = []
        for state, mask, count in zip(states, masks, counts, strict=True):
            if count < mask.numel():
                kept = mask.to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
                chosen.append(([state], Selection(kept[None]), Reduced()))
        if not chosen:
            return hidden
        self._record(BeforeLLM(), before, chosen)
        return self._shorten(0, None, hidden, chosen)

    def check_modality(self, states: Iterable[ItemState]) -> None:
        """The method's own kind of item, or an error."""
        wanted = self.pruner.modality
        for state in states:
            if state.item.is_visual and wanted not in ("any", state.item.modality):
                raise OptionError(
                    f"{self.pruner.method.name} works on {wanted}s only, but the prompt holds {_article(state.item.modality)}. "
                    f"Choose a method for {state.item.modality}s (see `vlprune methods`)."
                )

    def restore(self, hidden: Tensor, cuts: Iterable[Cut] | None = None) -> Tensor:
        """Put the rows that left back in their places, newest cut first, each with the state it left with."""
        for cut in reversed(list(self.cuts if cuts is None else cuts)):
            if cut.last is not None:                    # repeated entries must write the same value
                hidden = gather_tokens(hidden, cut.last.to(hidden.device))
            places = cut.order.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
            hidden = cut.before.to(hidden).scatter(1, places, hidden)
        return hidden

    def bring_back(self, layer: int, hidden: Tensor) -> Tensor:
        """End the skips whose rows return before ``layer``."""
        while self.cuts and self.cuts[-1].restore == layer:
            cut = self.cuts.pop()
            hidden = self.restore(hidden, [cut])
            self.index, self.valid, self.lengths, self.pads, self.gone, items, self.stale = cut.undo
            for state, (slots, original, sizes, roles) in zip(self.every(), items, strict=True):
                state.slots, state.original, state.sizes, state.roles = slots, original, sizes, roles
        return hidden

    def _record(
        self, point: Point, before: list[int], chosen: list[tuple[list[ItemState], Selection, Reduced]], tokens: str = "visual",
        into: list[PointRecord] | None = None,
    ) -> None:
        kept = {id(state): (selection, number) for group, selection, _ in chosen for number, state in enumerate(group)}
        reached = sum(before) + sum(state.item.protected for state in self.states(tokens))
        record = PointRecord(point.label, self.pruner.method.name, reached, num_rows=self.layout.num_rows, tokens=tokens)
        for state in self.states(tokens):
            entry = kept.get(id(state))
            selection, number = entry if entry is not None else (None, 0)
            original = state.original if selection is None else state.original[selection.keep_indices[number]]
            roles = None if selection is None or selection.roles is None else selection.roles[number]
            record.add(state.item, original, roles, selection.role_names if selection is not None else ("kept",))
        (self.trace.points if into is None else into).append(record)


class Pruner:
    """A method made ready for one model: its stages by place, and what the calling threads are doing."""

    def __init__(self, method: PruningMethod, *, positions: str, modality: str = "any") -> None:
        self.method = method
        self.positions = positions
        self.modality = modality
        self.last_trace: Trace | None = None
        self.clock: Callable[[], float] | None = None
        self.clocked = 0.0
        self._local = threading.local()

    @cached_property
    def row_sets(self) -> tuple[str, ...]:
        """Sets of tokens besides the visual ones that the method looks at."""
        return tuple(tokens for tokens in ("text", "all") if tokens in self.method.token_sets)

    @property
    def protect(self) -> tuple[int, int]:
        """How many of the first and last text tokens of every row always stay: the most that a part of the method asks for."""
        asked = self.method.protects
        return max((first for first, _ in asked), default=0), max((last for _, last in asked), default=0)

    @property
    def on_text(self) -> bool:
        """Whether calls without visual tokens are its business, too."""
        return bool(self.row_sets)

    def tap_sets(self, tap: Tap) -> tuple[str, ...]:
        """Sets of tokens for which a signal is needed."""
        return tuple(dict.fromkeys(part.tokens for part in self.choosing() if tap in part.needs))

    def choosing(self) -> list[Stage | Bypass]:
        """Parts of the method that choose among tokens."""
        stages: list[Stage | Bypass] = [stage for stage in self.method.stages if not stage.budget.is_everything]
        return [*stages, *(bypass for bypass in self.method.bypasses if bypass.in_prompts and bypass.budget is not None)]

    def stages(self, tower: str) -> dict[int, list[Stage]]:
        """Stages of a tower by layer, in the order given."""
        found: dict[int, list[Stage]] = defaultdict(list)
        for stage in self.method.stages:
            if stage.point.tower == tower and not stage.budget.is_everything:
                found[stage.point.layer].append(stage)
        return dict(sorted(found.items()))

    def taps(self, tower: str) -> dict[Tap, int]:
        """Signals needed from a tower, with the first layer whose point looks at each."""
        first: dict[Tap, int] = {}
        for part in self.choosing():
            layer = part.point.layer + (isinstance(part, Bypass) and part.part == "mlp")     # behind the layer's own attention
            for tap in part.needs:
                if tap.tower == tower:
                    first[tap] = min(first.get(tap, layer), layer)
        return first

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time spent choosing, while somebody measures (``clock`` is set); otherwise free."""
        if self.clock is None:
            yield
            return
        start = self.clock()
        try:
            yield
        finally:
            self.clocked += self.clock() - start

    @property
    def session(self) -> Session | None:
        """The prefill this thread is in, if any."""
        return getattr(self._local, "session", None)

    @session.setter
    def session(self, value: Session | None) -> None:
        self._local.session = value

    @property
    def generation(self) -> GenerationState | None:
        """What policies remember of the generation this thread's call belongs to."""
        return getattr(self._local, "generation", None)

    @generation.setter
    def generation(self, value: GenerationState | None) -> None:
        self._local.generation = value

    @property
    def vision(self) -> dict[Any, Any]:
        """Signals of the vision tower call this thread is in, by tap."""
        return self._local.__dict__.setdefault("vision", {})  # type: ignore[no-any-return]

    @vision.setter
    def vision(self, value: dict[Any, Any]) -> None:
        self._local.vision = value

    @property
    def encoded(self) -> dict[str, Any]:
        """By modality, what this thread encoded last and no forward has used yet."""
        return self._local.__dict__.setdefault("encoded", {})  # type: ignore[no-any-return]

    @property
    def call(self) -> Any:
        """What the adapter notes about the model call this thread is in."""
        return getattr(self._local, "call", None)

    @call.setter
    def call(self, value: Any) -> None:
        self._local.call = value


class _TopK:
    """The highest scores, in order; what a bypass does that names no selector."""

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        return Selection(scores.topk(inputs.num_keep, dim=-1).indices.sort(dim=-1).values)


TOP = _TopK()


def compact(keep: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Places (B, n) that are true in ``keep`` (B, L), ``lengths`` of each row, in order; short rows repeat their last one.

    Also which of them count (``None``: all), and (B, n) places among them clamped to the row's own (``None``: no row is short).
    """
    length = max(lengths)
    order = torch.argsort(keep.to(torch.uint8), dim=1, descending=True, stable=True)[:, :length]     # kept first, in order
    if min(lengths) == length:
        return order, None, None
    ends = torch.tensor(lengths).to(keep.device, non_blocking=True)[:, None] - 1
    places = torch.arange(length, device=keep.device)[None, :]
    last = torch.minimum(places, ends)
    return torch.gather(order, 1, last), places <= ends, last


def num_to_keep(budget: Budget, item: VisualItem) -> int:
    """How many of an item's own tokens a budget leaves. Of a row, protected tokens count in it, and a number above its length is all of them."""
    if item.is_visual:
        return budget.num_keep(item.num_tokens, item.num_frames)
    total = item.num_tokens + item.protected
    everything = isinstance(budget.keep, int) and budget.keep >= total
    return item.num_tokens if everything else max(0, budget.num_keep(total) - item.protected)


def nan_error(method: str, label: str) -> NotFiniteError:
    """The error for NaN scores."""
    return NotFiniteError(
        f"{method} got NaN scores at {label}: the activations there are not finite. Check the inputs, or run the model in "
        "bfloat16 or float32 instead of float16; keep=1.0 runs it unpruned."
    )


def _article(modality: str) -> str:
    return f"an {modality}" if modality[0] in "aeiou" else f"a {modality}"
