"""How a vision tower is held for a video: visual tokens leave with all their patches, and frames keep different numbers.

In front of the drop every frame is a row of the tower, as always. Behind it the frames are packed into fewer rows of the same length, under
a mask that lets each frame see itself only; behind the last block every patch is back in its place, dropped ones with the state that they
had when they left. Packing is exact: a token sees what it would see if the dropped ones were hidden. How many each frame kept is read back
once a call, to plan the rows.

The block in front of the drop may get a bias on its keys that is made of the scores, with gradients.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _sequence
from vlprune.errors import MissingSignalError, OptionError, UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.kernels.packing import Packing, pack_pictures
from vlprune.method import Stage
from vlprune.protocols import ScoreInputs, Tap
from vlprune.pruner import Pruner, nan_error
from vlprune.tokens import VisualItem, raster_grid
from vlprune.trace import PointRecord, Trace


@dataclass(frozen=True)
class Cells:
    """Which patches of a frame make which visual token: square maps of both, rows and columns alike.

    Attributes:
        axis: token row of every patch row, ascending.
    """

    axis: tuple[int, ...]

    @property
    def side(self) -> int:
        """Rows and columns of visual tokens."""
        return self.axis[-1] + 1

    @cached_property
    def token_of(self) -> Tensor:
        """(n,) the visual token of every patch, in raster order."""
        axis = torch.tensor(self.axis)
        return (axis[:, None] * self.side + axis[None]).flatten()

    @cached_property
    def members(self) -> Tensor:
        """(p, M) the patches of every visual token, n where it has fewer than M."""
        order = self.token_of.argsort(stable=True)
        counts = torch.bincount(self.token_of, minlength=self.side**2)
        rank = torch.arange(order.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        members = torch.full((counts.numel(), int(counts.max())), order.numel())
        members[self.token_of[order], rank] = order
        return members


@dataclass
class PackedSession:
    """One tower call on the frames of B videos.

    Attributes:
        frames: T of each video. length: S, patches and prefix of a frame.
        bias: (B T, 1, 1, S) for the keys of the block in front of the drop.
        packing: where the frames went, once they are packed. before: (B T, S, D) states at the drop.
    """

    videos: int
    frames: int
    prefix: int
    length: int
    cells: Cells
    device: torch.device
    signals: dict[Tap, Tensor] = field(default_factory=dict)
    keep: Tensor | None = None
    bias: Tensor | None = None
    packing: Packing | None = None
    before: Tensor | None = None
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)

    def patches(self, hidden: Tensor) -> Tensor:
        """(B, T p, M, D) the patches of every visual token in the states (B T, S, D); zeros where it has fewer than M."""
        members = self.cells.members.to(self.device, non_blocking=True)
        patches = hidden[:, self.prefix :]
        patches = torch.cat([patches, patches.new_zeros(patches.shape[0], 1, patches.shape[2])], dim=1)
        found = patches[:, members]                                                      # (B T, p, M, D)
        return found.reshape(self.videos, -1, *found.shape[2:])

    def spread(self, values: Tensor, front: float) -> Tensor:
        """(B, T p) values of visual tokens to (B T, S) values of their patches, ``front`` for the prefix."""
        token_of = self.cells.token_of.to(self.device, non_blocking=True)
        values = values.reshape(self.videos * self.frames, -1)[:, token_of]
        return torch.nn.functional.pad(values, (self.prefix, 0), value=front)


class PackedTower:
    """The one stage of a method for videos inside a tower.

    Args:
        blocks: in order; each takes the hidden states first and a mask as ``attention_mask``.
        pruner: of the method.
        prefix: tokens in front of the patches.
        cells: from the number of patches of a frame.
        shape: for the FLOPs count.
        backend: the attention implementation in use.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], pruner: Pruner, *, prefix: int, cells: Callable[[int], Cells], shape: TowerShape, backend: Callable[[], str]
    ) -> None:
        self.blocks, self.pruner, self.prefix, self.cells, self.shape, self.backend = list(blocks), pruner, prefix, cells, shape, backend
        self._local = threading.local()
        self.stage = self._the_stage()
        self.drop = self.stage.point.layer
        self.decide = self.drop - (self._key_bias is not None)

    @property
    def _key_bias(self) -> Callable[[Tensor, ScoreInputs], Tensor] | None:
        assert self.stage.video is not None
        return self.stage.video.key_bias

    def _the_stage(self) -> Stage:
        method = self.pruner.method
        stages = [stage for found in self.pruner.stages("vision").values() for stage in found]
        video = stages[0].video
        if len(stages) != 1 or video is None:
            raise UnsupportedPointError(f"{method.name} has {len(stages)} stages inside the tower; over the frames of a video there can be one, and no other")
        stage = stages[0]
        if stage.gate is not None or stage.restore is not None or not stage.reducer.exact:
            raise UnsupportedPointError(f"{method.name}: over the frames of a video tokens are dropped, not merged, brought back or decided on by a gate")
        first = stage.point.layer - (video.key_bias is not None)
        others = [tap for tap in self.pruner.taps("vision") if tap.kind != "patch_states"]
        if others:
            raise MissingSignalError(f"{method.name} reads {others[0]}, which cannot be had from a tower in which the frames of a video are packed")
        for tap in stage.needs:
            if tap.layer >= first:
                raise MissingSignalError(f"{method.name} reads {tap}, but its scores are needed at the input of vision block {first}")
        return stage

    def attach(self, hooks: HookSet) -> None:
        """Put the hooks on the blocks."""
        self._check_backend()
        for number, block in enumerate(self.blocks):
            hooks.before(block, self._before_block(number))
        hooks.after(self.blocks[-1], self._after_last, first=True)       # before transformers records the output

    def _check_backend(self) -> None:
        if self.backend() not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"{self.pruner.method.name} needs attention masks in the vision tower, which {self.backend()} does not take. Load the model with "
                "attn_implementation={'vision_config': 'sdpa', 'text_config': ...}; the language model may use what it likes."
            )

    # one call

    @property
    def session(self) -> PackedSession | None:
        """The tower call this thread is in, if any."""
        return getattr(self._local, "session", None)

    def videos(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the encoding of videos (B, T, 3, height, width): tells how many frames belong together."""
        pixels = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 5)
        self._local.frames = int(pixels.shape[1])
        try:
            return original(*args, **kwargs)
        finally:
            self._local.frames = None

    def enter(self, *, recording: bool = False) -> None:
        """A tower call begins."""
        self._local.session = None
        if getattr(self._local, "frames", None) is None:
            raise OptionError(
                f"{self.pruner.method.name} works on videos only, but the tower got pictures. Choose a method for images (see `vlprune methods`)."
            )

    def leave(self) -> None:
        """The tower call is over, however it ended."""
        self._local.session = None

    def _start(self, hidden: Tensor) -> PackedSession:
        self._check_backend()
        rows, length = hidden.shape[:2]
        frames = self._local.frames
        session = PackedSession(rows // frames, frames, self.prefix, length, self.cells(length - self.prefix), hidden.device)
        session.trace.vision_sequences, session.trace.vision_dense = rows, rows * length
        session.trace.shapes = {"vision": self.shape}
        self._local.session = session
        return session

    # blocks

    def _before_block(self, number: int) -> Callable[..., Any]:
        taps = [tap for tap in self.stage.needs if tap.layer + 1 == number]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = given = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                _sequence.check_checkpointing(module)
            session = self._start(hidden) if number == 0 else self.session
            if session is None or (self.stage.training is not None and self.stage.training != module.training):
                return None
            if kwargs.get("attention_mask") is not None or any(part is not None for part in args[1:]):
                raise UnsupportedCallError(f"{self.pruner.method.name} masks the frames of a video itself; call the tower without an attention mask")
            for tap in taps:
                session.signals[tap] = session.patches(hidden)
            if number == self.decide:
                self._choose(session, hidden)
            if number == self.drop:
                hidden = self._pack(session, hidden)
            session.trace.vision_tokens.append(hidden.shape[0] * hidden.shape[1])
            mask = self._mask(session, number, hidden.dtype)
            if hidden is given and mask is None:
                return None
            named = {**kwargs, "attention_mask": mask}
            return ((hidden,), named) if args else (args, {**named, "hidden_states": hidden})

        return hook

    def _mask(self, session: PackedSession, number: int, dtype: torch.dtype) -> Tensor | None:
        if number < self.drop:
            return session.bias.to(dtype) if number == self.decide and session.bias is not None else None
        assert session.packing is not None
        if self.backend() == "sdpa":
            dtype = torch.bool
        if dtype not in session.masks:
            mask = session.packing.mask
            lowest = None if dtype == torch.bool else torch.finfo(dtype).min
            session.masks[dtype] = mask if lowest is None else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
        return session.masks[dtype]

    def _choose(self, session: PackedSession, hidden: Tensor) -> None:
        """Scores, the bias made of them, and what stays."""
        stage, pruner = self.stage, self.pruner
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._key_bias is not None), pruner.timed():
            inputs = self._inputs(session, hidden)
            scores = stage.scorer(inputs).float()
            if scores.shape != inputs.tokens.shape[:2]:
                raise OptionError(f"scorer {type(stage.scorer).__name__} returned shape {tuple(scores.shape)}, expected {tuple(inputs.tokens.shape[:2])}")
            bias = None if self._key_bias is None else session.spread(self._key_bias(scores, inputs), 0.0)
            session.bias = None if bias is None else bias[:, None, None, :]
        with torch.no_grad(), pruner.timed():
            kept = stage.selector(scores.detach(), inputs).keep_indices                  # (B, K)
            stays = torch.zeros(inputs.tokens.shape[:2], device=session.device).scatter(1, kept, 1.0)
            session.keep = session.spread(stays, 1.0) > 0.5
            counts = torch.cat([session.keep.sum(dim=1), scores.isnan().any().long()[None]]).tolist()      # the one host read
            if counts.pop():
                raise nan_error(pruner.method.name, stage.point.label)
            assert stage.video is not None
            session.packing = pack_pictures(session.keep, counts, refill=stage.video.refill)
        session.trace.scorer_flops += getattr(stage.scorer, "flops", lambda inputs: 0.0)(inputs)
        self._record(session, inputs, kept, stays, bias)

    def _inputs(self, session: PackedSession, hidden: Tensor) -> ScoreInputs:
        grid = raster_grid(session.frames, session.cells.side, session.cells.side).to(session.device, non_blocking=True)
        total = grid.shape[0]
        sizes = (session.cells.members < session.cells.token_of.numel()).sum(dim=1).repeat(session.frames).to(session.device)
        return ScoreInputs(
            tokens=session.patches(hidden).sum(dim=2) / sizes[:, None],
            num_keep=min(total, self.stage.budget.num_keep(total, session.frames)),
            grid=grid.expand(session.videos, -1, -1),
            original=torch.arange(total, device=session.device).expand(session.videos, -1),
            num_original=total,
            modality="video",
            signals=session.signals,
        )

    def _record(self, session: PackedSession, inputs: ScoreInputs, kept: Tensor, stays: Tensor, bias: Tensor | None) -> None:
        total = inputs.num_original
        grid = raster_grid(session.frames, session.cells.side, session.cells.side)
        record = PointRecord(self.stage.point.label, self.pruner.method.name, session.videos * total, num_rows=session.videos)
        for video in range(session.videos):
            record.add(VisualItem(video, torch.arange(total), "video", video, grid), kept[video], None, ("kept",))
        assert session.packing is not None
        record.columns, record.key_bias = session.packing.kept, None if bias is None else bias.detach()
        session.trace.points.append(record)
        self.pruner.vision["session"], self.pruner.vision["survives"] = session, stays

    def _pack(self, session: PackedSession, hidden: Tensor) -> Tensor:
        assert session.packing is not None
        session.before = hidden
        return session.packing.pack(hidden)

    def _after_last(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        session = self.session
        if session is None or session.packing is None or session.before is None:
            return None
        first = output[0] if isinstance(output, tuple) else output
        first = session.packing.unpack(first, session.before)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    # what comes after the tower

    def survivors(self, tokens: Tensor) -> Tensor:
        """A pooling head inside a larger model is nobody's business: it sees what it always saw."""
        return tokens

    def full_states(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Recorded hidden states, entry ``i`` the output of block ``i - 1``, with every frame in its own row; the last entry is so already."""
        session = self.session
        if session is None or session.packing is None or session.before is None:
            return tuple(states)
        packed = range(self.drop + 1, len(self.blocks))
        return tuple(
            session.packing.unpack(state, session.before) if number in packed and state is not None else state for number, state in enumerate(states)
        )


def halved(side: int) -> Cells:
    """Bilinear pooling to half the side, rounded up: a patch row belongs to the token row whose centre is nearest."""
    tokens = math.ceil(side / 2)
    return Cells(tuple((2 * row + 1) * tokens // (2 * side) for row in range(side)))


def strided(side: int, stride: int) -> Cells:
    """Pooling of ``stride`` by ``stride`` patches; patches that are left over at the edge belong to the last tokens."""
    tokens = max(side // stride, 1)
    return Cells(tuple(min(row // stride, tokens - 1) for row in range(side)))
