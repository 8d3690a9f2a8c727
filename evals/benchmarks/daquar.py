"""DAQUAR, test: 5,673 open questions of people and templates about 654 photographs of rooms.

Reference: Malinowski and Fritz, NeurIPS 2014, arXiv:1410.0210. Official page:
https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/vision-and-language/visual-turing-challenge

Layout: ``qa.894.raw.test.txt``, or ``qa.37.raw.test.txt`` for the reduced set (question and answer, a line each in turn), and
``nyu_depth_images/image{number}.png``. Instead of the first, ``all_qa_pairs.txt`` with ``test_images_list.txt`` (names of the split's pictures) will do.
Prompt: the official models choose without one; the question, with "the image" for "the image3", then "Answer the question using a single word or phrase."
Metric: normalised match, where several words (``bed, pillow``) may come in any order; exact match in the summary, and WUPS at 0.9 and 0.0 (percent) where
nltk and its WordNet data are there, a warning says so where they are not.
Differences: officially accuracy is the exact match. WUPS compares words after normalisation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlprune.errors import OptionError, VlpruneError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.open_answers import METRIC, exact_share, open_question
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import find_files, read_rows
from vlprune.evals.scoring import normalised
from vlprune.evals.wups import check_wordnet, wups

FILES = ("qa.894.raw.{split}.txt", "qa.37.raw.{split}.txt", "all_qa_pairs.txt")
PLACES = ("nyu_depth_images", "images", ".")
_NAME = re.compile(r"\bimage\d+\b")


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    split = source.split or "test"
    files = PictureFiles(source, PLACES)
    samples = []
    for place, (question, answer, shown) in enumerate(_asked(source, split, files)):
        prompt = open_question(_NAME.sub("image", question))
        samples.append(Sample(f"{place}", prompt, (answer,), (shown,)))
    files.check(samples)
    return samples


def _asked(source: Source, split: str, files: PictureFiles) -> Iterator[tuple[str, str, object]]:
    """Question, answer and picture."""
    if source.folder is None:
        for row in read_rows(source, (), columns=("question", "answer", "image"), split=split):
            yield row["question"], row["answer"], row["image"]
        return
    file = find_files(source.folder, [pattern.replace("{split}", split) for pattern in FILES])[0]
    wanted = _list_of(source.folder, split) if file.name == FILES[-1] else None
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number in range(0, len(lines), 2):
        name = _NAME.search(lines[number])
        if name is None or number + 1 == len(lines):
            raise OptionError(f"cannot read {str(file)!r}: row {number + 1} is no question that names its picture, with an answer below it: {lines[number]!r}")
        if wanted is None or name.group() in wanted:
            yield lines[number], lines[number + 1], files.find(f"{name.group()}.png")


def _list_of(folder: Path, split: str) -> set[str]:
    return {line.strip().removesuffix(".png") for line in find_files(folder, [f"{split}_images_list.txt"])[0].read_text(encoding="utf-8").splitlines()}


def words(text: str) -> list[str]:
    """The words of a list, in their order, normalised; officials write "_" for a space within one."""
    return [plain for plain in (normalised(part.replace("_", " ")) for part in text.split(",")) if plain]


def score(sample: Sample, answer: str) -> float:
    """1 where both list the same words."""
    return float(bool(words(answer)) and set(words(answer)) == set(words(sample.answers[0])))


def nearness(samples: Sequence[Sample], scores: Sequence[float], answers: Sequence[str]) -> Mapping[str, float]:
    """Exact match, and WUPS where WordNet is there, in percent."""
    found = dict(exact_share(samples, scores, answers))
    try:
        check_wordnet()
    except VlpruneError as error:
        warnings.warn(f"daquar: no WUPS in the tables. {error}", stacklevel=2)
        return found
    pairs = [([one.replace(" ", "_") for one in words(answer)], [one.replace(" ", "_") for one in words(sample.answers[0])])
             for sample, answer in zip(samples, answers, strict=True)]  # fmt: skip
    for threshold in (0.9, 0.0):
        found[f"WUPS {threshold} %"] = 100 * sum(wups(said, right, threshold) for said, right in pairs) / len(pairs)
    return found


BENCHMARK = Benchmark(
    "daquar",
    "DAQUAR, test",
    "image",
    load,
    score,
    source="Malinowski and Fritz, arXiv:1410.0210; files and WUPS of its official page; prompt as for the other open questions of lmms-eval",
    layout="qa.894.raw.test.txt (or qa.37.raw.test.txt) and nyu_depth_images/image{number}.png",
    metric=METRIC,
    summary=nearness,
    judge=True,
)
