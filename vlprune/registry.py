"""Methods by name. A method is one new file in ``vlprune/methods/`` with a ``CARD``: nothing else is edited."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from vlprune.errors import OptionError, unknown

_EXTRA: dict[str, Any] = {}


@cache
def _builtin() -> dict[str, Any]:
    package = importlib.import_module("vlprune.methods")
    cards: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        card = importlib.import_module(f"{package.__name__}.{info.name}").CARD
        if card.name in cards:
            raise OptionError(f"two methods are called {card.name!r}")
        cards[card.name] = card
    for entry in entry_points(group="vlprune.methods"):
        card = entry.load()
        if card.name in cards:
            raise OptionError(f"the installed plug-in {entry.value} brings a method {card.name!r}, which exists already")
        cards[card.name] = card
    return cards


def register(card: Any) -> Any:
    """Add a method of your own; a name that is taken is an error. Returns the card."""
    if card.name in _EXTRA or card.name in _builtin():
        raise OptionError(f"a method called {card.name!r} exists already; choose another name or unregister it first")
    _EXTRA[card.name] = card
    return card


def unregister(name: str) -> None:
    """Take a method added with `register` out again."""
    if name not in _EXTRA:
        raise unknown("registered method", name, _EXTRA)
    del _EXTRA[name]


def list_methods(tokens: str | None = None) -> list[str]:
    """Names of all methods, baselines first; ``tokens``: only those that reduce that set (``"visual"``, ``"text"`` or ``"all"``)."""
    names = [name for name, card in {**_builtin(), **_EXTRA}.items() if tokens in (None, card.tokens)]
    return sorted(names, key=lambda name: (name not in ("dense", "random", "uniform"), name))


def get_method(name: str) -> Any:
    """The card of a method: ``.needs``, ``.points``, ``.modality``, ``.paper``, ..."""
    cards = {**_builtin(), **_EXTRA}
    if name not in cards:
        raise unknown("method", str(name), cards)
    return cards[name]
