"""HiPrune on LLaVA: the object layer is 1-based there."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    return {"method": "hiprune", "keep": meta["K"], "alpha": meta["alpha"], "object_layer": meta["object_layer_1based"] - 1}
