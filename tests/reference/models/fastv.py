"""FastV: R is the share that leaves."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    return {"method": "fastv", "keep": 1 - meta["R"], "layer": meta["drop_before_layer_0based"]}
