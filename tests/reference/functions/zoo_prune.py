"""ZOO-Prune: sensitivity and projected features in, kept tokens out, in the order of picking; the estimator with given directions."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ
from torch import nn

from vlprune.kernels.sensitivity import central_differences
from vlprune.method import ModelFacts
from vlprune.methods.zoo_prune import zoo_prune
from vlprune.protocols import ScoreInputs


def check(case: Case) -> str:
    """Estimator or selection."""
    return _estimator(case) if "in.directions_raw" in case else _selection(case)


def _estimator(case: Case) -> str:
    layers = [nn.Linear(*case[f"in.w{number}"].T.shape) for number in (1, 2)]
    for number, layer in enumerate(layers, 1):
        layer.weight.data, layer.bias.data = case[f"in.w{number}"], case[f"in.b{number}"]
    projector = nn.Sequential(layers[0], nn.GELU(), layers[1])
    got = central_differences(projector, case["in.features"][None], case["in.directions_raw"], case.hyper["h"])[0]
    return apart("out.sensitivity_fp64", got, case["out.sensitivity_fp64"], 1e-4) or apart("out.sensitivity", got, case["out.sensitivity"], 1e-4)


def _selection(case: Case) -> str:
    tokens, tiles = case["in.features"][None], case.hyper.get("tiles")
    grid = None if tiles is None else _grid(case["in.frame_label"])
    stage = zoo_prune(ModelFacts()).stages[0]
    inputs = ScoreInputs(tokens, case["out.keep_indices"].numel(), grid, signals={stage.needs[0]: case["in.sensitivity"][None]})
    order = stage.selector.picks(stage.scorer(inputs), inputs)  # type: ignore[attr-defined]
    if grid is not None:                                                # listed by tile
        order = order.gather(1, grid[..., 0].gather(1, order).argsort(dim=1, stable=True))
    kept = stage.selector(stage.scorer(inputs), inputs).keep_indices[0]
    return differ("out.selected_order", order[0], case["out.selected_order"]) or differ("out.keep_indices", kept, case["out.keep_indices"])


def _grid(label: torch.Tensor) -> torch.Tensor:
    """(1, N, 3): a row a tile, newlines (-9999) without a place."""
    newline = label < 0
    place = torch.arange(label.numel())
    grid = torch.stack((label, torch.zeros_like(label), place), dim=-1)
    grid[newline] = -1
    return grid[None]
