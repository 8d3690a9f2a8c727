"""easy-VQA, test: 9,673 questions about shape and colour of 1,000 drawn pictures, with 13 answers. A tiny model gets them right.

Reference: Zhou, 2019. Official repository: https://github.com/vzhou842/easy-VQA (easy_vqa/data).

Layout: ``test/questions.json`` (a list of question, answer, number of the picture) and ``test/images/{number}.png``, or these below ``data``.
Prompt: the question as it is; the official model chooses among the 13 answers.
Metric: right where the answer is the word, or names no other of its kind: shapes, colours, yes and no ("a red circle" for "circle"). By kind.
Differences: the official model cannot say anything else than an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import find_files, read_rows
from vlprune.evals.scoring import normalised

ROOTS = ("", "data/", "easy_vqa/data/")
KINDS = {
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "yes/no": ("yes", "no"),
}


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    split = source.split or "test"
    samples = []
    if source.folder is None:
        rows = read_rows(source, (), columns=("question", "answer", "image"), split=split)
        return [_sample(place, row["question"], row["answer"], row["image"]) for place, row in enumerate(rows)]
    files = PictureFiles(source, tuple(f"{root}{split}/images" for root in ROOTS))
    file = find_files(source.folder, [f"{root}{split}/questions.json" for root in ROOTS])[0]
    for place, (question, answer, number) in enumerate(_triples(file)):
        samples.append(_sample(place, question, answer, files.find(f"{number}.png")))
    files.check(samples)
    return samples


def _triples(file: Path) -> list[list[Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"cannot read {str(file)!r}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, list) and len(one) == 3 for one in found):
        raise OptionError(f"cannot read {str(file)!r}: a list with a question, an answer and the number of a picture each is needed")
    return found


def _sample(place: int, question: str, answer: str, picture: Any) -> Sample:
    kind = next((name for name, words in KINDS.items() if answer in words), "")
    return Sample(str(place), question, (answer,), (picture,), kind=kind)


def score(sample: Sample, answer: str) -> float:
    """1 where the only word of its kind in the answer is the right one."""
    right = sample.answers[0]
    named = {word for word in normalised(answer).split() if word in KINDS.get(sample.kind, (right,))}
    return float(named == {right})


BENCHMARK = Benchmark(
    "easy-vqa",
    "easy-VQA, test",
    "image",
    load,
    score,
    source="files and answers of github.com/vzhou842/easy-VQA; the bare question, as its model gets it",
    layout="test/questions.json and test/images/{number}.png",
)
