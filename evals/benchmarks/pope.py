"""POPE: is there an object of that kind in the photograph? 9,000 questions on COCO, asked of random, popular and adversarial absent objects.

Reference: Li et al., EMNLP 2023, arXiv:2305.10355. Official repository: https://github.com/RUCAIBox/POPE (output/coco, evaluate.py).

Layout: ``coco_pope_random.json``, ``coco_pope_popular.json``, ``coco_pope_adversarial.json`` (a row a line: question_id, image, text, label) and COCO's
``val2014/{image}``. A kind is also a split: ``random`` alone.
Prompt: the question as it is in the file; lmms-eval's and LLaVA's next line "Answer the question using a single word or phrase."
Metric: as in evaluate.py, the first sentence says no where it holds the word "no" or "not", otherwise yes. The summary has accuracy, precision, recall, F1
and the share of yes in percent, with "yes" as the positive answer, and the F1 of each kind.
Differences: evaluate.py takes an answer without a word for yes; here it is wrong and neither. Case does not matter. The paper means the three kinds; the
score is over all questions, which are 3,000 each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import Row, first, read_rows

KINDS = ("random", "popular", "adversarial")
FILES = ("coco_pope_{split}.json", "output/coco/coco_pope_{split}.json", "coco/coco_pope_{split}.json", "pope/coco_pope_{split}.json")
AFTER = "Answer the question using a single word or phrase."


def load(source: Source) -> list[Sample]:
    """The questions of one kind after the other."""
    if source.split is not None and source.split not in KINDS:
        raise OptionError(f"pope: --split {source.split!r} is none of {', '.join(KINDS)}")
    wanted = (source.split,) if source.split else KINDS
    files = PictureFiles(source, ("val2014", "images", "."))
    samples = []
    for kind, row in _rows(source, wanted):
        label = str(first(row, "label", "answer")).strip().lower()
        if label not in ("yes", "no"):
            raise OptionError(f"pope: {kind} question {row['question_id']} has the label {label!r}, which is neither 'yes' nor 'no'")
        prompt = f"{str(first(row, 'text', 'question')).strip()}\n{AFTER}"
        samples.append(Sample(f"{kind}-{row['question_id']}", prompt, (label,), (files.of(row, row["image"]),), kind=kind))
    files.check(samples)
    return samples


def _rows(source: Source, kinds: Sequence[str]) -> list[tuple[str, Row]]:
    if source.folder is None:
        rows = read_rows(replace(source, split=None), (), columns=("question_id", "question", "answer", "image", "category"))
        return [(row["category"], row) for row in rows if row["category"] in kinds]
    columns = ("question_id", "image", "text", "label")
    return [(kind, row) for kind in kinds for row in read_rows(replace(source, split=kind), FILES, columns=columns)]


def said(answer: str) -> str:
    """``"yes"``, ``"no"``, or nothing for an answer without a word."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    if not words:
        return ""
    return "no" if "no" in words or "not" in words else "yes"


def score(sample: Sample, answer: str) -> float:
    """1 where the answer says what the label says."""
    return float(said(answer) == sample.answers[0])


def counts(samples: Sequence[Sample], scores: Sequence[float], answers: Sequence[str]) -> Mapping[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes in percent, and the F1 of each kind."""
    heard = [said(answer) for answer in answers]
    labels = [sample.answers[0] for sample in samples]
    precision, recall, f1 = _f1(labels, heard)
    right = sum(word == label for word, label in zip(heard, labels, strict=True))
    found = {"accuracy %": 100 * right / len(heard), "precision %": precision, "recall %": recall, "F1 %": f1}
    found["yes %"] = 100 * heard.count("yes") / len(heard)
    for kind in dict.fromkeys(sample.kind for sample in samples):
        of_kind = [place for place, sample in enumerate(samples) if sample.kind == kind]
        found[f"F1 {kind} %"] = _f1([labels[place] for place in of_kind], [heard[place] for place in of_kind])[2]
    return found


def _f1(labels: Sequence[str], heard: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 in percent; 0 where nothing is there to divide by."""
    right = sum(label == word == "yes" for label, word in zip(labels, heard, strict=True))
    precision = right / max(1, heard.count("yes"))
    recall = right / max(1, labels.count("yes"))
    return 100 * precision, 100 * recall, 100 * 2 * right / max(1, heard.count("yes") + labels.count("yes"))


BENCHMARK = Benchmark(
    "pope",
    "POPE",
    "image",
    load,
    score,
    source="Li et al., arXiv:2305.10355; files and metrics of github.com/RUCAIBox/POPE evaluate.py; prompt as in LLaVA-1.5 and lmms-eval 0.7 tasks/pope",
    layout="coco_pope_{random,popular,adversarial}.json and val2014/{image} of COCO (hub:lmms-lab/POPE)",
    summary=counts,
)
