"""A golden case: inputs and expected outputs of an authors' program, and what every checker needs to use one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlprune.method import Stage
from vlprune.protocols import ScoreInputs, Selection


@dataclass(frozen=True)
class Case:
    """One case: its name, hyper-parameters, and tensors by name (``in.*`` and ``out.*``)."""

    name: str
    hyper: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def load_cases(folder: Path) -> Iterator[Case]:
    """Every ``*.safetensors`` of a folder; hyper-parameters from ``cases.json``, else from the file's own metadata."""
    listed = folder / "cases.json"
    entries = (
        {entry["case"]: entry.get("hyper", {}) for entry in json.loads(listed.read_text())} if listed.exists() else {}
    )
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            hyper = entries.get(path.stem) or json.loads((file.metadata() or {}).get("hyper", "{}"))
        yield Case(path.stem, hyper, tensors)


def run_stage(
    stage: Stage,
    signals: Sequence[Tensor],
    *,
    tokens: Tensor | None = None,
    grid: Tensor | None = None,
    num_original: int | None = None,
    num_keep: int | None = None,
    modality: str = "image",
) -> Selection:
    """Score and select as the engine does; ``signals`` in the order of ``stage.needs``, each (B, N) or (B, N, C)."""
    if tokens is None:
        tokens = signals[0].new_zeros(*signals[0].shape[:2], 1)
    num_original = num_original or tokens.shape[1]
    inputs = ScoreInputs(
        tokens=tokens,
        num_keep=stage.budget.num_keep(num_original) if num_keep is None else num_keep,
        grid=grid,
        num_original=num_original,
        modality=modality,
        signals=dict(zip(stage.needs, signals, strict=True)),
    )
    return stage.selector(stage.scorer(inputs).float(), inputs)


def grid_of(frames: int, rows: int, columns: int) -> Tensor:
    """(1, N, 3) frame, row and column in raster order."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))[None]


def differ(name: str, got: Tensor, want: Tensor) -> str:
    """The first difference between two integer tensors in words; empty if there is none."""
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    wrong = (got != want).flatten().nonzero().flatten()
    if not wrong.numel():
        return ""
    at = int(wrong[0])
    there = f"first at {at}: got {got.flatten()[at]}, expected {want.flatten()[at]}"
    return f"{name}: {wrong.numel()} of {want.numel()} differ, {there}"


def apart(name: str, got: Tensor, want: Tensor, rtol: float) -> str:
    """The largest relative difference between two float tensors in words; empty if within ``rtol``."""
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if torch.allclose(got, want, rtol=rtol, atol=0.0):
        return ""
    return f"{name}: largest relative difference {((got - want).abs() / want.abs()).max():.2e}, allowed {rtol:.0e}"
