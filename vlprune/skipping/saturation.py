"""How much each layer's MLP turns the residual: what `ffn_skip` is set by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet


@torch.no_grad()
def saturation(model: nn.Module, layers: Iterable[nn.Module], inputs: Iterable[Mapping[str, Any]]) -> list[float]:
    """Mean cosine of the residual before and after each layer's MLP, over all tokens that are not padding.

    Args:
        model: dense, as it is called with each of ``inputs``.
        layers: of its decoder, ``model.get_decoder().layers``.
        inputs: keyword arguments of calls, such as a tokenizer makes them.

    Raises:
        OptionError: no inputs, or layers without the norm in front of the MLP.
    """
    blocks = list(layers)
    sums, count = [0.0] * len(blocks), 0
    before: dict[int, Tensor] = {}
    now: dict[int, Tensor] = {}
    hooks = HookSet()

    def keep(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            before[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    def compare(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            now[number] = torch.cosine_similarity(before.pop(number).float(), after.float(), dim=-1)      # (B, L)

        return hook

    try:
        for number, block in enumerate(blocks):
            norm = getattr(block, "pre_feedforward_layernorm", None) or getattr(block, "post_attention_layernorm", None)
            if not isinstance(norm, nn.Module):
                raise OptionError(f"{type(block).__name__} has no post_attention_layernorm, in front of whose MLP the residual could be read")
            hooks.before(norm, keep(number))
            hooks.after(block, compare(number))
        for call in inputs:
            model(**call)
            mask = call.get("attention_mask")
            real = torch.ones_like(now[0], dtype=torch.bool) if mask is None else mask.bool().to(now[0].device)
            count += int(real.sum())
            for number in range(len(blocks)):
                sums[number] += float(now[number][real].sum())
    finally:
        hooks.remove()
    if not count:
        raise OptionError("no inputs to measure on; give some texts")
    return [total / count for total in sums]


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
