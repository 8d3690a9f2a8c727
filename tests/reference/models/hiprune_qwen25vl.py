"""HiPrune on Qwen2.5-VL: sum scores. Where the stored case lost tokens to the subtraction, subtract as it did (1 of a sum over 4N queries)."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    lost = {"subtract": 1 / (4 * meta["n_visual"])} if meta["kept"] < meta["K"] else {}
    return {"method": "hiprune", "keep": meta["K"], "alpha": meta["alpha"], "object_layer": meta["object_layer_1based"] - 1, **lost}
