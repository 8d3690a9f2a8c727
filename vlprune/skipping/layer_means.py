"""One number for each decoder layer, the mean over texts of something that each token does there: measured with resumption, written, and read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.skipping.layers import decoder_layers
from vlprune.skipping.running_sums import Progress, RunningSums


@dataclass(frozen=True)
class LayerMeans:
    """What is measured, and where it is kept.

    Attributes:
        name: of the numbers in the file ``{name}.safetensors``.
        option: of the method, which the file is given as. method: name of that method.
        watch: ``(hooks, layers, now)`` puts hooks on the layers that leave (B, L) numbers of each call's tokens in ``now``, by layer.
    """

    name: str
    option: str
    method: str
    watch: Callable[[HookSet, list[nn.Module], dict[int, Tensor]], None]

    @property
    def file(self) -> str:
        """In the folder of a calibration."""
        return f"{self.name}.safetensors"

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        inputs: Iterable[Mapping[str, Any]],
        *,
        sums: RunningSums | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        """The mean of each layer over all tokens that are not padding.

        Args:
            model: dense, as it is called with each of ``inputs``.
            layers: of its decoder, in order.
            inputs: keyword arguments of calls, such as a tokenizer makes them.
            sums: where it is added up, to go on from what is there.
            progress: told ``(done, total, what)``.

        Raises:
            OptionError: no inputs.
        """
        blocks = list(layers)
        sums = RunningSums(None, {}) if sums is None else sums
        now: dict[int, Tensor] = {}
        hooks = HookSet()
        try:
            self.watch(hooks, blocks, now)
            for call in sums.over(inputs, progress):
                model(**call)
                mask = call.get("attention_mask")
                real = torch.ones_like(now[0], dtype=torch.bool) if mask is None else mask.bool()
                sums.add("tokens", float(real.sum()))
                sums.add(self.name, torch.stack([now[number][real.to(now[number].device)].double().sum().cpu() for number in range(len(blocks))]))
        finally:
            hooks.remove()
        return [float(value) for value in sums.tensors[self.name] / sums.tensors["tokens"]]

    def calibrate(
        self, model: nn.Module, inputs: Iterable[Mapping[str, Any]], out: Path, *, progress: Progress | None = None, resume: bool = True
    ) -> Path:
        """Measure and write the file in the folder ``out``. A finished file is left as it is."""
        from safetensors.torch import save_file

        target, layers = Path(out) / self.file, decoder_layers(model)
        if resume and target.exists():
            self.load(target, len(layers))
            return Path(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        setup = {"what": self.name, "layers": len(layers), "model": type(model).__name__}
        sums = RunningSums(target.with_name("sums.safetensors"), setup, resume=resume)
        found = self.measure(model, layers, inputs, sums=sums, progress=progress)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        save_file({self.name: torch.tensor(found, dtype=torch.float64)}, beside, metadata={"kind": self._kind, "texts": str(sums.done)})
        os.replace(beside, target)
        sums.forget()
        return Path(out)

    def load(self, path: str | os.PathLike[str], depth: int) -> list[float]:
        """The numbers of all ``depth`` layers from such a file, or its folder; or say what is wrong."""
        from safetensors import SafetensorError, safe_open

        source = Path(path) / self.file if Path(path).is_dir() else Path(path)
        try:
            with safe_open(str(source), framework="pt") as file:
                known = (file.metadata() or {}).get("kind") == self._kind
                found = file.get_tensor(self.name).tolist() if known else []
        except (OSError, SafetensorError) as error:
            wanted = f"Measure it with vlprune calibrate --method {self.method}"
            raise OptionError(f"{self.option}={str(path)!r} cannot be read: {error}. {wanted}") from error
        if len(found) != depth:
            raise OptionError(f"{self.option}={str(path)!r} holds {len(found)} layers, and this model has {depth}: measure it on this model")
        return [float(value) for value in found]

    @property
    def _kind(self) -> str:
        return f"vlprune.{self.name}"
