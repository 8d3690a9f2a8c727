"""Clothing photographs, test: 372 real pictures of ten classes, asked as a question with ten choices.

Source: https://github.com/alexeygrigorev/clothing-dataset-small (CC0), a set for classification.

Layout: ``test/{class}/*.jpg``, perhaps below ``clothing_160`` or ``clothing-dataset-small``; ``train`` and ``validation`` are the other splits.
Prompt: ours, as the set has none: "What kind of clothing is in the picture?", ``A. dress`` ... lines with the ten classes in alphabetical order, "Answer with
the option's letter from the given choices directly."
Metric: accuracy, and by class; the summary has the mean of the classes, which are not equally many.
Differences: a classifier has no prompt. Both a letter and the name of a class count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_of
from vlprune.evals.rows import read_rows

CLASSES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
QUESTION = "What kind of clothing is in the picture?"
AFTER = "Answer with the option's letter from the given choices directly."
ROOTS = (".", "clothing_160", "clothing-dataset-small", "data")
ENDINGS = (".jpg", ".jpeg", ".png")


def load(source: Source) -> list[Sample]:
    """The pictures of a split, one class after the other, by name."""
    split = source.split or "test"
    if source.folder is None:
        return [_of_row(place, row) for place, row in enumerate(read_rows(source, (), columns=("image", "label"), split=split))]
    folder = next((source.folder / root / split for root in ROOTS if (source.folder / root / split).is_dir()), None)
    if folder is None:
        looked = ", ".join(f"{root}/{split}".removeprefix("./") for root in ROOTS)
        raise OptionError(f"clothing: in {str(source.folder)!r} there is none of the folders {looked}")
    found = [_sample(f"{name}/{path.stem}", name, path) for name in CLASSES for path in _pictures(folder / name)]
    if not found:
        raise OptionError(f"clothing: in {str(folder)!r} there is none of the files {{class}}/*.jpg with the classes {', '.join(CLASSES)}")
    return found


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS)


def _of_row(place: int, row: Mapping[str, Any]) -> Sample:
    """A row of an image folder as `datasets` loads it: the label is a number in alphabetical order, or a name."""
    label = row["label"]
    name = CLASSES[label] if isinstance(label, int) and 0 <= label < len(CLASSES) else str(label)
    return _sample(f"{place}", name, row["image"])


def _sample(place: str, name: str, picture: Any) -> Sample:
    right = letter_of(name, CLASSES, f"clothing: {place}")
    return Sample(place, asked(QUESTION, CLASSES, after=AFTER), (right,), (picture,), choices=CLASSES, kind=name)


def mean_of_classes(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """The mean of the classes' accuracies, in percent."""
    found: dict[str, list[float]] = {}
    for sample, value in zip(samples, scores, strict=True):
        found.setdefault(sample.kind, []).append(value)
    return {"mean of classes %": 100 * sum(sum(values) / len(values) for values in found.values()) / len(found)}


BENCHMARK = Benchmark(
    "clothing",
    "Clothing photographs, test",
    "image",
    load,
    choice_score,
    source="pictures and classes of github.com/alexeygrigorev/clothing-dataset-small; the question is ours",
    layout="test/{class}/*.jpg",
    summary=mean_of_classes,
)
