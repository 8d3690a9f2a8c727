"""How a vision tower is held: patch tokens leave in front of a block or in its middle, and are back in their places behind the last.

See `vlprune.adapters._middle` for what goes on in the middle of a block.

Shared by CLIP, SigLIP and ViT of transformers, open_clip and timm. The sequence is prefix tokens (CLS, distillation, registers;
they always stay), then the patches in raster order. Every image keeps the same number, so every shape is known before the data.

- **Shapes never change.** The last block's output has full length: a dropped token carries the state that it had when it left.
  Recorded hidden states are put back the same way (`VisionEngine.full_states`); where a host reads its blocks one by one
  (``forward_intermediates``), every block hands out full length (``recording``) and the next one gathers again.
- **Pooling sees survivors only.** CLS pooling is right as it is: CLS is never dropped. A mean, a maximum or an attention head over
  the tokens would mix in the stale states of dropped ones, so the adapters hand those the survivors (`VisionEngine.survivors`).
  Norms and projections behind the tower work token by token and need nothing.
- A tap reads a block that ran before the point. After an earlier drop it sees the shorter sequence; values are stored by the
  tokens' original numbers, so that a later point finds those of its own survivors.
- **Merged tokens count by their size** where the method says so (``size_bias``): the log of the size is added to the logits onto a merged token, in
  the blocks behind and in the signals read from them, and what pools over tokens sees each of them as often as its size says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _sequence
from vlprune.adapters._vision import STATE_KINDS, signal
from vlprune.errors import MissingSignalError, OptionError, UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.method import Bypass, Stage
from vlprune.protocols import Reduced, ScoreInputs, Selection, Tap, gather_tokens
from vlprune.pruner import Collect, Cut, ItemState, Pruner, Session
from vlprune.tokens import TokenLayout, VisualItem, raster_grid, square_grid
from vlprune.trace import PointRecord

#: Signals that are not made in the blocks.
ELSEWHERE = frozenset({"pixels", "sensitivity"})
#: ``(states (B, S, D)) -> queries, keys``, each (B, H, S, d), as the block computes them.
QueryKey = Callable[[Tensor], tuple[Tensor, Tensor]]


#: ``(args, kwargs, bias (B, L)) -> (args, kwargs)`` of a block.
BiasKeys = Callable[[tuple[Any, ...], dict[str, Any], Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class AttentionTap:
    """Where the attention of one block can be read.

    Attributes:
        module: its input (or output, see ``reads_output``) is what the block projects to queries and keys.
        query_key: that projection.
        scale: factor on the logits.
    """

    module: nn.Module
    query_key: QueryKey
    scale: float
    reads_output: bool = False


@dataclass
class VisionSession(Session):
    """One tower call: a `Session` whose rows are images of equal size, so that all of them are handled as one batch.

    Attributes:
        prefix: tokens in front of the patches, which never leave.
        grid: (N, 3) frame, row and column of every patch on the device, or ``None``.
        original: (B, n) numbers of the patches still there. sizes: (B, n) what each stands for, or ``None``.
        recording: every block hands out full length.
        bias: (B, L') log of the sizes, where attention counts by them, in the block at hand.
        guests: rows behind the patches that take part in the attention of the block at hand.
        waiting: states between attention and MLP, until the MLP's output is there; then ``done``, the block's output.
    """

    prefix: int = 0
    grid: Tensor | None = None
    original: Tensor = field(default_factory=lambda: torch.empty(0))
    sizes: Tensor | None = None
    recording: bool = False
    published: bool = False
    bias: Tensor | None = None
    guests: int = 0
    waiting: Tensor | None = None
    done: Tensor | None = None

    def __post_init__(self) -> None:
        """Every patch is there."""
        self.original = torch.arange(self.num_original, device=self.device).expand(self.layout.num_rows, -1)

    @property
    def num_original(self) -> int:
        """N, patches of an image."""
        return self.layout.length - self.prefix

    @property
    def length(self) -> int:
        """Current length of the rows."""
        return self.prefix + self.original.shape[1]

    def store(self, tap: Tap, values: Tensor) -> None:
        """Keep a signal (B, S) or (B, S, C) of the current rows by original number."""
        values = values[:, self.prefix :]
        if values.shape[1] != self.num_original:
            places = self.original.reshape(*self.original.shape, *[1] * (values.dim() - 2)).expand_as(values)
            values = values.new_zeros(values.shape[0], self.num_original, *values.shape[2:]).scatter(1, places, values)
        self.signals[tap] = values

    def cut(self, stage: Stage, hidden: Tensor) -> Tensor:
        """Run a stage on ``hidden`` (B, L', D); the same tensor if everything stays."""
        current = self.original.shape[1]
        num_keep = min(current, stage.budget.num_keep(self.num_original))
        if num_keep == current:
            self._note(stage, None)
            return hidden
        with torch.no_grad(), self.pruner.timed():      # choosing has no gradient; merging does
            found = self._select(stage, [], hidden, num_keep, _already_stored)
        assert found is not None                        # no gates here
        _, inputs, selection = found
        self._note(stage, selection)
        patches = hidden[:, self.prefix :]
        reduced = Reduced() if stage.reducer.exact else stage.reducer(replace(inputs, tokens=patches), selection)
        front = torch.arange(self.prefix, device=hidden.device).expand(hidden.shape[0], -1)
        order = torch.cat([front, selection.keep_indices + self.prefix], dim=1)          # (B, prefix + K)
        self.cuts.append(Cut(order, hidden, stage.point.layer, stage.restore, undo=(self.index, self.original, self.sizes)))
        self.history.append(self.cuts[-1])
        self.index = order if self.index is None else torch.gather(self.index, 1, order)
        self.original = torch.gather(self.original, 1, selection.keep_indices)
        kept = None if self.sizes is None else torch.gather(self.sizes, 1, selection.keep_indices)
        self.sizes = kept if reduced.sizes is None else reduced.sizes
        if reduced.tokens is None:
            return gather_tokens(hidden, order)
        return torch.cat([hidden[:, : self.prefix], reduced.tokens.to(hidden.dtype)], dim=1)

    def bring_back(self, layer: int, hidden: Tensor) -> Tensor:
        """End the skips whose rows return before ``layer``."""
        while self.cuts and self.cuts[-1].restore == layer:
            cut = self.cuts.pop()
            hidden = self.restore(hidden, [cut])
            self.index, self.original, self.sizes = cut.undo
        return hidden

    def key_bias(self) -> Tensor | None:
        """(B, L') log of how many patches each token stands for; ``None`` while all stand for themselves."""
        return None if self.sizes is None else torch.nn.functional.pad(self.sizes.float().log(), (self.prefix, 0))

    def counted(self) -> Tensor | None:
        """Places of the tokens that pooling sees; ``None``: all of them.

        Where attention counts by sizes, N entries stand for the N patches, and each merged token is among them as often as its size says; if patches
        were dropped besides, as near to that as N entries come.
        """
        if self.index is None or self.sizes is None or not self.pruner.method.size_bias:
            return self.index
        ends = self.sizes.float().cumsum(dim=1)
        asked = (torch.arange(self.num_original, device=ends.device) + 0.5) / self.num_original * ends[:, -1:]
        who = torch.searchsorted(ends, asked).clamp(max=ends.shape[1] - 1)
        return torch.cat([self.index[:, : self.prefix], torch.gather(self.index, 1, who + self.prefix)], dim=1)

    def _inputs(self, stage: Stage | Bypass, group: list[ItemState], hidden: Tensor, num_keep: int, collect: Collect) -> ScoreInputs:
        grid = None
        if self.grid is not None:
            grid = gather_tokens(self.grid.expand(self.original.shape[0], -1, -1), self.original)
        missing = [tap for tap in stage.needs if tap not in self.signals]
        if missing:
            raise MissingSignalError(
                f"{self.pruner.method.name} reads {missing[0]}, but that block's attention did not run through its module's hooks. Under torch.compile use a "
                "method that reads no attention, or run the tower uncompiled."
            )
        whole = self.original.shape[1] == self.num_original
        return ScoreInputs(
            tokens=hidden[:, self.prefix :],
            num_keep=num_keep,
            grid=grid,
            original=self.original,
            num_original=self.num_original,
            modality="image",
            signals={tap: self.signals[tap] if whole else gather_tokens(self.signals[tap], self.original) for tap in stage.needs},
            sizes=self.sizes,
        )

    def _note(self, stage: Stage, selection: Selection | None) -> None:
        rows = self.layout.num_rows
        record = PointRecord(stage.point.label, self.pruner.method.name, rows * self.original.shape[1], num_rows=rows)
        kept = self.original if selection is None else torch.gather(self.original, 1, selection.keep_indices)
        record.items, record.kept, record.roles = list(self.layout.items), list(kept.unbind(0)), [None] * rows
        if selection is not None and selection.roles is not None:
            record.roles, record.role_names = list(selection.roles.unbind(0)), selection.role_names
        self.trace.points.append(record)


def _already_stored(tap: Tap, group: list[ItemState]) -> Tensor:
    raise AssertionError("vision signals are read from the session")


class VisionEngine:
    """The stages and taps of a method on one tower.

    Args:
        blocks: in order; each takes the hidden states first and returns them (alone, or first in a tuple).
        pruner: of the method.
        prefix: tokens in front of the patches.
        taps: where attention can be read in each block; empty if nowhere.
        patches: the module whose (B, D, rows, columns) output tells the patch grid.
        sequence_first: whether the blocks work on (L, B, D).
        padding_masks: whether a two-dimensional mask is (B, L) padding (transformers) or an (L, L) map.
        shape: for the FLOPs count.
        check: called before the first block; raises if the model is about to run in a way that cannot be pruned.
        bias_keys: ``(args, kwargs, bias (B, L)) -> (args, kwargs)`` of a block with ``bias`` added to the logits onto its keys; ``None``: cannot be.
        alone: whether the tower is the whole model; inside a larger one, the rest of a method is the business of others.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        pruner: Pruner,
        *,
        prefix: int,
        taps: Sequence[AttentionTap] = (),
        patches: nn.Module | None = None,
        sequence_first: bool = False,
        padding_masks: bool = False,
        shape: TowerShape | None = None,
        check: Callable[[], None] | None = None,
        bias_keys: BiasKeys | None = None,
        alone: bool = True,
    ) -> None:
        self.alone, self.bias_keys = alone, bias_keys
        self.blocks, self.pruner, self.prefix, self.taps, self.patches = list(blocks), pruner, prefix, list(taps), patches
        self.sequence_first, self.padding_masks, self.shape, self.check = sequence_first, padding_masks, shape, check
        self.stages: dict[int, list[Stage]] = {}                         # at the input of each block, and in its middle
        self.middles: dict[int, list[Stage]] = {}
        for layer, stages in pruner.stages("vision").items():
            for stage in stages:
                (self.middles if stage.point.order > (layer, 0) else self.stages).setdefault(layer, []).append(stage)
        self.wanted: dict[int, list[Tap]] = {}
        for tap in pruner.taps("vision"):
            if tap.kind in ELSEWHERE:
                continue
            self.wanted.setdefault(tap.layer, []).append(tap)
        self._layouts: dict[tuple[int, int, Any], TokenLayout] = {}
        self._grids: dict[tuple[Any, torch.device], Tensor] = {}
        self._local = threading.local()

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in this tower."""
        return bool(self.stages or self.middles)

    @property
    def session(self) -> VisionSession | None:
        """The tower call this thread is in, if any."""
        return getattr(self._local, "session", None)

    def attach(self, hooks: HookSet) -> None:
        """Put the hooks on the blocks."""
        self._check_method()
        if not self.acts:
            return
        if self.patches is not None:
            hooks.after(self.patches, lambda module, args, kwargs, output: self._note_grid(output))
        for number, block in enumerate(self.blocks):
            hooks.before(block, self._before_block(number))
            hooks.after(block, self._after_block(number), first=True)    # before transformers records the output
        for layer, taps in self.wanted.items():
            attention = [tap for tap in taps if tap.kind not in STATE_KINDS]
            states = [tap for tap in taps if tap.kind in STATE_KINDS]
            if attention:
                hooks.after(self.taps[layer].module, self._tap_hook(self.taps[layer], attention))
            if states:
                hooks.after(self.blocks[layer], self._states_hook(states))

    def _check_method(self) -> None:
        method = self.pruner.method
        if self.alone and (method.bypasses or method.layer_skips):
            raise UnsupportedPointError(f"{method.name} skips rows or layers of a decoder, which a vision tower does not have")
        if self.acts and self.pruner.modality not in ("any", "image"):
            raise OptionError(f"{method.name} works on {self.pruner.modality}s only, but a vision tower sees images. Choose a method for images.")
        if self.alone and self.acts and self.pruner.positions == "renumber":
            raise UnsupportedModelError(
                "positions='renumber' means nothing here: a vision tower adds its position embeddings before its first block. Use positions='preserve'."
            )
        if method.size_bias and self.acts and self.bias_keys is None:
            raise UnsupportedPointError(f"{method.name} lets attention count merged tokens by their size, which this tower's attention cannot do")
        for stages in (*self.stages.values(), *self.middles.values()):
            for stage in stages:
                if stage.video is not None:
                    raise UnsupportedPointError(f"{method.name} chooses over the frames of a video inside the tower, and this tower sees pictures one by one")
                if stage.gate is not None:
                    raise UnsupportedPointError(
                        f"{method.name} decides image by image whether to drop, so the images of a batch would differ in length, which a vision "
                        "tower cannot run. Use a method with a fixed budget at vision points."
                    )
                for tap in stage.needs:
                    ran = (tap.layer, int(tap.kind in STATE_KINDS)) < stage.point.order     # a block's attention is there in its middle
                    if tap.tower != "vision" or not ran:
                        raise MissingSignalError(
                            f"{method.name} reads {tap}, but when {stage.point.label} is reached only {stage.point.layer} vision blocks have run"
                        )
                    if not self.taps:
                        raise MissingSignalError(f"{method.name} reads {tap}, but the attention of {type(self.blocks[tap.layer]).__name__} cannot be read")

    # one call

    @contextmanager
    def scope(self, *, recording: bool = False) -> Iterator[None]:
        """Around one call of the tower through a method: the session ends with it, and is published if it ended well."""
        self.enter(recording=recording)
        try:
            yield
            self.publish()
        finally:
            self.leave()

    def enter(self, *, recording: bool = False) -> None:
        """A tower call begins."""
        self._local.session, self._local.grid, self._local.recording = None, None, recording

    def leave(self) -> None:
        """The tower call is over, however it ended: nothing of it is held any longer."""
        self._local.session, self._local.grid, self._local.recording = None, None, False

    def publish(self) -> None:
        """Make the record of this call the handle's latest."""
        session = self.session
        if session is not None and not session.published:
            session.published = True
            session.finish()
            self.pruner.last_trace = session.trace

    def _note_grid(self, output: Any) -> None:
        self._local.grid = tuple(output.shape[-2:]) if isinstance(output, Tensor) and output.dim() == 4 else None

    def _start(self, hidden: Tensor) -> VisionSession:
        if self.check is not None:
            self.check()
        rows, length = hidden.shape[:2]
        grid = getattr(self._local, "grid", None)
        self._local.grid = None
        num_patches = length - self.prefix
        if grid is not None and grid[0] * grid[1] != num_patches:
            raise UnsupportedCallError(
                f"the tower cut the picture into {grid[0]} x {grid[1]} patches, but its first block got {num_patches} patch tokens. Switch patch dropout "
                "off (model.eval(), or patch_drop_rate=0): vlprune cannot know which patches are left."
            )
        layout = self._layout(rows, length, grid)
        session = VisionSession(self.pruner, layout, hidden.device, prefix=self.prefix, grid=self._device_grid(layout, grid, hidden.device))
        session.recording = getattr(self._local, "recording", False)
        session.trace.layout = layout
        session.trace.vision_sequences, session.trace.vision_dense = rows, rows * length
        session.trace.shapes = {} if self.shape is None else {"vision": self.shape}
        self._local.session = session
        return session

    def _layout(self, rows: int, length: int, grid: tuple[int, int] | None) -> TokenLayout:
        key = (rows, length, grid)
        layout = self._layouts.get(key)
        if layout is None:
            places = torch.arange(self.prefix, length)
            cells = square_grid(length - self.prefix) if grid is None else raster_grid(1, *grid)
            layout = TokenLayout(rows, length, [VisualItem(row, places, "image", row, cells) for row in range(rows)])
            remember(self._layouts, key, layout)
        return layout

    def _device_grid(self, layout: TokenLayout, grid: Any, device: torch.device) -> Tensor | None:
        cells = layout.items[0].grid if layout.items else None
        if cells is None:
            return None
        key = (grid or cells.shape[0], device)
        found = self._grids.get(key)
        if found is None:
            found = cells.to(device, non_blocking=True)
            remember(self._grids, key, found)
        return found

    # blocks

    def _before_block(self, number: int) -> Callable[..., Any]:
        stages = self.stages.get(number, [])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            hidden = arrived = given.transpose(0, 1) if self.sequence_first else given
            if number == 0:
                _sequence.check_checkpointing(module)
            session = self._start(hidden) if number == 0 else self.session
            if session is None:
                return None
            if session.recording and session.index is not None:
                hidden = gather_tokens(hidden, session.index)
            hidden = session.bring_back(number, hidden)
            for stage in stages:
                if stage.training in (None, module.training):
                    hidden = session.cut(stage, hidden)
            session.trace.vision_tokens.append(hidden.shape[0] * hidden.shape[1])
            masks = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor) and value is not given]
            if (self.wanted or self.pruner.method.size_bias) and (masks or kwargs.get("is_causal")):
                raise UnsupportedCallError(
                    f"{self.pruner.method.name} reads the tower's attention, which is not defined under an attention mask given to the tower. "
                    "Leave the mask out, or use a method that reads no attention (random, uniform)."
                )
            session.bias = session.key_bias() if self.pruner.method.size_bias else None
            if session.index is None and hidden is arrived:
                return None
            if self.sequence_first:
                hidden = hidden.transpose(0, 1).contiguous()
            rest = tuple(self._cut_mask(session, value) for value in args[1:])
            named = {name: hidden if value is given else self._cut_mask(session, value) for name, value in kwargs.items()}
            changed = ((hidden, *rest), named) if args else (args, named)
            if session.bias is None:
                return changed
            assert self.bias_keys is not None                            # checked before anything was attached
            return self.bias_keys(*changed, session.bias.to(hidden.dtype))

        return hook

    def _cut_mask(self, session: VisionSession, mask: Any) -> Any:
        """Every tensor that a block gets beside the states is a mask of the full sequence: cut its queries and its keys."""
        index = session.index
        if not isinstance(mask, Tensor) or index is None:
            return mask
        full = session.layout.length
        key = ("mask", id(mask), id(index))
        if key not in session.memo:
            rows = index.shape[0]
            padding = mask.dim() == 2 and self.padding_masks
            known = mask.dim() in (2, 4) or (mask.dim() == 3 and mask.shape[0] % rows == 0)
            if not known or mask.shape[-1] != full or not (padding or mask.shape[-2] in (1, full)):
                raise UnsupportedCallError(f"vision blocks got a mask of shape {tuple(mask.shape)}; known are (B, 1 or H, {full}, {full}) and ({full}, {full})")
            if padding:
                cut = torch.gather(mask.expand(rows, -1), 1, index)
            else:
                wide = mask[None, None] if mask.dim() == 2 else mask.reshape(rows, -1, *mask.shape[1:]) if mask.dim() == 3 else mask
                queries = index if wide.shape[2] == full else None
                cut = _sequence.cut_mask(wide, rows=queries, columns=index, columns_valid=None, query_positions=None, backend="")
                cut = cut.flatten(0, 1) if mask.dim() == 3 else cut
            session.memo[key] = (cut, mask, index)                       # the rest keeps the ids taken
        return session.memo[key][0]

    def _after_block(self, number: int) -> Callable[..., Any]:
        last = number == len(self.blocks) - 1

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            session = self.session
            if session is None or not (last or session.recording):
                return None
            first = output[0] if isinstance(output, tuple) else output
            if session.cuts:
                short = first.transpose(0, 1) if self.sequence_first else first
                first = session.restore(short)
                first = first.transpose(0, 1).contiguous() if self.sequence_first else first
            if last:
                self.publish()
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def _tap_hook(self, where: AttentionTap, taps: list[Tap]) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            session = self.session
            if session is None:                                          # recomputed in backward by gradient checkpointing
                return
            states = output if where.reads_output else args[0] if args else kwargs["hidden_states"]
            states = states.transpose(0, 1) if self.sequence_first else states
            with self.pruner.timed():
                queries, keys = where.query_key(states)
                bias = None if session.bias is None else torch.nn.functional.pad(session.bias, (0, session.guests))
                for tap in taps:
                    values = signal(tap, queries, keys, where.scale, None, bias)
                    session.store(tap, values[:, : states.shape[1] - session.guests])
                    session.trace.scorer_flops += _signal_flops(tap, states, queries)

        return hook

    def _states_hook(self, taps: list[Tap]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            session = self.session
            if session is None:
                return
            states = output[0] if isinstance(output, tuple) else output
            states = states.transpose(0, 1) if self.sequence_first else states
            for tap in taps:
                session.store(tap, states[:, :1].expand_as(states) if tap.kind == "cls_state" else states)

        return hook

    # what comes after the tower

    def survivors(self, tokens: Tensor) -> Tensor:
        """Prefix and surviving patches (B, L', D) of full-length ``tokens`` (B, L, D) of the call this thread is in, as pooling sees them."""
        session = self.session
        index = None if session is None or tokens.shape[1] != session.layout.length else session.counted()
        return tokens if index is None else gather_tokens(tokens, index)

    def full_states(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Recorded hidden states, entry ``i`` the input of block ``i``, at full length."""
        session = self.session
        if session is None:
            return tuple(states)
        restored = []
        for number, state in enumerate(states):
            block = max(number, 1)                                       # entry 0 is what block 0 got, after its own stages
            cuts = [cut for cut in session.history if cut.layer < block and (cut.restore is None or cut.restore >= block)]
            restored.append(state if state is None or state.shape[1] == session.layout.length else session.restore(state, cuts))
        return tuple(restored)


def remember(known: dict[Any, Any], key: Any, value: Any, most: int = 8) -> None:
    """Keep the few latest shapes."""
    if len(known) >= most:
        known.clear()
    known[key] = value


def _signal_flops(tap: Tap, states: Tensor, queries: Tensor) -> float:
    """Matrix products of the projections and of the signal itself."""
    rows, length, width = states.shape
    inner = queries.shape[1] * queries.shape[3]
    seen = {"column_mean": length, "cls_row": 1, "cls_row_heads": 1}.get(tap.kind, 0)
    return 2.0 * rows * length * inner * ((2 if seen else 1) * width + seen)
