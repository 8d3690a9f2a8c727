"""TransPrune: layers after which are 0-based layers before which; accumulated layers are 1-based."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    accumulate = tuple(layer - 1 for layer in meta["accumulate_layers_1based"])
    return {"method": "transprune", "keep": tuple(meta["ratios"]), "layers": tuple(meta["prune_after_layers_1based"]), "accumulate": accumulate}
