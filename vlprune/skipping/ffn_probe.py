"""Small copies of a model's MLPs for `spts`, made once from some texts, layer by layer, and kept in one safetensors file a layer.

    vlprune calibrate --method spts --model FOLDER --samples texts.jsonl --out probes
    vlprune.apply(model, "spts", probe="probes")

Stopped in the middle, the same call goes on: texts that were looked at are not looked at again, layers whose file is there are not made again.
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
from vlprune.skipping.layers import decoder_layers
from vlprune.skipping.running_sums import Progress, RunningSums

KIND = "vlprune.low_rank_ffn"
OPTION = "probe"
SUMS = "sums.safetensors"
PAIRS = ("gate", "up", "down")


@torch.no_grad()
def channel_importance(
    model: nn.Module,
    layers: Sequence[nn.Module],
    inputs: Iterable[Mapping[str, Any]],
    numbers: Sequence[int],
    share: float = 0.2,
    *,
    sums: RunningSums | None = None,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """(M,) for each layer in ``numbers``: how large the gated hidden of each channel gets, |act(gate) * up|.

    Of each text the mean over the channel's largest ``share`` of values, padding not counted; over texts, the mean weighted by their tokens.
    ``sums``: where it is added up, to go on from what is there.
    """
    sums = RunningSums(None, {}) if sums is None else sums
    real = [torch.ones(0)]
    hooks = HookSet()

    def look(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0].float().abs()                               # (B, L, M), what the last matrix is given
            values = hidden.reshape(-1, hidden.shape[-1])[real[0].to(hidden.device)]
            most = max(1, round(share * values.shape[0]))
            sums.add(f"layer_{number}", values.topk(most, dim=0).values.mean(dim=0) * values.shape[0])

        return hook

    try:
        for number in numbers:
            hooks.before(matrices(layers[number])[2], look(number))
        for call in sums.over(inputs, progress):
            mask, ids = call.get("attention_mask"), call["input_ids"]
            flags = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            real[0] = flags.reshape(-1)
            sums.add("tokens", float(flags.sum()))
            model(**call)
    finally:
        hooks.remove()
    return {number: (sums.tensors[f"layer_{number}"] / sums.tensors["tokens"]).float() for number in numbers}


def make_probes(
    model: nn.Module,
    layers: Iterable[nn.Module],
    inputs: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    width: int = 512,
    rank: int = 192,
    share: float = 0.2,
    progress: Progress | None = None,
    resume: bool = True,
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
        progress: told ``(done, total, what)``.
        resume: go on from what is in the folder; else make everything anew.

    Raises:
        OptionError: an MLP without gate, files of other widths, other texts than a stopped call had, or numbers that make no sense.
    """
    for name, value in (("width", width), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}: a whole number from 1")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"share={share!r}: the share of each channel's values that count, above 0 and up to 1")
    blocks, target = list(layers), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = [target / f"layer_{number}.safetensors" for number in range(len(blocks))]
    for path in (path for path in files if path.exists()):
        if not resume:
            path.unlink()
        elif (found := _header(path)) != (str(width), str(rank)):
            raise OptionError(f"{path} has width and rank {', '.join(found)}, not {width}, {rank}: choose another folder, or the same numbers")
    missing = [number for number, path in enumerate(files) if not path.exists()]
    if not missing:
        return target
    setup = {"what": "channel importance", "layers": len(blocks), "model": type(model).__name__, "share": share}
    sums = RunningSums(target / SUMS, setup, resume=resume)
    if sums.done and any(f"layer_{number}" not in sums.tensors for number in missing):
        sums = RunningSums(target / SUMS, setup, resume=False)           # layers that were there when the pass began are not any more
    importance = channel_importance(model, blocks, inputs, missing, share, sums=sums, progress=progress)
    for done, number in enumerate(missing, 1):
        gate, up, down = (part.weight.detach() for part in matrices(blocks[number]))
        channels = importance[number].topk(min(width, gate.shape[0])).indices.sort().values
        net = slimmed(gate, up, down, channels.to(gate.device), min(rank, channels.numel(), gate.shape[1]), activation_of(model))
        _write(net, files[number], width, rank)
        if progress is not None:
            progress(done, len(missing), "layers")
    sums.forget()
    return target


def calibrate(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    progress: Progress | None = None,
    resume: bool = True,
    width: int = 512,
    rank: int = 192,
    share: float = 0.2,
) -> Path:
    """`make_probes` for all layers of the model's decoder."""
    return make_probes(model, decoder_layers(model), inputs, out, width=width, rank=rank, share=share, progress=progress, resume=resume)


def load_probes(folder: str | os.PathLike[str], depth: int) -> list[LowRankMLP]:
    """The small copies of all ``depth`` layers, or say what is wrong."""
    from safetensors import safe_open

    found = []
    for number in range(depth):
        path = Path(folder) / f"layer_{number}.safetensors"
        if not path.exists():
            raise OptionError(
                f"probe={str(folder)!r} has no {path.name}: make them for this model's {depth} layers, with "
                f"vlprune calibrate --method spts --model FOLDER --samples FILE --out {folder}"
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
