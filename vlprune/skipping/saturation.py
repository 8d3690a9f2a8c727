"""How much each layer's MLP turns the residual: what `ffn_skip` is set by.

Measured once for a model:

    vlprune calibrate --method ffn_skip --model FOLDER --samples texts.jsonl --out saturation
    vlprune.apply(model, "ffn_skip", saturation="saturation", tau=0.97)
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

KIND = "vlprune.saturation"
OPTION = "saturation"
FILE = "saturation.safetensors"


@torch.no_grad()
def saturation(
    model: nn.Module,
    layers: Iterable[nn.Module],
    inputs: Iterable[Mapping[str, Any]],
    *,
    sums: RunningSums | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Mean cosine of the residual before and after each layer's MLP, over all tokens that are not padding.

    Args:
        model: dense, as it is called with each of ``inputs``.
        layers: of its decoder, ``model.get_decoder().layers``.
        inputs: keyword arguments of calls, such as a tokenizer makes them.
        sums: where it is added up, to go on from what is there.
        progress: told ``(done, total, what)``.

    Raises:
        OptionError: no inputs, or layers without the norm in front of the MLP.
    """
    blocks = list(layers)
    sums = RunningSums(None, {}) if sums is None else sums
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
        for call in sums.over(inputs, progress):
            model(**call)
            mask = call.get("attention_mask")
            real = torch.ones_like(now[0], dtype=torch.bool) if mask is None else mask.bool().to(now[0].device)
            sums.add("tokens", float(real.sum()))
            sums.add("cosines", torch.stack([now[number][real.to(now[number].device)].double().sum().cpu() for number in range(len(blocks))]))
    finally:
        hooks.remove()
    return [float(value) for value in sums.tensors["cosines"] / sums.tensors["tokens"]]


def calibrate(model: nn.Module, inputs: Iterable[Mapping[str, Any]], out: Path, *, progress: Progress | None = None, resume: bool = True) -> Path:
    """Measure and write ``saturation.safetensors`` in the folder ``out``. A finished file is left as it is."""
    from safetensors.torch import save_file

    target, layers = Path(out) / FILE, decoder_layers(model)
    if resume and target.exists():
        load_saturation(target, len(layers))
        return Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    setup = {"what": "saturation", "layers": len(layers), "model": type(model).__name__}
    sums = RunningSums(target.with_name("sums.safetensors"), setup, resume=resume)
    cosines = saturation(model, layers, inputs, sums=sums, progress=progress)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    save_file({"cosines": torch.tensor(cosines)}, beside, metadata={"kind": KIND, "texts": str(sums.done)})
    os.replace(beside, target)
    sums.forget()
    return Path(out)


def load_saturation(path: str | os.PathLike[str], depth: int) -> list[float]:
    """The cosines of all ``depth`` layers from such a file, or its folder; or say what is wrong."""
    from safetensors import SafetensorError, safe_open

    source = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(str(source), framework="pt") as file:
            header = file.metadata() or {}
            cosines = file.get_tensor("cosines").tolist() if header.get("kind") == KIND else []
    except (OSError, SafetensorError) as error:
        raise OptionError(f"saturation={str(path)!r} cannot be read: {error}. Measure it with vlprune calibrate --method ffn_skip") from error
    if len(cosines) != depth:
        raise OptionError(f"saturation={str(path)!r} holds {len(cosines)} layers, and this model has {depth}: measure it on this model")
    return [float(value) for value in cosines]


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
