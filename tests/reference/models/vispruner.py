"""VisPruner: K tokens, a share of them for their attention."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    return {"method": "vispruner", "keep": meta["K"], "important": meta["important_ratio"]}
