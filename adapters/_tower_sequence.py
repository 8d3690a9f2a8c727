"""How a vision tower is held that runs all its pictures as one sequence of patches (Qwen-VL): visual tokens leave with all their patches.

The patches of a visual token stand side by side, also where windows permute the tokens, so the sequence is looked at as one row of tokens whose
features are those of their patches: to a `Session` a picture or a whole video is an item of that row. Frames and windows are segments that see
themselves only; their bounds follow the survivors.

Blocks whose output goes to a merger (the last one, DeepStack's) hand out full length: a dropped token carries the state that it had when it
left, and goes no further than the entrance of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters import _sequence
from vlprune.errors import MissingSignalError, UnsupportedPointError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.protocols import Tap, gather_tokens
from vlprune.pruner import ItemState, Pruner, Session
from vlprune.tokens import TokenLayout, VisualItem

#: ``() -> items, windows``: pictures and videos of this call, positions in the tower's order of tokens.
Items = Callable[[], list[VisualItem]]


class TowerSequence:
    """The stages of a method inside such a tower.

    Args:
        blocks: in order; each takes the states (S, D) first, ``cu_seqlens`` and ``position_embeddings``.
        pruner: of the method; this thread's call is in ``pruner.vision``.
        merge: patches of a visual token.
        items: tells what is in the sequence.
        full: blocks whose output must have full length, besides the last.
        shape: for the FLOPs count.
        backend: the attention implementation in use.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        pruner: Pruner,
        *,
        merge: int,
        items: Items,
        full: Collection[int],
        shape: TowerShape,
        backend: Callable[[], str],
    ) -> None:
        self.blocks, self.pruner, self.merge, self.items, self.shape, self.backend = list(blocks), pruner, merge, items, shape, backend
        self.full = {*full, len(self.blocks) - 1}
        self.stages = pruner.stages("vision")
        method = pruner.method
        for layer, stages in self.stages.items():
            for stage in stages:
                if stage.video is not None:
                    raise UnsupportedPointError(f"{method.name} adds a bias to the keys of a block, which a tower of packed pictures cannot do")
                late = [tap for tap in stage.needs if tap.kind != "pixels" and tap.layer >= layer]
                if late:
                    raise MissingSignalError(f"{method.name} reads {late[0]}, but when {stage.point.label} is reached only {layer} vision blocks have run")
        if method.size_bias and self.stages:
            raise UnsupportedPointError(f"{method.name} lets attention count merged tokens by their size, which a tower of packed pictures cannot do")

    def attach(self, hooks: HookSet, tower: nn.Module) -> None:
        """Put the hooks on; behind those that collect signals."""
        hooks.before(tower, lambda module, args, kwargs: self.pruner.vision.pop("session", None) and None)
        hooks.after(tower, self._after_tower, first=True)
        for number, block in enumerate(self.blocks):
            hooks.before(block, self._before_block(number))
            hooks.after(block, self._after_block(number), first=True)    # before transformers records the output

    @property
    def session(self) -> Session | None:
        """The tower call this thread is in, if any."""
        return self.pruner.vision.get("session")

    def _start(self, hidden: Tensor) -> Session:
        items = self.items()
        session = Session(self.pruner, TokenLayout(1, hidden.shape[0] // self.merge, items), hidden.device)
        session.trace.layout, session.trace.shapes = session.layout, {"vision": self.shape}
        session.trace.vision_dense = hidden.shape[0]
        self.pruner.vision["session"] = session
        return session

    def _fat(self, hidden: Tensor) -> Tensor:
        """(S, D) states of patches as (1, S / merge, merge D) of tokens."""
        return hidden.reshape(1, hidden.shape[0] // self.merge, -1)

    def _before_block(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: Tensor = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                _sequence.check_checkpointing(module)
            session = self._start(given) if number == 0 else self.session
            if session is None:
                return None
            states = self._fat(given)
            if session.index is not None and states.shape[1] == session.layout.length:
                states = gather_tokens(states, session.index)
            states = session.bring_back(number, states)
            stages = [stage for stage in self.stages.get(number, []) if stage.training in (None, module.training)]
            if stages:
                self.widen(session)
            for stage in stages:
                shortened = session.reduce(stage, states, self._collect)
                states = states if shortened is None else shortened
                self._by_picture(session)
            hidden = states.reshape(-1, given.shape[-1])
            session.trace.vision_tokens.append(hidden.shape[0])
            if session.index is None and hidden.shape == given.shape:
                return None
            if session.index is None:                                    # a skip has ended, everything is there again
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            bounds, rotations = kwargs["cu_seqlens"], kwargs["position_embeddings"]
            named = {**kwargs, "cu_seqlens": self._bounds(session, bounds), "position_embeddings": self._rotations(session, rotations)}
            return ((hidden, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden})

        return hook

    def _patches(self, session: Session) -> Tensor:
        """(S',) places of the remaining patches."""
        assert session.index is not None
        key = ("patches", id(session.index))
        if key not in session.memo:
            inside = torch.arange(self.merge, device=session.device)
            session.memo[key] = ((session.index[0][:, None] * self.merge + inside).flatten(), session.index)
        return session.memo[key][0]  # type: ignore[no-any-return]

    def _bounds(self, session: Session, bounds: Tensor) -> Tensor:
        """Where the segments begin and end among the survivors."""
        assert session.index is not None
        key = ("bounds", id(bounds), id(session.index))
        if key not in session.memo:
            there = torch.zeros(session.layout.length + 1, dtype=torch.int64, device=session.device)
            before = there.index_fill(0, session.index[0] + 1, 1).cumsum(dim=0)          # survivors in front of every token
            found = (before[bounds // self.merge] * self.merge).to(bounds.dtype)
            if "flash" not in self.backend():                            # these read the lengths in every block, and cannot attend to nothing
                found = found.unique_consecutive()
            session.memo[key] = (found, bounds, session.index)
        return session.memo[key][0]  # type: ignore[no-any-return]

    def _rotations(self, session: Session, rotations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key = ("rotations", id(rotations[0]), id(session.index))
        if key not in session.memo:
            session.memo[key] = (tuple(part[self._patches(session)] for part in rotations), rotations, session.index)
        return session.memo[key][0]  # type: ignore[no-any-return]

    def _after_block(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            session = self.session
            if session is None or session.index is None or number not in self.full:
                return None
            return session.restore(self._fat(output)).reshape(-1, output.shape[-1])

        return hook

    def _after_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Recorded states at full length, entry ``i`` the input of block ``i``."""
        session = self.session
        if session is None:
            return
        session.finish()
        self.widen(session)
        states = getattr(output, "hidden_states", None)
        if states is None or not session.history:
            return
        restored = []
        for number, state in enumerate(states):
            block = max(number, 1)                                       # entry 0 is what block 0 got, after its own stages
            cuts = [cut for cut in session.history if cut.layer < block and (cut.restore is None or cut.restore >= block)]
            short = self._fat(state).shape[1] != session.layout.length
            restored.append(session.restore(self._fat(state), cuts).reshape(-1, state.shape[-1]) if short else state)
        output.hidden_states = tuple(restored)

    # signals

    def widen(self, session: Session) -> None:
        """Signals of the current, shorter sequence by the patches' original places, (1, S, ...)."""
        if session.index is None:
            return
        places, full = self._patches(session), session.layout.length * self.merge
        for tap, values in self.pruner.vision.items():
            if isinstance(tap, Tap) and values.shape[0] * values.shape[1] != full:
                values = values.flatten(0, 1)
                self.pruner.vision[tap] = values.new_zeros(full, *values.shape[1:]).index_copy(0, places, values)[None]

    def _collect(self, tap: Tap, group: list[ItemState]) -> Tensor:
        """(G, n) or (G, n, C), the mean over the patches of a token."""
        vision = self.pruner.vision
        if ("whole", tap) in vision:                                     # one value a token, in the order of the features
            values, starts, at = vision["whole", tap], {}, 0
            for state in self.session.items if self.session is not None else []:
                starts[id(state)] = at
                at += state.item.num_tokens
            return torch.stack([values[starts[id(state)] + state.original] for state in group])
        values = vision[tap]
        tokens = values.reshape(-1, self.merge, *values.shape[2:]).float().mean(dim=1)
        return torch.stack([tokens[state.item.positions.to(tokens.device, non_blocking=True)[state.original]] for state in group])

    @staticmethod
    def _by_picture(session: Session) -> None:
        """The newest record speaks of pictures in raster order, one row each."""
        record = session.trace.points[-1]
        record.num_rows = len(record.items)
        record.items = [replace(item, row=row, positions=torch.arange(item.num_tokens)) for row, item in enumerate(record.items)]
