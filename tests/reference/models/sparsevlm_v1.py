"""SparseVLM: the program's lists do not count the clusters' tokens, ours do."""

from __future__ import annotations

from typing import Any

from vlprune.kernels.recycling import num_clustered


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    before, slots = int(meta["n_visual"]), []
    for listed in meta["lists"]:
        kept = min(listed, before - 1)
        before = kept + num_clustered(before - kept)[1]
        slots.append(before)
    layers = tuple(layer + 1 for layer in meta["prune_layers_0based"])
    return {"method": "sparsevlm", "variant": "v1", "keep": tuple(slots), "layers": layers, "appended": True}
