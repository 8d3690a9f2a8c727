"""How far each layer moves its tokens: what `token_sparse_attention` chooses its layers by.

    vlprune calibrate --method token_sparse_attention --model FOLDER --samples texts.jsonl --out drift
    vlprune.apply(model, "token_sparse_attention", layers="drift")

Reference: arXiv:2602.03216, measured there on one long prompt: the mean over tokens of |x' - x| / |x|, x and x' being the residual in front of the layer and
behind it, in float32. Layers up to a quantile of these numbers are the ones whose tokens move least.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.skipping.layers import decoder_layers
from vlprune.skipping.running_sums import Progress, RunningSums

KIND = "vlprune.drift"
OPTION = "layers"
FILE = "drift.safetensors"
EPS = 1e-6


@torch.no_grad()
def drift(
    model: nn.Module,
    layers: Iterable[nn.Module],
    inputs: Iterable[Mapping[str, Any]],
    *,
    sums: RunningSums | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Mean of |x' - x| / |x| for each layer, over all tokens that are not padding.

    Args:
        model: dense, as it is called with each of ``inputs``.
        layers: of its decoder, in order.
        inputs: keyword arguments of calls.
        sums: where it is added up, to go on from what is there.
        progress: told ``(done, total, what)``.

    Raises:
        OptionError: no inputs.
    """
    blocks = list(layers)
    sums = RunningSums(None, {}) if sums is None else sums
    now: dict[int, Tensor] = {}
    hooks = HookSet()

    def compare(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
            now[number] = (after.float() - before.float()).norm(dim=-1) / (before.float().norm(dim=-1) + EPS)        # (B, L)

        return hook

    try:
        for number, block in enumerate(blocks):
            hooks.after(block, compare(number))
        for call in sums.over(inputs, progress):
            model(**call)
            mask = call.get("attention_mask")
            real = torch.ones_like(now[0], dtype=torch.bool) if mask is None else mask.bool()
            sums.add("tokens", float(real.sum()))
            sums.add("drift", torch.stack([now[number][real.to(now[number].device)].double().sum().cpu() for number in range(len(blocks))]))
    finally:
        hooks.remove()
    return [float(value) for value in sums.tensors["drift"] / sums.tensors["tokens"]]


def calibrate(model: nn.Module, inputs: Iterable[Mapping[str, Any]], out: Path, *, progress: Progress | None = None, resume: bool = True) -> Path:
    """Measure and write ``drift.safetensors`` in the folder ``out``. A finished file is left as it is."""
    from safetensors.torch import save_file

    target, layers = Path(out) / FILE, decoder_layers(model)
    if resume and target.exists():
        load_drift(target, len(layers))
        return Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    sums = RunningSums(target.with_name("sums.safetensors"), {"what": "drift", "layers": len(layers), "model": type(model).__name__}, resume=resume)
    found = drift(model, layers, inputs, sums=sums, progress=progress)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    save_file({"drift": torch.tensor(found, dtype=torch.float64)}, beside, metadata={"kind": KIND, "texts": str(sums.done)})
    os.replace(beside, target)
    sums.forget()
    return Path(out)


def load_drift(path: str | os.PathLike[str], depth: int) -> list[float]:
    """The numbers of all ``depth`` layers from such a file, or its folder; or say what is wrong."""
    from safetensors import SafetensorError, safe_open

    source = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(str(source), framework="pt") as file:
            known = (file.metadata() or {}).get("kind") == KIND
            found = file.get_tensor("drift").tolist() if known else []
    except (OSError, SafetensorError) as error:
        raise OptionError(f"layers={str(path)!r} cannot be read: {error}. Measure it with vlprune calibrate --method token_sparse_attention") from error
    if len(found) != depth:
        raise OptionError(f"layers={str(path)!r} holds the drift of {len(found)} layers, and this model has {depth}: measure it on this model")
    return [float(value) for value in found]


def still_layers(found: list[float], quantile: float = 0.5) -> list[int]:
    """Layers whose drift is at most this (linear) quantile of all."""
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 <= quantile <= 1:
        raise OptionError(f"quantile={quantile!r}: a share of the layers, from 0 to 1")
    values = torch.tensor(found, dtype=torch.float64)
    return torch.nonzero(values <= torch.quantile(values, float(quantile))).flatten().tolist()
