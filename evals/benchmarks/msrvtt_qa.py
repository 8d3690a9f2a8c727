"""MSRVTT-QA, test: 72,821 open questions, made from captions, about 2,990 clips of ten to thirty seconds.

Reference: Xu et al., ACM Multimedia 2017, "Video Question Answering via Gradually Refined Attention over Appearance and Motion". Official repository:
https://github.com/xudejing/video-question-answering.

Layout: ``test_qa.json`` (list of id, video_id, category_id, question, answer) and ``video/video{video_id}.mp4``.
Prompt: the official models choose without one; the question, "Answer the question using a single word or phrase." as for ActivityNet-QA in lmms-eval.
Metric: normalised match, over all and by question word as in the paper; exact match, the official metric, in the summary. A judge where the user gives one.
"""

from __future__ import annotations

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.open_answers import METRIC, asks_for, exact_share, open_question, open_score
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles

FILES = ("{split}_qa.json", "qa/{split}_qa.json", "MSRVTT-QA/{split}_qa.json")


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    rows = read_rows(source, FILES, columns=("id", "video_id", "question", "answer"))
    videos = VideoFiles(source, ("video", "videos", "TestVideo", "."))
    samples = []
    for row in rows:
        file = videos.find(f"video{row['video_id']}")
        samples.append(Sample(str(row["id"]), open_question(row["question"]), (row["answer"],), video=file, kind=asks_for(row["question"])))
    videos.check(samples)
    return samples


BENCHMARK = Benchmark(
    "msrvtt-qa",
    "MSRVTT-QA",
    "video",
    load,
    open_score,
    source="Xu et al., ACM Multimedia 2017; files of github.com/xudejing/video-question-answering; prompt as for ActivityNet-QA in lmms-eval",
    layout="test_qa.json and video/video{video_id}.mp4",
    metric=METRIC,
    summary=exact_share,
    judge=True,
)
