"""Scores that several benchmarks share: chosen letters, exact and normalised matches. Text in, a share in [0, 1] out."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans({mark: " " for mark in string.punctuation if mark not in "'-."})


def normalised(text: str) -> str:
    """Lower case, without articles, punctuation and doubled spaces; dots stay within numbers."""
    text = text.lower().translate(_MARKS)
    text = re.sub(r"\.(?!\d)", " ", text)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the stripped answer is one of the references, letter for letter."""
    return float(answer.strip() in {reference.strip() for reference in references})


def normalised_match(answer: str, references: Sequence[str]) -> float:
    """1 where both say the same after `normalised`."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer to a multiple-choice question means, or ``None``.

    In this order: a letter by itself or marked as one ("B", "(B)", "B.", "Answer: B"); the text of exactly one choice; the first letter that stands alone.
    """
    allowed = LETTERS[: len(choices)] or LETTERS
    text = answer.strip()
    marked = re.match(rf"^\W*(?:the\s+)?(?:(?:best|correct)\s+)?(?:answer|option|choice)?\W*(?:is\b)?\W*([{allowed}])(?:\W|$)", text, re.IGNORECASE)
    if marked and (marked.group(1).isupper() or not re.match(r"^a\s+\w", text)):
        return marked.group(1).upper()
    plain = normalised(text)
    equal = [letter for letter, choice in zip(allowed, choices, strict=False) if plain and normalised(choice) == plain]
    if len(equal) == 1:
        return equal[0]
    inside = [letter for letter, choice in zip(allowed, choices, strict=False) if normalised(choice) and f" {normalised(choice)} " in f" {plain} "]
    if len(inside) == 1:
        return inside[0]
    alone = re.search(rf"(?<![\w'])([{allowed}])(?![\w'])", text)
    return alone.group(1) if alone else None


def letter_score(answer: str, choices: Sequence[str], right: str) -> float:
    """1 where the chosen letter is ``right``."""
    return float(chosen_letter(answer, choices) == right.strip().upper())


def lettered(choices: Sequence[str], form: str = "{letter}. {choice}") -> str:
    """The choices, one a line, with their letters."""
    return "\n".join(form.format(letter=letter, choice=choice) for letter, choice in zip(LETTERS, choices, strict=False))
