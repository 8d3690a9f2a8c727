"""Moving digit scenes: sixteen kinds of questions about what moves where, what appears when, in which order, how many and what stays; videos made anew.

Each clip (`vlprune.evals.moving_scenes`) is written as a video file of eight frames in a second (Motion JPEG in AVI), read back with decord as any video
is, and removed. The embedded video model learned such clips from other digits and other photographs.

Prompt: the question alone, as in training. Metric: exact match with the end token behind the word.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from vlprune.evals import moving_scenes
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.scoring import exact_match
from vlprune.video import Clip

COUNT = 240                                                              # fifteen of a kind


def load(source: Source) -> Iterable[Sample]:
    """Held-out clips with one balanced question each; fewer are the beginning of more."""
    for scene, question in moving_scenes.heldout_questions(source.count or COUNT, source.seed):
        file = partial(_read, scene.index, source.seed)
        yield Sample(f"{scene.index}", question.text, (question.answer,), video=file, kind=question.kind)


def _read(index: int, seed: int, read: Callable[[Path], Clip]) -> Clip:
    """Write the file, read it, remove it."""
    with tempfile.TemporaryDirectory(prefix="vlprune-") as folder:
        return read(moving_scenes.write(moving_scenes.clip("heldout", index, seed=seed), Path(folder) / f"{index}.avi"))


def score(sample: Sample, answer: str) -> float:
    """The right word, and nothing behind it."""
    return exact_match(answer, sample.answers)


BENCHMARK = Benchmark(
    "moving-scenes",
    "Moving digit scenes",
    "video",
    load,
    score,
    source="made by vlprune.evals.moving_scenes from scikit-learn's load_digits and the photographs of scikit-image; exact match with the end token behind it",
    max_new_tokens=2,
    embedded=True,
)
