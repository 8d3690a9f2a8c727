"""Multiple-choice questions: the prompt with its letters, the letter that is right, and the score of what a model said.

A multiple-choice `Sample` has its ``choices`` in the order of their letters and the right letter alone as its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Sample
from vlprune.evals.scoring import LETTERS, letter_score, lettered, normalised


def asked(question: str, choices: Sequence[str], *, before: str = "", after: str = "", form: str = "{letter}. {choice}") -> str:
    """The prompt: instructions, question, one choice a line, instructions; empty parts leave no empty line.

    Args:
        question: without its choices.
        choices: in the order of their letters.
        before: line in front of the question.
        after: line behind the choices.
        form: of a choice.
    """
    return "\n".join(part for part in (before, question, lettered(choices, form), after) if part)


def letter_at(index: Any, choices: Sequence[str], where: str = "") -> str:
    """The letter of a choice by its number, counted from 0; a number in text will do.

    Raises:
        OptionError: there is no such choice.
    """
    try:
        place = int(index)
    except (TypeError, ValueError):
        place = -1
    if not 0 <= place < len(choices):
        raise OptionError(f"{where}: the right choice {index!r} is not a number from 0 to {len(choices) - 1}".removeprefix(": "))
    return LETTERS[place]


def letter_of(text: str, choices: Sequence[str], where: str = "") -> str:
    """The letter of the choice with that text; the first one where two say the same.

    Raises:
        OptionError: no choice has it.
    """
    plain = [choice.strip() for choice in choices]
    if text.strip() not in plain:
        raise OptionError(f"{where}: the right answer {text!r} is none of the choices {', '.join(map(repr, choices))}".removeprefix(": "))
    return LETTERS[plain.index(text.strip())]


def choice_score(sample: Sample, answer: str) -> float:
    """1 where the answer means the right letter; an answer from which no letter can be read is wrong.

    The whole text of a choice comes first: in EgoSchema "C" is the person with the camera, so that choices begin like letters.
    """
    plain = normalised(answer)
    equal = [letter for letter, choice in zip(LETTERS, sample.choices, strict=False) if len(plain) > 1 and normalised(choice) == plain]
    if len(equal) == 1:
        return float(equal[0] == sample.answers[0])
    return letter_score(answer, sample.choices, sample.answers[0])


def without_letters(choices: Sequence[str]) -> tuple[str, ...]:
    """Choices without the letters that official files print in front of them, ``"A. red"`` or ``"(A) red"``; as they are where not all have their own."""
    found = []
    for letter, choice in zip(LETTERS, choices, strict=False):
        marks = [mark for mark in (f"({letter})", f"{letter}.", f"{letter})", f"{letter}:") if choice.strip().startswith(mark)]
        if not marks:
            return tuple(choices)
        found.append(choice.strip()[len(marks[0]) :].strip())
    return tuple(found)
