"""Experts that do not run for a token (`vlprune.method.RouteMask`), for every way in which transformers computes experts.

A block with experts asks its router (``gate``) and hands ``experts`` the tokens with the numbers and weights of k experts each. There the pairs of token
and expert that run are picked out and handed on as tokens with one expert each, and what comes back is added up by token. So eager, batched and grouped
products all compute the pairs that run and no others, and nobody is given an index that stands for "none", which some of them would read past the end or
leave rows unwritten for. Where every pair runs, the call is the model's own, bit for bit. Picking out costs one read by the host in each layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError, UnsupportedCallError, UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.method import RouteMask
from vlprune.protocols import RouteInputs
from vlprune.pruner import Pruner, Session


def routing_of(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The router and the experts of a decoder layer, or ``None`` where there are none of the kind."""
    mlp = getattr(layer, "mlp", None)
    gate, experts = (getattr(mlp, name, None) for name in ("gate", "experts"))
    if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module) or not hasattr(experts, "num_experts"):
        return None
    return gate, experts


def expert_layers(decoder: Any) -> tuple[int, ...]:
    """Layers with a router and experts."""
    return tuple(number for number, layer in enumerate(decoder.layers) if routing_of(layer) is not None)


def expert_flops(experts: Any) -> float:
    """Of the matrix products of one token in one expert."""
    weights = [getattr(experts, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    return float(sum(2 * part[0].numel() for part in weights if isinstance(part, Tensor)))


def routed_width(decoder: Any) -> int | None:
    """What the MLP of a decoder all of whose layers have experts is as wide as for a token; ``None`` for other decoders."""
    found = [routing_of(layer) for layer in decoder.layers]
    if not all(found):
        return None
    config: Any = decoder.config
    width, count = getattr(config, "moe_intermediate_size", None), getattr(config, "num_experts_per_tok", None)
    return int(width) * int(count) if width and count else None


class Experts:
    """The `RouteMask` parts of a method on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner) -> None:
        self.layers, self.pruner = layers, pruner
        self.masks: dict[int, list[RouteMask]] = {}
        self._said = threading.local()
        for mask in pruner.method.route_masks:
            self.masks.setdefault(mask.layer, []).append(mask)

    def attach(self, hooks: HookSet) -> None:
        """Look at the routers, and wrap the experts."""
        for number in self.masks:
            found = routing_of(self.layers[number])
            assert found is not None                                     # `vlprune.api.check_stages` has looked
            gate, experts = found
            if getattr(experts, "_is_expert_parallel", False):
                raise UnsupportedModelError(
                    f"{self.pruner.method.name} chooses experts where the tokens are, and the experts of this model are spread over processes (expert "
                    "parallel). Load it without expert parallelism."
                )
            hooks.after(gate, self._after_router(number))
            hooks.wrap(experts, "forward", self._around(number, expert_flops(experts)))

    def _after_router(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output)):
                raise UnsupportedCallError(
                    f"{self.pruner.method.name} needs a router that gives logits, weights and numbers of experts; {type(module).__name__} of layer {number} "
                    "gives something else"
                )
            self._said.logits = output[0]

        return hook

    def _around(self, number: int, flops: float) -> Callable[..., Any]:
        def forward(original: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            logits, self._said.logits = getattr(self._said, "logits", None), None
            if logits is None:
                raise UnsupportedCallError(f"{self.pruner.method.name}: the experts of layer {number} ran, and their router (mlp.gate) did not")
            runs = self._runs(number, logits, top_k_index, top_k_weights)
            if runs is None:
                return original(hidden_states, top_k_index, top_k_weights)
            tokens, slots = torch.nonzero(runs, as_tuple=True)                           # the host read
            self._note(number, top_k_index, runs, tokens.numel(), flops)
            if tokens.numel() == runs.numel():
                return original(hidden_states, top_k_index, top_k_weights)
            total = torch.zeros_like(hidden_states)
            if not tokens.numel():
                return total
            given = original(hidden_states[tokens], top_k_index[tokens, slots][:, None], top_k_weights[tokens, slots][:, None])
            return total.index_add(0, tokens, given.to(total.dtype))

        return forward

    def _runs(self, number: int, logits: Tensor, experts: Tensor, weights: Tensor) -> Tensor | None:
        """(T, k) bool; ``None``: all."""
        with torch.no_grad(), self.pruner.timed():
            probabilities = torch.gather(logits.float().softmax(dim=-1), 1, experts)
            inputs = RouteInputs(number, probabilities, weights, experts, self._visual(number, experts.shape[0]))
            found: Tensor | None = None
            for mask in self.masks[number]:
                runs = mask.choose(inputs)
                if runs is not None and (runs.shape != experts.shape or runs.dtype != torch.bool):
                    raise OptionError(
                        f"{self.pruner.method.name} gave {tuple(runs.shape)} of {runs.dtype} in layer {number}; a mask of bool {tuple(experts.shape)} is needed"
                    )
                found = runs if found is None else found if runs is None else found & runs
        return found

    def _visual(self, number: int, count: int) -> Tensor | None:
        """(T,) which of the tokens that the MLP runs on are visual."""
        session: Session | None = self.pruner.session
        if session is None or not session.layout.items:
            return None
        visual = session.mask_of("visual")
        rows = session.memo.get(("rows", number, "mlp"))
        if rows is not None and rows.index is not None:                                  # a bypass lets some of them run
            visual = torch.gather(visual, 1, rows.index)
        if visual.numel() != count:
            raise UnsupportedCallError(f"{self.pruner.method.name}: the experts of layer {number} got {count} tokens, not the {visual.numel()} of the prompt")
        return visual.flatten()

    def _note(self, number: int, experts: Tensor, runs: Tensor, ran: int, flops: float) -> None:
        """For the report: of the prompt by layer, of decoding in all."""
        session = self.pruner.session
        if session is not None:
            session.trace.experts[number] = (ran, runs.numel(), flops)
        elif self.pruner.last_trace is not None:
            before = self.pruner.last_trace.decode_experts
            self.pruner.last_trace.decode_experts = (before[0] + ran, before[1] + runs.numel())
