"""Open questions that want a word or a phrase: the prompt, and how often the answer is right letter for letter and in what it says.

The older data sets were made for models that choose among the most frequent answers, so their official metric is the share of equal strings. Models that
write get an instruction, and their score is the normalised match; the exact one stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlprune.evals.benchmark import Sample
from vlprune.evals.scoring import exact_match, normalised_match

AFTER = "Answer the question using a single word or phrase."
METRIC = "normalised match"


def open_question(text: str) -> str:
    """The prompt: the question with a capital and one question mark, then the instruction, on one line as lmms-eval asks ActivityNet-QA."""
    plain = " ".join(text.split()).rstrip(" ?.")
    return f"{plain[:1].upper()}{plain[1:]}? {AFTER}"


def open_score(sample: Sample, answer: str) -> float:
    """1 where both say the same without case, articles and punctuation."""
    return normalised_match(answer, sample.answers)


def exact_share(samples: Sequence[Sample], scores: Sequence[float], answers: Sequence[str]) -> Mapping[str, float]:
    """Percent of answers that are equal letter for letter."""
    return {"exact match %": 100 * sum(exact_match(answer, sample.answers) for sample, answer in zip(samples, answers, strict=True)) / len(samples)}


def asks_for(question: str) -> str:
    """What a question asks for: its first word where that is one of the five by which MSVD-QA and MSRVTT-QA are reported."""
    word = question.split()[0].lower() if question.split() else ""
    return word if word in ("what", "who", "how", "when", "where") else "other"
