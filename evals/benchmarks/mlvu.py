"""MLVU, multiple choice (dev): seven kinds of questions about videos of three minutes to two hours, four choices each.

Reference: Zhou et al., CVPR 2025, arXiv:2406.04264. Official code: https://github.com/JUNJIE99/MLVU (choice_bench.py).

Layout: ``json/1_plotQA.json`` ... ``json/7_topic_reasoning.json`` (lists of video, question, candidates, answer (its text), question_type, duration) and
``video/1_plotQA/{video}`` ... beside them; with or without the numbers in the names.
Prompt: the official instruction, ``Question:``, ``Options:``, one choice a line as ``(A) text``, ``Only give the best option.``
Metric: the mean of the tasks' accuracies is the summary's M-Avg, as official; the score is over all questions, and by task.
Differences: the official instruction is a system message, here it is the prompt's first line; the official code begins the answer with ``Best option:(``,
for which chat templates leave no room. The two open-ended tasks need a judge and are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_of
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles

BEFORE = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question."
)
AFTER = "Only give the best option."
TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")


def load(source: Source) -> list[Sample]:
    """The questions of the seven tasks, one task after the other."""
    if source.folder is None:
        return _from_hub(source)
    samples = []
    for number, task in enumerate(TASKS, 1):
        files = (f"json/{number}_{task}.json", f"json/{task}.json", f"{number}_{task}.json", f"{task}.json")
        rows = read_rows(source, files, columns=("video", "question", "candidates", "answer"))
        videos = VideoFiles(source, (f"video/{number}_{task}", f"video/{task}", f"{number}_{task}", task))
        part = []
        for place, row in enumerate(rows):
            choices = tuple(row["candidates"])
            prompt = asked(f"Question: {row['question']}\nOptions:", choices, before=BEFORE, after=AFTER, form="({letter}) {choice}")
            right = letter_of(row["answer"], choices, f"mlvu: question {place} of {task}")
            part.append(Sample(f"{task}-{place}", prompt, (right,), video=videos.find(row["video"]), choices=choices, kind=task))
        videos.check(part)
        samples += part
    return samples


def _from_hub(source: Source) -> list[Sample]:
    """The rows of sy1998/MLVU_dev: video_name, question with its choices as ``(A) text`` lines in it, answer as a letter, task_type."""
    videos = VideoFiles(source, (".", "video"))
    samples = []
    for place, row in enumerate(read_rows(source, (), columns=("video_name", "question", "answer", "task_type"))):
        prompt = asked(row["question"], (), before=BEFORE, after=AFTER)
        file = videos.find(row["video_name"])
        samples.append(Sample(f"{row['task_type']}-{place}", prompt, (row["answer"],), video=file, choices=("",) * 4, kind=row["task_type"]))
    videos.check(samples)
    return samples


def mean_of_tasks(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """M-Avg: the mean of the tasks' accuracies, in percent."""
    found: dict[str, list[float]] = {}
    for sample, score in zip(samples, scores, strict=True):
        found.setdefault(sample.kind, []).append(score)
    return {"M-Avg": 100 * sum(sum(values) / len(values) for values in found.values()) / len(found)}


BENCHMARK = Benchmark(
    "mlvu",
    "MLVU, multiple choice",
    "video",
    load,
    choice_score,
    source="Zhou et al., arXiv:2406.04264; prompt and metric of github.com/JUNJIE99/MLVU choice_bench.py; hub columns as lmms-eval's mlvu_dev reads them",
    layout="json/{1_plotQA ... 7_topic_reasoning}.json and video/{1_plotQA ...}/ (hub:sy1998/MLVU_dev)",
    summary=mean_of_tasks,
)
