"""Digit scenes: twelve kinds of questions about handwritten digits on photographs, made anew (`vlprune.evals.digits`); the embedded model learned them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from vlprune.evals import digits
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.scoring import exact_match

COUNT = 600


def load(source: Source) -> Iterable[Sample]:
    """Held-out scenes with one balanced question each; fewer are the beginning of more."""
    for scene, question in digits.heldout_questions(source.count or COUNT, source.seed):
        drawn = partial(_drawn, scene.index, source.seed)
        yield Sample(f"{scene.index}", question.text, (question.answer,), (drawn,), kind=question.kind)


def _drawn(index: int, seed: int) -> Any:
    return digits.scene("heldout", index, seed=seed).pil()


def score(sample: Sample, answer: str) -> float:
    """The right word, and nothing behind it."""
    return exact_match(answer, sample.answers)


BENCHMARK = Benchmark(
    "digits",
    "Digit scenes",
    "image",
    load,
    score,
    source="made by vlprune.evals.digits from scikit-learn's load_digits and the photographs of scikit-image; exact match with the end token behind it",
    max_new_tokens=2,
    embedded=True,
)
