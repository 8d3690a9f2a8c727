"""Every error a user can cause: says what was given, what would do, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlpruneError(Exception):
    """Base class of all errors raised on purpose by vlprune."""


class UnknownNameError(VlpruneError, KeyError):
    """A method, option or benchmark of that name does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class OptionError(VlpruneError, ValueError):
    """An option has a value that cannot work."""


class UnsupportedModelError(VlpruneError, TypeError):
    """No adapter serves this model, or the model lacks what the adapter looks for."""


class UnsupportedPointError(VlpruneError, ValueError):
    """The model has no such pruning point, or it cannot serve this use."""


class MissingSignalError(VlpruneError, ValueError):
    """A method needs a signal that the model does not offer at that point."""


class UnsupportedCallError(VlpruneError, RuntimeError):
    """The model was called in a way that cannot be pruned exactly."""


class AlreadyAppliedError(VlpruneError, RuntimeError):
    """The model is already pruned by another handle."""


class NotFiniteError(VlpruneError, FloatingPointError):
    """Scores contain NaN."""


def unknown(what: str, given: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a misspelt name, with the nearest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownNameError(f"unknown {what} {given!r}.{hint} Known: {', '.join(names) or '(none)'}.")
