"""GQA, testdev balanced: 12,578 compositional questions about 398 photographs, made from scene graphs.

Reference: Hudson and Manning, CVPR 2019, arXiv:1902.09506. Official page: https://cs.stanford.edu/people/dorarad/gqa (questions1.2, eval.py).

Layout: ``testdev_balanced_questions.json`` (by question: question, imageId, answer, types with structural and semantic), ``images/{imageId}.jpg``.
Prompt: the official models choose without one; LLaVA's and lmms-eval's: the question, on the next line "Answer the question using a single word or phrase."
Metric: the answer equals the reference without case and punctuation, as in lmms-eval; by structural type, and the summary has eval.py's binary and open.
Differences: eval.py compares strings as they are, which suits models that choose among its answers. Consistency, validity, plausibility and distribution
need further official files and are not here.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import read_rows

FILES = ("{split}_balanced_questions.json", "questions/{split}_balanced_questions.json", "questions1.2/{split}_balanced_questions.json")
AFTER = "Answer the question using a single word or phrase."
_NO_MARKS = str.maketrans("", "", string.punctuation)


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    split = source.split or "testdev"
    config = f"{split}_balanced_instructions" if source.hub else None
    rows = read_rows(source, FILES, columns=("id", "question", "imageId", "answer"), split=split, config=config)
    shown = {}
    if source.folder is None:                                            # the hub keeps each picture once, apart from the questions
        pictures = read_rows(source, (), columns=("id", "image"), split=split, config=f"{split}_balanced_images")
        shown = {row["id"]: row for row in pictures}
    files = PictureFiles(source)
    samples = []
    for row in rows:
        picture = files.of(shown.get(row["imageId"], {}), row["imageId"])
        kind = (row.get("types") or {}).get("structural") or ""
        samples.append(Sample(str(row["id"]), f"{row['question']}\n{AFTER}", (row["answer"],), (picture,), kind=kind))
    files.check(samples)
    return samples


def score(sample: Sample, answer: str) -> float:
    """1 where both are equal without case and punctuation."""
    return float(_plain(answer) == _plain(sample.answers[0]))


def _plain(text: str) -> str:
    return text.strip().lower().translate(_NO_MARKS)


def binary_and_open(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """Percent right of the questions that want a free answer (query) and of all others, which offer two."""
    found: dict[str, list[float]] = {}
    for sample, value in zip(samples, scores, strict=True):
        if sample.kind:
            found.setdefault("open %" if sample.kind == "query" else "binary %", []).append(value)
    return {name: 100 * sum(values) / len(values) for name, values in sorted(found.items())}


BENCHMARK = Benchmark(
    "gqa",
    "GQA, testdev balanced",
    "image",
    load,
    score,
    source="Hudson and Manning, arXiv:1902.09506; files and groups of its official eval.py; prompt and match as in LLaVA-1.5 and lmms-eval 0.7 tasks/gqa",
    layout="testdev_balanced_questions.json and images/{imageId}.jpg (hub:lmms-lab/GQA)",
    metric="exact match",
    summary=binary_and_open,
)
