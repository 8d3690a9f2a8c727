"""Portion: a part of the K tokens that stay, as a share (float in [0, 1]) or a number (int)."""

from __future__ import annotations

from vlprune.errors import OptionError

Portion = float | int


def check_portion(name: str, value: object) -> None:
    """Complain at build time about a portion that cannot work."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value or (isinstance(value, float) and value > 1):  # type: ignore[operator]
        raise OptionError(f"{name}={value!r}: a share of the kept tokens (a float in [0, 1]) or their number (an int from 0)")


def portion_of(name: str, value: Portion, num_keep: int) -> int:
    """How many of ``num_keep`` tokens that is; shares are rounded half to even."""
    if isinstance(value, float):
        return round(value * num_keep)
    if value > num_keep:
        raise OptionError(f"{name}={value}, but only {num_keep} tokens stay here. Give at most that, a share such as {name}=0.2, or a larger keep.")
    return value
