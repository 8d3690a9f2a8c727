"""PyramidDrop: layers after which are 0-based layers before which."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    return {"method": "pyramiddrop", "keep": tuple(meta["ratios"]), "layers": tuple(meta["prune_after_layers_1based"])}
