"""Sums over many texts that go on where they were stopped, also by force: one small file, written anew every few texts, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import OptionError

KIND = "vlprune.running_sums"
#: ``(done, total, what)``: told while something long runs; ``total`` is 0 where it is not known.
Progress = Callable[[int, int, str], None]


class RunningSums:
    """What a pass over texts has added up.

    Args:
        path: the file; ``None``: in memory only.
        setup: plain values that say what is added up; a file of another pass is refused.
        resume: whether to go on from a file that is there; else it is written anew.
        every: texts between two writes.
    """

    def __init__(self, path: Path | None, setup: Mapping[str, Any], *, resume: bool = True, every: int = 8) -> None:
        self.path, self.setup, self.every = path, json.dumps(dict(setup), sort_keys=True), every
        self.tensors: dict[str, Tensor] = {}
        self.done = 0
        self._seen = hashlib.sha256()
        self._wanted = ""
        if path is not None and path.exists() and resume:
            self._read(path)

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum, in float64 on the CPU."""
        value = torch.as_tensor(value).detach().to("cpu", torch.float64)
        self.tensors[name] = self.tensors[name] + value if name in self.tensors else value.clone()

    def over(self, inputs: Iterable[Mapping[str, Any]], progress: Progress | None = None, what: str = "texts") -> Iterator[Mapping[str, Any]]:
        """The texts that are not added up yet. When the next one is asked for, the last one counts as done.

        Raises:
            OptionError: no texts, or others than those that the file has added up.
        """
        total = len(inputs) if isinstance(inputs, Sized) else 0
        before, number = self.done, 0
        for number, call in enumerate(inputs, 1):
            self._note(call)
            if number < before:
                continue
            if number == before:
                if self._seen.hexdigest() != self._wanted:
                    raise OptionError(f"{self.path} has added up {before} other texts than these. Give the same ones, another folder, or start anew.")
                if progress is not None:
                    progress(before, total, what)
                continue
            yield call
            self.done = number
            if progress is not None:
                progress(number, total, what)
            if self.path is not None and number % self.every == 0:
                self._write(self.path)
        if number < max(before, 1):
            raise OptionError("no texts to calibrate on; give some" if not number else f"{self.path} has added up {before} texts, and these are {number}")
        if self.path is not None and self.done > before:
            self._write(self.path)

    def forget(self) -> None:
        """Remove the file: what was added up is used."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _note(self, call: Mapping[str, Any]) -> None:
        for name in sorted(call):
            value = call[name]
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            self._seen.update(name.encode() + plain)

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        about = {"kind": KIND, "setup": self.setup, "done": str(self.done), "texts": self._seen.hexdigest()}
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, beside, metadata=about)
        os.replace(beside, path)

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise OptionError(f"{path} cannot be read ({error}); delete it and start anew") from error
        if about.get("kind") != KIND or about.get("setup") != self.setup:
            raise OptionError(f"{path} has added up something else: {about.get('setup', '?')}, not {self.setup}. Choose another folder, or start anew.")
        self.tensors, self.done, self._wanted = tensors, int(about["done"]), about["texts"]
