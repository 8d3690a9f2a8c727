"""How much each layer's MLP turns the residual: what `ffn_skip` is set by.

Measured once for a model:

    vlprune calibrate --method ffn_skip --model FOLDER --samples texts.jsonl --out saturation
    vlprune.apply(model, "ffn_skip", saturation="saturation", tau=0.97)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.skipping.layer_means import LayerMeans


def _watch(hooks: HookSet, layers: list[nn.Module], now: dict[int, Tensor]) -> None:
    """Cosine of the residual before and after each layer's MLP."""
    before: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            before[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    def compare(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            now[number] = torch.cosine_similarity(before.pop(number).float(), after.float(), dim=-1)      # (B, L)

        return hook

    for number, layer in enumerate(layers):
        norm = getattr(layer, "pre_feedforward_layernorm", None) or getattr(layer, "post_attention_layernorm", None)
        if not isinstance(norm, nn.Module):
            raise OptionError(f"{type(layer).__name__} has no post_attention_layernorm, in front of whose MLP the residual could be read")
        hooks.before(norm, keep(number))
        hooks.after(layer, compare(number))


SATURATION = LayerMeans("saturation", "saturation", "ffn_skip", _watch)
OPTION = SATURATION.option
saturation, calibrate, load_saturation = SATURATION.measure, SATURATION.calibrate, SATURATION.load


def cold_regions(cosines: list[float], tau: float) -> tuple[int, int]:
    """How many of the first and of the last layers lie outside the longest run of layers at or above ``tau``; of none: everything is cold."""
    best, start = (0, 0), None
    for number, value in enumerate([*cosines, -2.0]):
        if value >= tau:
            start = number if start is None else start
        elif start is not None:
            best, start = max(best, (number - start, -start)), None
    length, begin = best[0], -best[1]
    return (begin, len(cosines) - begin - length) if length else (len(cosines), 0)
