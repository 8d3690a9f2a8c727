"""How patches leave between attention and MLP of a vision block, and how tokens from elsewhere join the attention of one.

A block keeps its residual to itself, but the norm in front of its MLP gets the very state that lies between the two. There the stages act: the norm and
the MLP go on with the shorter sequence, and what the MLP returns is added to it here. The block itself is given a zero to add to its own, longer residual;
what comes of that is thrown away, and the block hands out the shorter sum. So nobody's forward is replaced, and the numbers are those of the block.

Guests (`vlprune.method.Guests`) are put behind the last patch at the input of the block and leave before its MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._block_parts import mlp_bounds
from vlprune.adapters._vision_engine import VisionEngine, VisionSession
from vlprune.errors import UnsupportedCallError
from vlprune.hooks import HookSet


class MiddleEngine(VisionEngine):
    """A vision engine that also acts in the middle of blocks."""

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in this tower."""
        return super().acts or bool(self.pruner.method.guests)

    def attach(self, hooks: HookSet) -> None:
        """Also inside the blocks."""
        super().attach(hooks)
        guests: dict[int, list[Callable[[Tensor], Tensor | None]]] = {}
        for guest in self.pruner.method.guests:
            guests.setdefault(guest.layer, []).append(guest.tokens)
        for number in sorted({*self.middles, *guests}):
            bounds = mlp_bounds(self.blocks[number])
            assert bounds is not None                                    # checked before anything was attached
            hooks.before(self.blocks[number], self._before_middle(guests.get(number, [])))
            hooks.before(bounds[0], self._before_norm_of(number))
            hooks.after(bounds[1], self._behind_mlp)
            hooks.after(self.blocks[number], self._hand_out, first=True)

    def _before_middle(self, guests: list[Callable[[Tensor], Tensor | None]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            session = self.session
            if session is None:
                return None
            if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
                raise UnsupportedCallError(
                    f"{self.pruner.method.name} acts between attention and MLP, where gradient checkpointing would compute a second time with other tokens. "
                    "Switch it off, or use a method that acts at the input of blocks (cls_attention)."
                )
            given = args[0] if args else kwargs["hidden_states"]
            states = given.transpose(0, 1) if self.sequence_first else given
            found = [tokens for ask in guests if (tokens := ask(states)) is not None]
            if not found:
                return None
            named = [value for name, value in kwargs.items() if name != "hidden_states"]
            if session.bias is None and any(isinstance(value, Tensor) for value in (*args[1:], *named)):
                raise UnsupportedCallError(f"{self.pruner.method.name} adds tokens to the tower's attention, which a mask given to the tower does not know")
            joined = torch.cat([states, *(tokens.to(states) for tokens in found)], dim=1)
            session.guests = joined.shape[1] - states.shape[1]
            session.trace.vision_tokens[-1] += joined.shape[0] * session.guests
            joined = joined.transpose(0, 1).contiguous() if self.sequence_first else joined
            args, kwargs = ((joined, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": joined})
            if session.bias is None:
                return args, kwargs
            assert self.bias_keys is not None
            return self.bias_keys(args, kwargs, torch.nn.functional.pad(session.bias.to(states.dtype), (0, session.guests)))

        return hook

    def _before_norm_of(self, number: int) -> Callable[..., Any]:
        stages, block = self.middles.get(number, []), self.blocks[number]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            session = self.session
            if session is None:
                return None
            given = args[0].transpose(0, 1) if self.sequence_first else args[0]
            states = given[:, : given.shape[1] - session.guests] if session.guests else given
            session.guests = 0
            for stage in stages:
                if stage.training in (None, block.training):
                    states = session.cut(stage, states)
            if states is given:
                return None
            session.waiting = states
            skipped = session.trace.mlp_skipped
            skipped[number] = skipped.get(number, 0) + given.shape[0] * (given.shape[1] - states.shape[1])
            return (states.transpose(0, 1).contiguous() if self.sequence_first else states, *args[1:]), kwargs

        return hook

    def _behind_mlp(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        session = self._waiting()
        if session is None:
            return None
        short = output.transpose(0, 1) if self.sequence_first else output
        session.done, session.waiting = session.waiting + short, None    # type: ignore[operator]
        return short.new_zeros(1, 1, 1)

    def _hand_out(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        session = self.session
        if session is None or session.done is None:
            assert self._waiting() is None                               # the last module before the sum was another one
            return None
        states, session.done = session.done, None
        states = states.transpose(0, 1).contiguous() if self.sequence_first else states
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _waiting(self) -> VisionSession | None:
        session = self.session
        return session if session is not None and session.waiting is not None else None
