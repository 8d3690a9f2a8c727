"""What a run that skips parts of layers must equal: one long forward of the untouched model in which these parts give nothing, and their keys are hidden.

Everything is written out anew: rows and columns per layer come from the trace (prompts), from the schedules, and from the noted decisions (decoding).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle import decoder_of, hidden_columns
from vlprune.adapters._decoder_taps import attention_of
from vlprune.method import PruningMethod
from vlprune.protocols import Step


class Notes:
    """Decisions while decoding: (layer, part, step) -> one bool a row."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, str, int], list[bool]] = {}

    def on(self, method: PruningMethod) -> PruningMethod:
        """The method with its decisions noted."""

        def noted(bypass: Any) -> Any:
            def decode(step: Step) -> Any:
                runs = False if bypass.decode is None else bypass.decode(step)
                batch = step.states.shape[0]
                self.said[step.layer, step.part, step.state.step] = [runs] * batch if isinstance(runs, bool) else list(runs)
                return runs

            return replace(bypass, decode=decode) if bypass.phase != "prefill" else bypass

        return replace(method, bypasses=tuple(noted(bypass) for bypass in method.bypasses))


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


def long_forward(model: nn.Module, inputs: dict[str, Tensor], ran: dict[Any, Tensor], hidden: list[Tensor], copies: set[int], **kwargs: Any) -> Tensor:
    """Logits of the untouched model with parts that give nothing where they did not run; ``copies``: layers that take keys from the one below there."""
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
