"""What a benchmark is: samples with official prompts and an official score. One file each in `vlprune.evals.benchmarks`, found by name.

A file ends with ``BENCHMARK = Benchmark(...)``. Everything heavy in a sample is lazy: pictures are files or functions, a video is a file, and both are
opened when the sample is asked, so that a benchmark of a hundred thousand questions is a list of short texts.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError, unknown
from vlprune.video import Clip


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in its benchmark, the same in every run: answers are kept under it.
        question: the text that the model gets, with the benchmark's own instructions.
        answers: what is right; for several annotators one each, in the official order.
        pictures: files, PIL images, or functions that return one; shown in this order in front of the question.
        video: a video's file, or a folder with its frames; then there are no pictures. Or ``(read) -> clip``, which makes a file and calls ``read`` with it.
        start, end: the part of the video that is asked about, in seconds.
        rate: frames a second of a folder with frames.
        choices: of a multiple-choice question, in the order of their letters.
        kind: the group of the sub-table that it belongs to, such as the task or the length of the video.
        facts: what the score needs beside the answers.
        words: of a video whose prompt depends on which frames were read (subtitles): ``(clip) -> parts``, where a text is a text, a number is that frame of
            the clip, and without numbers all frames come first. The model gets this instead of ``question``.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    pictures: tuple[Any, ...] = ()
    video: Path | Callable[[Callable[[Path], Clip]], Clip] | None = None
    start: float | None = None
    end: float | None = None
    choices: tuple[str, ...] = ()
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    words: Callable[[Clip], Sequence[str | int]] | None = None


@dataclass(frozen=True)
class Source:
    """Where a benchmark is read from.

    Attributes:
        folder: with the official files; ``None``: what needs none, or the hub.
        hub: id of a data set on the hub, for `datasets`, instead of a folder.
        split: another than the official one.
        seed: of samples that are made.
        count: how many samples are wanted at most, evenly spread (benchmarks that are made anew make as many); ``None``: all.
    """

    folder: Path | None = None
    hub: str | None = None
    split: str | None = None
    seed: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: for the command line, in lower case with dashes.
        title: for tables.
        modality: ``"image"`` or ``"video"``.
        load: ``(source) -> samples``, in an order that never changes. Says with an `OptionError` which files it looked for.
        score: ``(sample, answer) -> share in [0, 1]`` that is right.
        source: paper or page, and where prompt and metric are from.
        layout: the official files, in words: what a user has to put where.
        metric: the score's name, for tables.
        summary: ``(samples, scores (same order)) -> numbers`` by name that the benchmark reports beside its mean, such as MME's points or POPE's F1.
            Called with answers too if it takes three arguments: ``(samples, scores, answers)``.
        max_new_tokens: longest answer.
        embedded: whether it needs no data: made by us, from what is installed.
        default_hub: data set on the hub that holds it in the official layout, if there is one.
        judge: whether open answers may be given to a judge of the user's.
    """

    name: str
    title: str
    modality: str
    load: Callable[[Source], Iterable[Sample]]
    score: Callable[[Sample, str], float]
    source: str
    layout: str = ""
    metric: str = "accuracy"
    summary: Callable[..., Mapping[str, float]] | None = None
    max_new_tokens: int = 16
    embedded: bool = False
    default_hub: str | None = None
    judge: bool = False

    def __post_init__(self) -> None:
        if self.modality not in ("image", "video"):
            raise OptionError(f"benchmark {self.name!r}: modality {self.modality!r} is neither 'image' nor 'video'")


@cache
def _found() -> dict[str, Benchmark]:
    package = importlib.import_module("vlprune.evals.benchmarks")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    cards = [importlib.import_module(f"{package.__name__}.{name}").BENCHMARK for name in names]
    return {card.name: card for card in cards}


def list_benchmarks() -> list[str]:
    """Names of all benchmarks."""
    return sorted(_found())


def get_benchmark(name: str | Benchmark) -> Benchmark:
    """A benchmark by name; a `Benchmark` of your own passes through."""
    if isinstance(name, Benchmark):
        return name
    if name not in _found():
        raise unknown("benchmark", name, list_benchmarks())
    return _found()[name]


def load_samples(benchmark: Benchmark, source: Source) -> list[Sample]:
    """The samples, at most ``source.count`` of them evenly spread over the whole; ids are checked.

    Raises:
        OptionError: no samples, or two with one id.
    """
    found = list(benchmark.load(source))
    if not found:
        raise OptionError(f"{benchmark.name}: no samples in {source.folder or source.hub or 'its own scenes'}. It reads: {benchmark.layout or 'nothing'}")
    seen: set[str] = set()
    for sample in found:
        if sample.id in seen:
            raise OptionError(f"{benchmark.name}: two samples have the id {sample.id!r}")
        seen.add(sample.id)
    return spread(found, source.count)


def spread(found: Sequence[Any], count: int | None) -> list[Any]:
    """``count`` of them at even distances, in order."""
    most = len(found) if count is None else min(count, len(found))
    return [found[place * len(found) // most] for place in range(most)]
