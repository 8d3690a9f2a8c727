"""Families with text to reduce: the text-only decoders of ``tests/text_families``, and two vision-language ones."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from tests.tiny import TinyFamily, families

#: Vision-language families that the laws of methods for text run over, too.
WITH_PICTURES = ("llava", "qwen2_5_vl")


@cache
def text_families() -> dict[str, TinyFamily]:
    """Every family by name."""
    package = importlib.import_module("tests.text_families")
    found: dict[str, TinyFamily] = {}
    for info in pkgutil.iter_modules(package.__path__):
        for family in importlib.import_module(f"tests.text_families.{info.name}").FAMILIES:
            found[family.name] = family
    return {**found, **{name: families()[name] for name in WITH_PICTURES}}
