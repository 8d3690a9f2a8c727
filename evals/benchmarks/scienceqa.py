"""ScienceQA, test, questions with a picture: 2,017 school questions with two to five choices each.

Reference: Lu et al., NeurIPS 2022, arXiv:2209.09513. Official repository: https://github.com/lupantech/ScienceQA.

Layout: ``problems.json`` (by id: question, choices, answer (from 0), hint, image, grade, subject, split) and ``{split}/{id}/image.png``, both perhaps below
``data/scienceqa`` and the pictures below ``images``.
Prompt: LLaVA's and lmms-eval's: ``Context: `` with the hint where there is one, the question, ``A. text`` lines, "Answer with the option's letter from the
given choices directly." The official prompts are for models that see captions instead of pictures, with worked examples in front.
Metric: accuracy, over all and by subject; the summary has the paper's grades 1 to 6 and 7 to 12.
Differences: lmms-eval takes only a letter, or a letter with a dot in front, for an answer; here other ways to name one choice count too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_at
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import Row, read_rows

FILES = ("problems.json", "data/scienceqa/problems.json", "scienceqa/problems.json")
COLUMNS = ("question", "choices", "answer", "hint", "image", "grade", "subject")
AFTER = "Answer with the option's letter from the given choices directly."


def load(source: Source) -> list[Sample]:
    """The questions of a split that have a picture, in the order of the file."""
    split = source.split or "test"
    files = PictureFiles(source, tuple(f"{below}{name}" for below in ("", "data/scienceqa/", "scienceqa/") for name in (split, f"images/{split}", "images")))
    samples = []
    for place, row in _rows(source, split):
        choices = tuple(row["choices"])
        before = f"Context: {row['hint']}" if row["hint"] else ""
        right = letter_at(row["answer"], choices, f"scienceqa: {place}")
        picture = files.of(row, f"{place}/{row['image']}")
        prompt = asked(row["question"], choices, before=before, after=AFTER)
        samples.append(Sample(place, prompt, (right,), (picture,), choices=choices, kind=row["subject"], facts={"grade": row["grade"]}))
    files.check(samples)
    return samples


def _rows(source: Source, split: str) -> list[tuple[str, Row]]:
    """Rows with a picture, with their ids."""
    if source.folder is None:
        rows = read_rows(source, (), columns=COLUMNS, split=split, config="ScienceQA-IMG")
        return [(str(place), row) for place, row in enumerate(rows)]
    rows = read_rows(replace(source, split=None), FILES, columns=(*COLUMNS, "id", "split"))
    if split not in {row["split"] for row in rows}:
        raise OptionError(f"scienceqa: no question of the split {split!r}; there are {', '.join(sorted({row['split'] for row in rows}))}")
    return [(row["id"], row) for row in rows if row["split"] == split and row["image"]]


def by_grade(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """Percent right in grades 1 to 6 and 7 to 12."""
    found: dict[str, list[float]] = {}
    for sample, value in zip(samples, scores, strict=True):
        grade = str(sample.facts["grade"]).removeprefix("grade")
        if grade.isdigit():
            found.setdefault("grades 1-6 %" if int(grade) <= 6 else "grades 7-12 %", []).append(value)
    return {name: 100 * sum(values) / len(values) for name, values in sorted(found.items())}


BENCHMARK = Benchmark(
    "scienceqa",
    "ScienceQA, test with pictures",
    "image",
    load,
    choice_score,
    source="Lu et al., arXiv:2209.09513; files and groups of github.com/lupantech/ScienceQA; prompt as in LLaVA and lmms-eval 0.7 tasks/scienceqa",
    layout="problems.json and test/{id}/image.png (hub:lmms-lab/ScienceQA)",
    summary=by_grade,
)
