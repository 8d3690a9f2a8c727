"""What a run that skips parts of layers must equal: one long forward of the untouched model in which these parts give nothing, and their keys are hidden.

Everything is written out anew: rows and columns per layer come from the trace (prompts), from the schedules, and from the noted decisions (decoding).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle import decoder_of, hidden_columns
from vlprune.adapters import _attention
from vlprune.adapters._decoder_taps import attention_of
from vlprune.method import PruningMethod
from vlprune.protocols import HeadChoice, HeadInputs, Step


@dataclass
class HeadNote:
    """What the heads of a layer chose in one call: ``first`` query position, ``asked`` (B, H, Q) and ``seen`` (B, H, Q, end) bool by position.

    ``seen`` is ``None`` where some heads answer and others do not, the same ones from ``first`` on: ``asked`` is (B, H, 1) then.
    ``top``: a budget, where each query sees its best keys and nobody says which; worked out anew from the long forward.
    """

    layer: int
    first: int
    asked: Tensor
    seen: Tensor | None
    top: Any = None


class Notes:
    """Decisions while decoding: (layer, part, step) -> one bool a row; and what heads chose, call by call."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, str, int], list[bool]] = {}
        self.heads: list[HeadNote] = []
        self._end: dict[int, int] = {}

    def _note(self, inputs: HeadInputs, choice: HeadChoice | None, rule: Any) -> None:
        batch, heads, number, _ = inputs.queries.shape
        total = inputs.keys.shape[2]
        first = 0 if inputs.phase == "prefill" else self._end[inputs.layer]
        self._end[inputs.layer] = end = first + number
        if choice is None:
            return
        if choice.heads is not None:
            asked = torch.zeros(batch, heads, 1, dtype=torch.bool).scatter(1, choice.heads[..., None], True)
            known = next((note for note in self.heads if note.layer == inputs.layer), None)
            if known is None:
                self.heads.append(HeadNote(inputs.layer, 0, asked, None))
            assert known is None or torch.equal(known.asked, asked), "other heads than before"
            return
        seen = torch.zeros(batch, heads, number, end, dtype=torch.bool)
        asked = torch.zeros(batch, heads, number, dtype=torch.bool)
        for b, h in itertools.product(range(batch), range(heads)):
            rows = list(range(number)) if choice.queries is None else choice.queries[b, h].tolist()
            own = None if choice.keys is None else choice.keys[b, h * choice.keys.shape[1] // heads].tolist()
            columns = list(range(total)) if own is None else own
            for i, row in enumerate(rows):
                if row == number:                                        # filler
                    continue
                asked[b, h, row] = True
                for j, column in enumerate(columns):
                    if column < total and (choice.seen is None or bool(choice.seen.expand(batch, heads, len(rows), len(columns))[b, h, i, j])):
                        seen[b, h, row, end - total + column] = True
        self.heads.append(HeadNote(inputs.layer, first, asked, seen, rule.budget if choice.out is not None and choice.keys is None else None))

    def on(self, method: PruningMethod) -> PruningMethod:
        """The method with its decisions noted."""

        def noted(bypass: Any) -> Any:
            def decode(step: Step) -> Any:
                runs = False if bypass.decode is None else bypass.decode(step)
                batch = step.states.shape[0]
                self.said[step.layer, step.part, step.state.step] = [runs] * batch if isinstance(runs, bool) else list(runs)
                return runs

            return replace(bypass, decode=decode) if bypass.phase != "prefill" else bypass

        def looked(attend: Any) -> Any:
            def choose(inputs: HeadInputs) -> HeadChoice | None:
                choice: HeadChoice | None = attend.choose(inputs)
                self._note(inputs, choice, attend.choose)
                return choice

            # asked in prompts, too, so that positions are known; there it chooses nothing
            def in_decoding(inputs: HeadInputs) -> HeadChoice | None:
                if inputs.phase == "prefill":
                    self._note(inputs, None, None)
                    return None
                return choose(inputs)

            if attend.choose is None:
                return attend
            return replace(attend, choose=choose) if attend.phase != "decode" else replace(attend, choose=in_decoding, phase="both")

        return replace(
            method, bypasses=tuple(noted(bypass) for bypass in method.bypasses), attends=tuple(looked(attend) for attend in method.attends)
        )


def what_ran(method: PruningMethod, trace: Any, notes: Notes, shape: tuple[int, int], new: int, depth: int) -> tuple[dict[Any, Tensor], list[Tensor]]:
    """(layer, part) -> (B, L + new) bool, which rows ran it; and for each layer (B, L + new) bool, columns that nobody may see."""
    rows, length = shape
    ran = {(layer, part): torch.ones(rows, length + new, dtype=torch.bool) for layer in range(depth) for part in ("attn", "mlp")}
    hidden = [torch.zeros(rows, length + new, dtype=torch.bool) for _ in range(depth)]
    if trace is not None:
        for layer, gone in enumerate(hidden_columns(trace, depth)):
            hidden[layer][:, :length] = gone
        for (layer, part), runs in trace.ran.items():
            ran[layer, part][:, :length] &= runs
    for (layer, part, step), runs in notes.said.items():
        for one in ("attn", "mlp") if part == "block" else (part,):
            ran[layer, one][:, length + step] &= torch.tensor(runs)
    for skip in method.layer_skips:
        for position in range(length + new):
            runs = skip.run("prefill", 0, 0) if position < length else skip.run("decode", position - length, position)
            if not runs:
                for part in ("attn", "mlp"):
                    ran[skip.layer, part][:, position] = False
    for part in (*method.bypasses, *method.layer_skips):
        if part.kv == "active_only" and getattr(part, "part", "block") != "mlp":
            hidden[part.layer] |= ~ran[part.layer, "attn"]
    return ran, hidden


def _best(attn: nn.Module, states: Tensor, rotary: Any, allowed: Tensor, budget: Any) -> Tensor:
    """(B, H, T, T) bool: for each query the best keys of those allowed (B, 1, T, T), one query at a time."""
    queries, keys = (_attention.rotate(attn, _attention.project(attn, states, which), *rotary) for which in "qk")
    batch, heads, length, _ = queries.shape
    found = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b, h, row in itertools.product(range(batch), range(heads), range(length)):
        free = [column for column in range(length) if allowed[b, 0, row, column]]
        if free:
            logits = keys[b, h * keys.shape[1] // heads, free] @ queries[b, h, row]
            number = len(free) if isinstance(budget.keep, int) and budget.keep >= len(free) else budget.num_keep(len(free))
            found[b, h, row, [free[i] for i in logits.argsort(descending=True)[:number].tolist()]] = True
    return found


def long_forward(
    model: nn.Module, inputs: dict[str, Tensor], ran: dict[Any, Tensor], hidden: list[Tensor], copies: set[int], heads: Sequence[HeadNote] = (), **kwargs: Any
) -> Tensor:
    """Logits of the untouched model with parts that give nothing where they did not run; ``copies``: layers that take keys from the one below there.

    ``heads``: what each head saw and asked with, where it chose.
    """
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    handles = []
    states: dict[tuple[int, str], Tensor] = {}

    def mask_hook(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            mask = call.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 4:
                allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            else:
                allowed = torch.ones(length, length).tril().bool()[None, None] & real[:, None, None, :]
            allowed = allowed & ~hidden[layer][:, None, None, :]
            given = args[0] if args else call["hidden_states"]
            bias = torch.zeros(allowed.shape, dtype=given.dtype).masked_fill(~allowed, torch.finfo(given.dtype).min)
            return args, {**call, "attention_mask": bias}

        return hook

    def heads_hook(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            bias, given = call["attention_mask"], args[0] if args else call["hidden_states"]
            allowed = bias > torch.finfo(bias.dtype).min / 2
            for note in heads:
                if note.layer == layer and note.seen is not None:
                    rows, end = slice(note.first, note.first + note.asked.shape[2]), note.seen.shape[3]
                    allowed = allowed.expand(-1, note.asked.shape[1], -1, -1).clone()
                    if note.top is not None:
                        best = _best(module, given, call.get("position_embeddings"), (bias > torch.finfo(bias.dtype).min / 2), note.top)
                        allowed[:, :, rows, :end] &= best[:, :, rows, :end]
                    allowed[:, :, rows, :end] &= note.seen | ~note.asked[..., None]      # heads that do not ask give nothing, see `quiet_hook`
            return args, {**call, "attention_mask": torch.zeros(allowed.shape, dtype=bias.dtype).masked_fill(~allowed, torch.finfo(bias.dtype).min)}

        return hook

    def quiet_hook(layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            states = args[0]
            for note in heads:
                if note.layer == layer:
                    split = states.unflatten(-1, (note.asked.shape[1], -1)).clone()      # (B, T, H, d)
                    rows = slice(None) if note.seen is None else slice(note.first, note.first + note.asked.shape[2])
                    split[:, rows] *= note.asked.transpose(1, 2)[..., None]
                    states = split.flatten(2)
            return (states,)

        return hook

    def zero_hook(runs: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, call: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = first * runs[..., None]
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def copy_hook(layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if layer in copies:
                runs = ran[layer, "attn"].reshape(*ran[layer, "attn"].shape, *[1] * (output.dim() - 2))
                if output.dim() == 4 and output.shape[1] != length:      # a norm of keys that stand head by head
                    runs = runs.transpose(1, 2)
                output = torch.where(runs, output, states[layer - 1, name])
            states[layer, name] = output
            return output

        return hook

    layers = decoder_of(model).layers
    for number, layer in enumerate(layers):  # type: ignore[arg-type, var-annotated]
        attn = attention_of(layer)
        handles.append(layer.register_forward_pre_hook(mask_hook(number), with_kwargs=True))
        if any(note.layer == number for note in heads):
            handles.append(attn.register_forward_pre_hook(heads_hook(number), with_kwargs=True))
            handles.append(attn.o_proj.register_forward_pre_hook(quiet_hook(number)))  # type: ignore[union-attr]
        handles.append(attn.register_forward_hook(zero_hook(ran[number, "attn"]), with_kwargs=True))
        handles.append(layer.mlp.register_forward_hook(zero_hook(ran[number, "mlp"]), with_kwargs=True))
        if copies:
            keys = getattr(attn, "k_norm", None) or attn.k_proj
            handles.append(keys.register_forward_hook(copy_hook(number, "k")))  # type: ignore[union-attr]
            handles.append(attn.v_proj.register_forward_hook(copy_hook(number, "v")))  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            return model(**inputs, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()
