"""VisionZip: dominant tokens (CLS among them) and contextual ones; the stored indices are those of the dominant patches."""

from __future__ import annotations

from typing import Any


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case."""
    keep = meta["dominant"] + meta["contextual"]
    return {"method": "visionzip", "keep": keep, "contextual": meta["contextual"], "variant": "code", "roles": ("dominant",)}
