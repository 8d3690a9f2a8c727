"""SparseVLM+: dropped on the output of a 0-based layer is dropped before the next."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    layers = tuple(layer + 1 for layer in meta["prune_layers_0based"])
    return {"method": "sparsevlm", "variant": "v2", "keep": tuple(meta["lists"]), "layers": layers}
