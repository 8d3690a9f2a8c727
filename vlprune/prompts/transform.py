"""The contract of a prompt transform, and of one that leaves words out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from vlprune.errors import OptionError
from vlprune.prompts.words import TokenScores, Word

#: ``text -> one number for each word between white space, or for each sub-word with its place``
TextScorer = Callable[[str], "TokenScores | Sequence[float]"]


class PromptTransform(Protocol):
    """Makes a prompt shorter: ``(text, keep) -> text``, ``keep`` in (0, 1]."""

    def __call__(self, text: str, keep: float) -> str:
        """The shorter prompt; at ``keep=1`` the prompt itself."""
        ...


@runtime_checkable
class WordChooser(Protocol):
    """A transform that leaves whole words out, so that what left can be shown."""

    @property
    def name(self) -> str:
        """Of the method."""
        ...

    @property
    def way(self) -> str:
        """How words are cut (`vlprune.prompts.words.WAYS`)."""
        ...

    def choose(self, text: str, words: Sequence[Word], forced: Sequence[bool], keep: float) -> tuple[list[bool], list[float]]:
        """Which of ``words`` stay, and the scores they were chosen by.

        Args:
            text: in which the words stand; what is out of reach is blanked out, so that places fit.
            words: in order, at least one.
            forced: those that have to stay.
            keep: share, in (0, 1).
        """
        ...

    def join(self, text: str, words: Sequence[Word], kept: Sequence[bool]) -> str:
        """The kept words as a text."""
        ...

    def __call__(self, text: str, keep: float) -> str:
        """As `PromptTransform`."""
        ...


def checked_keep(keep: Any) -> float:
    """``keep`` as a share in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise OptionError(f"keep={keep!r}: the share of a prompt that stays, above 0 and up to 1")
    return float(keep)
