"""MMBench, English dev: 1,164 multiple-choice questions in twenty abilities, each asked again with its choices moved round.

Reference: Liu et al., ECCV 2024, arXiv:2307.06281. Official repository: https://github.com/open-compass/MMBench.

Layout: ``mmbench_dev_en_20231003.tsv`` or ``MMBench_DEV_EN.tsv`` (index, question, hint, A to D, answer, category, l2-category, image in base64, or the
index of the row with the picture). Rows with an index of a million and more repeat the question of ``index % 1000000`` with its choices moved on.
Prompt: as in the official loader the hint where there is one, the question and "There are several options:", with spaces between, then ``A. text`` lines;
LLaVA's and lmms-eval's last line "Answer with the option's letter from the given choices directly."
Metric: accuracy over all rows, and by l2-category. The summary has the accuracy in the first order, and the official circular one where rows that repeat
are there: right only where every order is; with some of the samples, over the questions of which all orders are there.
Differences: the official code asks a language model about answers without a letter, and draws one where that fails too; here such an answer is wrong.
lmms-eval leaves an empty line in front of the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score
from vlprune.evals.rows import Row, base64_picture, first, read_rows
from vlprune.evals.scoring import LETTERS

COLUMNS = ("index", "question", "A", "B", "answer", "category", "image")
AFTER = "Answer with the option's letter from the given choices directly."
ROUND = 1_000_000


def load(source: Source) -> list[Sample]:
    """The rows of a split, in the order of the file."""
    split = source.split or "dev"
    named = [f"{name}*.tsv" for name in ("mmbench_{split}_en", "mmbench_{split}_20", f"MMBench_{split.upper()}_EN", "MMBench_{split}_EN")]
    rows = read_rows(source, named, columns=COLUMNS, split=split, config="en" if source.hub else None)
    cells = {str(row["index"]): row["image"] for row in rows}
    orders = Counter(int(row["index"]) % ROUND for row in rows)
    return [_sample(row, cells, orders) for row in rows]


def _sample(row: Row, cells: Mapping[str, Any], orders: Mapping[int, int]) -> Sample:
    index = str(row["index"])
    choices: tuple[str, ...] = ()
    for letter in "ABCDE":
        if _there(row.get(letter)):
            choices = (*choices, str(row[letter]))
        else:
            break
    right = str(row["answer"] or "").strip().upper()
    if len(right) != 1 or right not in LETTERS[: len(choices)]:
        raise OptionError(f"mmbench: question {index} has the answer {row['answer']!r}, which is none of its choices; those of the test split are not public")
    question = " ".join([str(row["hint"])] * _there(row.get("hint")) + [row["question"], "There are several options:"])
    kind = str(first(row, "l2-category", "L2-category") or row["category"])
    main = int(index) % ROUND
    facts = {"question": main, "orders": orders[main], "first": int(index) < ROUND}
    return Sample(index, asked(question, choices, after=AFTER), (right,), (_picture(index, cells),), choices=choices, kind=kind, facts=facts)


def _there(cell: Any) -> bool:
    """Whether a cell says something: pandas writes missing ones as "nan"."""
    return cell is not None and str(cell).strip() not in ("", "nan")


def _picture(index: str, cells: Mapping[str, Any]) -> Any:
    """The picture of a row, or that of the row which its cell names."""
    cell = cells[index]
    if not callable(cell) and str(cell) in cells and str(cell) != index:
        cell = cells[str(cell)]
    return cell if callable(cell) else base64_picture(cell)


def in_every_order(samples: Sequence[Sample], scores: Sequence[float], answers: Sequence[str]) -> Mapping[str, float]:
    """Percent right in the first order, and percent of the questions that are right in every order."""
    own: list[float] = []
    asked_in: dict[int, list[float]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        value = choice_score(sample, answer)
        if sample.facts["first"]:
            own.append(value)
        if sample.facts["orders"] > 1:
            asked_in.setdefault(sample.facts["question"], []).append(value)
    needed = {sample.facts["question"]: sample.facts["orders"] for sample in samples}
    whole = [min(values) for question, values in asked_in.items() if len(values) == needed[question]]
    found = {"first order %": 100 * sum(own) / len(own)} if own else {}
    return found | ({"circular %": 100 * sum(whole) / len(whole)} if whole else {})


BENCHMARK = Benchmark(
    "mmbench",
    "MMBench, English dev",
    "image",
    load,
    choice_score,
    source="Liu et al., arXiv:2307.06281; files and circular evaluation of github.com/open-compass/MMBench; last line as in LLaVA-1.5 and lmms-eval 0.7",
    layout="mmbench_dev_en_20231003.tsv or MMBench_DEV_EN.tsv (hub:lmms-lab/MMBench)",
    summary=in_every_order,
)
