"""MME: 2,374 questions to be answered with yes or no, two a picture, in ten subtasks of perception and four of cognition.

Reference: Fu et al., 2023, arXiv:2306.13394. Official repository: https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation,
eval_tool/calculation.py).

Layout: a folder a subtask, perhaps below ``MME_Benchmark_release_version``: ``{name}.txt`` (a line each: question, tab, Yes or No) beside ``{name}.jpg`` or
``.png``; in five of them the texts are in ``questions_answers_YN`` and the pictures in ``images``.
Prompt: the question as it is in the file, which ends with "Please answer yes or no."
Metric: points. acc is the percent of questions, acc+ the percent of pictures with both questions right; a subtask has the sum of both, perception and
cognition the sums of their subtasks (at most 2,000 and 800). The summary has them; the score is the accuracy over all questions, and by subtask.
As in calculation.py, an answer is yes or no where its first four letters hold that.
Differences: lmms-eval puts "Answer the question using a single word or phrase." in place of the file's last sentence. With some of the samples, points are
over the pictures with both questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import find_files, read_rows

GROUPS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
ROOTS = ("", "MME_Benchmark_release_version/")


def load(source: Source) -> list[Sample]:
    """The questions, one subtask after the other."""
    samples: list[Sample] = []
    if source.folder is None:
        for place, row in enumerate(read_rows(source, (), columns=("question_id", "image", "question", "answer", "category"))):
            samples.append(_sample(row["category"], row["question_id"], place, row["question"], row["answer"], row["image"]))
        return samples
    if source.split is not None:
        raise OptionError(f"--split {source.split!r}: nothing in MME is split; there are only its subtasks")
    for task in (task for tasks in GROUPS.values() for task in tasks):
        places = tuple(f"{root}{task}{inside}" for root in ROOTS for inside in ("/images", ""))
        files, part = PictureFiles(source, places), []
        for name, number, question, answer in _questions(source, task):
            part.append(_sample(task, f"{task}/{name}", number, question, answer, files.find(f"{name}.jpg")))
        files.check(part)
        samples += part
    return samples


def _questions(source: Source, task: str) -> Iterator[tuple[str, int, str, str]]:
    """Picture, number of the row in its file, question and answer."""
    assert source.folder is not None
    texts = find_files(source.folder, [f"{root}{task}/{inside}*.txt" for root in ROOTS for inside in ("questions_answers_YN/", "")])
    for text in texts:
        for number, line in enumerate(text.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                question, mark, answer = line.rpartition("\t")
                if not mark:
                    raise OptionError(f"cannot read {str(text)!r}: row {number} has no tab between a question and its answer")
                yield text.stem, number, question, answer


def _sample(task: str, picture: str, number: int, question: str, answer: str, shown: object) -> Sample:
    right = answer.strip().lower().rstrip(".")
    if right not in ("yes", "no"):
        raise OptionError(f"mme: question {question!r} of {picture} has the answer {answer!r}, which is neither 'Yes' nor 'No'")
    return Sample(f"{picture}-{number}", question.strip(), (right,), (shown,), kind=task, facts={"picture": picture})


def said(answer: str) -> str:
    """``"yes"``, ``"no"``, or nothing where the beginning is neither."""
    begin = answer.strip().lower()[:4]
    return "yes" if "yes" in begin else "no" if "no" in begin else ""


def score(sample: Sample, answer: str) -> float:
    """1 where the answer says what is right."""
    return float(said(answer) == sample.answers[0])


def points(samples: Sequence[Sample], scores: Sequence[float], answers: Sequence[str]) -> Mapping[str, float]:
    """Points of perception, cognition and of each subtask, over the pictures of which both questions are there."""
    pictures: dict[tuple[str, str], list[float]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        pictures.setdefault((sample.kind, sample.facts["picture"]), []).append(score(sample, answer))
    of_task: dict[str, list[float]] = {}
    for (task, _), pair in pictures.items():
        if len(pair) == 2:
            of_task.setdefault(task, []).append(50 * sum(pair) + 100 * (sum(pair) == 2))
    found = {task: sum(values) / len(values) for task, values in of_task.items()}
    totals = {group: sum(found[task] for task in tasks if task in found) for group, tasks in GROUPS.items()}
    return totals | {f"{task} points": value for task, value in found.items()}


BENCHMARK = Benchmark(
    "mme",
    "MME",
    "image",
    load,
    score,
    source="Fu et al., arXiv:2306.13394; prompt of its files, points of its eval_tool/calculation.py; hub columns as lmms-eval 0.7 tasks/mme reads them",
    layout="{subtask}/{name}.txt with {name}.jpg, or questions_answers_YN/ and images/ (hub:lmms-lab/MME)",
    summary=points,
)
