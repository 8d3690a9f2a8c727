"""How far each layer moves its tokens: what `token_sparse_attention` chooses its layers by.

    vlprune calibrate --method token_sparse_attention --model FOLDER --samples texts.jsonl --out drift
    vlprune.apply(model, "token_sparse_attention", layers="drift")

Reference: arXiv:2602.03216, measured there on one long prompt: the mean over tokens of |x' - x| / |x|, x and x' being the residual in front of the layer and
behind it, in float32. Layers up to a quantile of these numbers are the ones whose tokens move least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.skipping.layer_means import LayerMeans

EPS = 1e-6


def _watch(hooks: HookSet, layers: list[nn.Module], now: dict[int, Tensor]) -> None:
    def compare(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
            now[number] = (after.float() - before.float()).norm(dim=-1) / (before.float().norm(dim=-1) + EPS)        # (B, L)

        return hook

    for number, layer in enumerate(layers):
        hooks.after(layer, compare(number))


DRIFT = LayerMeans("drift", "layers", "token_sparse_attention", _watch)
OPTION = DRIFT.option
drift, calibrate, load_drift = DRIFT.measure, DRIFT.calibrate, DRIFT.load


def still_layers(found: list[float], quantile: float = 0.5) -> list[int]:
    """Layers whose drift is at most this (linear) quantile of all."""
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 <= quantile <= 1:
        raise OptionError(f"quantile={quantile!r}: a share of the layers, from 0 to 1")
    values = torch.tensor(found, dtype=torch.float64)
    return torch.nonzero(values <= torch.quantile(values, float(quantile))).flatten().tolist()
