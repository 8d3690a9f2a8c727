"""DivPrune: the ratio is the share that stays."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    return {"method": "divprune", "keep": meta["ratio"]}
