"""Small copies of a model's MLPs for `spts`, made once from some texts, layer by layer, and kept in one safetensors file a layer.

    probe_dir = make_probes(model, model.get_decoder().layers, inputs, "probes", width=512, rank=192)
    vlprune.apply(model, "spts", probe="probes")

Stopped in the middle, the same call goes on: layers whose file is there are not made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.scorers.low_rank_ffn import ACTIVATIONS, LowRankMLP, slimmed

KIND = "vlprune.low_rank_ffn"
PAIRS = ("gate", "up", "down")


@torch.no_grad()
def channel_importance(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Iterable[Mapping[str, Any]], numbers: Sequence[int], share: float = 0.2
) -> dict[int, Tensor]:
    """(M,) for each layer in ``numbers``: how large the gated hidden of each channel gets, |act(gate) * up|.

    Of each text the mean over the channel's largest ``share`` of values, padding not counted; over texts, the mean weighted by their tokens.
    """
    sums: dict[int, Tensor] = {}
    total, real = 0, [torch.ones(0)]
    hooks = HookSet()

    def look(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0].float().abs()                               # (B, L, M), what the last matrix is given
            values = hidden.reshape(-1, hidden.shape[-1])[real[0].to(hidden.device)]
            most = max(1, round(share * values.shape[0]))
            mean = values.topk(most, dim=0).values.mean(dim=0) * values.shape[0]
            sums[number] = sums[number] + mean if number in sums else mean

        return hook

    try:
        for number in numbers:
            hooks.before(matrices(layers[number])[2], look(number))
        for call in inputs:
            mask, ids = call.get("attention_mask"), call["input_ids"]
            flags = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            real[0] = flags.reshape(-1)
            total += int(flags.sum())
            model(**call)
    finally:
        hooks.remove()
    if not total:
        raise OptionError("no texts to calibrate on; give some inputs with input_ids")
    return {number: value / total for number, value in sums.items()}


def make_probes(
    model: nn.Module,
    layers: Iterable[nn.Module],
    inputs: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    width: int = 512,
    rank: int = 192,
    share: float = 0.2,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Make and write a small copy of each layer's MLP that has no file yet.

    Args:
        model: dense.
        layers: of its decoder, in order.
        inputs: calls of the model with texts, ``input_ids`` and perhaps ``attention_mask``; the paper takes 200.
        folder: of the files, made if it is not there.
        width: channels that are kept of the MLP's own; too large is all there is.
        rank: of each factored matrix; too large is all there is.
        share: of each channel's values that count, the largest.
        progress: told what goes on.

    Raises:
        OptionError: an MLP without gate, or files of other widths.
    """
    blocks, target = list(layers), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for number in range(len(blocks)):
        if (path := target / f"layer_{number}.safetensors").exists() and (found := _header(path)) != (str(width), str(rank)):
            raise OptionError(f"{path} has width and rank {', '.join(found)}, not {width}, {rank}: choose another folder, or the same numbers")
    missing = [number for number in range(len(blocks)) if not (target / f"layer_{number}.safetensors").exists()]
    if not missing:
        return target
    if progress is not None:
        progress(f"{len(inputs)} texts for {len(missing)} layers")
    importance = channel_importance(model, blocks, inputs, missing, share)
    for number in missing:
        gate, up, down = (part.weight.detach() for part in matrices(blocks[number]))
        channels = importance[number].topk(min(width, gate.shape[0])).indices.sort().values
        net = slimmed(gate, up, down, channels.to(gate.device), min(rank, channels.numel(), gate.shape[1]), activation_of(model))
        _write(net, target / f"layer_{number}.safetensors", width, rank)
        if progress is not None:
            progress(f"layer {number}")
    return target


def load_probes(folder: str | os.PathLike[str], depth: int) -> list[LowRankMLP]:
    """The small copies of all ``depth`` layers, or say what is wrong."""
    from safetensors import safe_open

    found = []
    for number in range(depth):
        path = Path(folder) / f"layer_{number}.safetensors"
        if not path.exists():
            raise OptionError(
                f"probe={str(folder)!r} has no {path.name}: make them with vlprune.skipping.ffn_probe.make_probes for this model's {depth} layers"
            )
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != KIND:
                raise OptionError(f"{path} is no probe of vlprune")
            pairs = [(file.get_tensor(f"{name}.0"), file.get_tensor(f"{name}.1")) for name in PAIRS]
        found.append(LowRankMLP(pairs[0], pairs[1], pairs[2], json.loads(header["activation"])))
    return found


def matrices(layer: nn.Module) -> tuple[Any, Any, Any]:
    """Gate, up and down projection of a layer's MLP."""
    mlp = getattr(layer, "mlp", None)
    parts = tuple(getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(part, nn.Module) for part in parts):
        raise OptionError(f"{type(layer).__name__}: looked for gate_proj, up_proj and down_proj in its mlp; other MLPs have no probe here")
    return parts  # type: ignore[return-value]


def activation_of(model: nn.Module) -> str:
    """Name of the activation in the model's config."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    name = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise OptionError(f"activation {name!r}: probes know {', '.join(ACTIVATIONS)}")
    return name


def _write(net: LowRankMLP, path: Path, width: int, rank: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.{side}": getattr(net, name)[side].cpu().contiguous() for name in PAIRS for side in (0, 1)}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, beside, metadata={"kind": KIND, "activation": json.dumps(net.activation), "width": str(width), "rank": str(rank)})
    os.replace(beside, path)


def _header(path: Path) -> tuple[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
    return header.get("width", "?"), header.get("rank", "?")
