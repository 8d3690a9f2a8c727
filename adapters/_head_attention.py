"""Attention of one decoder layer in which every head has keys (and queries) of its own.

The module's forward runs as it is: projections, norms, rotation and the cache are its own. It only asks for its attention function by a name that stands
here, and so hands over queries, keys and values; then an `vlprune.method.Attend` may choose, and where it chooses nothing the model's own function answers.
Rows that no head asks for get zeros in that head, so their residual goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vlprune.adapters import _attention
from vlprune.adapters._decoder_taps import attention_of
from vlprune.errors import UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.hooks import HookSet
from vlprune.kernels.chosen_attention import attend_heads
from vlprune.kernels.some_heads import attend_some
from vlprune.method import Attend
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.pruner import Pruner, Session
from vlprune.trace import HeadRecord, Trace

#: In the register of attention functions of transformers; only modules whose config is a `_Config` ask for it.
NAME = "vlprune_heads"


class _Config:
    """A module's config with another name for the attention function; everything else is read from the model's own."""

    def __init__(self, config: Any, around: Callable[..., Any]) -> None:
        self.__dict__.update(own=config, around=around)

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        if name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)


def _answer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.config.around(module, *args, **kwargs)  # type: ignore[union-attr, operator]


class HeadAttention:
    """The `Attend` parts of a method that choose head by head, on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner) -> None:
        self.layers, self.pruner = layers, pruner
        self.attends: dict[int, list[Attend]] = {}
        for attend in pruner.method.attends:
            if attend.choose is not None:
                self.attends.setdefault(attend.layer, []).append(attend)

    def attach(self, hooks: HookSet) -> None:
        """Take the place of the layers' attention functions."""
        if not self.attends:
            return
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for number, attends in self.attends.items():
            name, attn = self.pruner.method.name, attention_of(self.layers[number])
            if any(bypass.layer == number and bypass.part != "mlp" for bypass in self.pruner.method.bypasses):
                raise UnsupportedPointError(f"{name} lets rows skip the attention of layer {number} and chooses keys head by head there; do one of the two")
            phases = [attend.phase for attend in attends]
            if len(set(phases)) < len(phases) or ("both" in phases and len(phases) > 1):
                raise UnsupportedPointError(f"{name} chooses keys head by head twice in layer {number}; let only one method do it there, or in another phase")
            asks = getattr(sys.modules.get(type(attn).__module__), "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
            if not asks or getattr(attn, "config", None) is None or getattr(attn, "sinks", None) is not None:
                what = "attention without sinks" if asks else "a module that takes its attention function from transformers' register"
                raise UnsupportedModelError(f"{type(attn).__name__}: choosing keys head by head needs {what}")
            ALL_ATTENTION_FUNCTIONS.register(NAME, _answer)
            config: Any = attn.config
            hooks.put(attn, "config", _Config(config, self._around(attends, config, ALL_ATTENTION_FUNCTIONS)))

    def _around(self, attends: list[Attend], config: Any, functions: Any) -> Callable[..., Any]:
        def answer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            session = self.pruner.session
            prompt = session is not None or query.shape[2] > 1
            phase = "prefill" if prompt else "decode"
            attend = next((attend for attend in attends if attend.phase in (phase, "both")), None)
            choice = inputs = None
            if attend is not None:
                inputs = self._inputs(attend, phase, session, module, query, key, value, attention_mask, kwargs)
                with self.pruner.timed():
                    choice = attend.choose(inputs)  # type: ignore[misc]
                self._note(attend, inputs, choice, session)
            if choice is None or inputs is None:
                own = functions.get_interface(config._attn_implementation, getattr(sys.modules[type(module).__module__], "eager_attention_forward", None))
                answered = own(module, query, key, value, attention_mask, **kwargs)
                if attend is not None and attend.see is not None and inputs is not None and prompt:
                    attend.see(inputs, answered[0])
                return answered
            if kwargs.get("position_bias") is not None:
                raise UnsupportedModelError(f"{type(module).__name__}: {self.pruner.method.name} cannot choose keys under a bias by position")
            causal, dropout = bool(getattr(module, "is_causal", True)), float(kwargs.get("dropout") or 0.0)
            if choice.heads is None:
                out = attend_heads(inputs, choice, causal=causal, dropout=dropout).transpose(1, 2)
            else:
                out = attend_some(inputs, choice.heads, causal=causal, dropout=dropout).transpose(1, 2)
                if session is not None:
                    session.memo["heads", attend.layer] = choice.heads   # type: ignore[union-attr]
            if attend.see is not None and prompt:                        # type: ignore[union-attr]
                attend.see(inputs, out)                                  # type: ignore[union-attr]
            return out, None

        return answer

    def _inputs(
        self, attend: Attend, phase: str, session: Session | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Any
    ) -> HeadInputs:
        method, prompt = self.pruner.method, phase == "prefill"
        past = 0 if session is None else session.trace.past_length
        plain = prompt and session is not None and (mask is None or (session.plain and not kwargs.get("sliding_window")))
        if prompt and session is not None and mask is not None and key.shape[2] > past + query.shape[2]:
            key, value = key[:, :, : past + query.shape[2]], value[:, :, : past + query.shape[2]]          # slots of a static cache
        if isinstance(mask, Tensor) and mask.dim() == 2 and (query.shape[2] == 1 or plain):                # flash attention: padding alone
            mask = mask[:, None, None, :].bool() if query.shape[2] == 1 else None
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
            raise UnsupportedCallError(f"{method.name} chooses keys head by head; load the model with attn_implementation='sdpa' or 'eager'")
        real = None if session is None else tuple(length - pads for length, pads in zip(session.lengths, session.pads, strict=True))
        return HeadInputs(
            attend.layer, phase, query, key, value, mask, float(kwargs.get("scaling") or _attention.scale_of(module, query.shape[-1])),
            tokens=None if session is None else session.mask_of(attend.tokens), real=None if session is None else session.real_tokens(),
            state=None if attend.stateless else self.pruner.generation, past=past, real_counts=real,
            counts=None if session is None or real is None else _set_counts(session, attend.tokens, real), plain=plain,
            cap=kwargs.get("softcap") or getattr(module, "attn_logit_softcapping", None),
        )  # fmt: skip

    def _note(self, attend: Attend, inputs: HeadInputs, choice: HeadChoice | None, session: Session | None) -> None:
        """Count what each head looks at, for the report."""
        length, total = inputs.queries.shape[2], inputs.keys.shape[2]
        if session is None:
            trace: Trace | None = self.pruner.last_trace
            if trace is not None and length == 1:
                seen = total if choice is None else choice.pairs if choice.pairs is not None else total if choice.keys is None else choice.keys.shape[2]
                trace.decode_keys[0] += min(float(seen), float(total))
                trace.decode_keys[1] += total
            return
        trace = session.trace
        if choice is None:
            return
        trace.scorer_flops += choice.flops
        dense = length * (total - length) + length * (length + 1) / 2
        if choice.heads is not None:
            trace.pairs[attend.layer] = [dense * choice.heads.shape[1] / inputs.queries.shape[1]] * session.layout.num_rows
            return
        asked = length if choice.queries is None else choice.queries.shape[2]
        seen = total if choice.keys is None else choice.keys.shape[2]
        pairs = choice.pairs
        if pairs is None:                                                # spread evenly, where heads ask with other tokens than they see
            pairs = asked * (asked + 1) / 2 if choice.keys is choice.queries and total == length else dense * (asked / length) * (seen / total)
        trace.pairs[attend.layer] = [float(pairs)] * session.layout.num_rows
        if choice.queries is not None and inputs.real_counts is not None:
            kept = choice.counts or [min(asked, count) for count in inputs.real_counts]
            point = f"llm:{attend.layer}.heads"
            trace.heads.append(HeadRecord(point, self.pruner.method.name, attend.tokens, sum(inputs.real_counts), sum(kept)))


def _set_counts(session: Session, tokens: str, real: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens of the set each row has now."""
    if tokens == "all":
        return real
    visual = [0] * len(real)
    for state in session.states("visual"):
        visual[state.item.row] += int(state.slots.numel())
    return tuple(visual) if tokens == "visual" else tuple(count - seen for count, seen in zip(real, visual, strict=True))


__all__ = ["HeadAttention", "attend_heads"]
