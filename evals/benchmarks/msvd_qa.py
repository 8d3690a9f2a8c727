"""MSVD-QA, test: 13,157 open questions, made from captions, about 520 clips of ten seconds.

Reference: Xu et al., ACM Multimedia 2017, "Video Question Answering via Gradually Refined Attention over Appearance and Motion". Official repository:
https://github.com/xudejing/video-question-answering.

Layout: ``test_qa.json`` (list of id, video_id, question, answer), ``video/vid{video_id}.avi``; or the clips under their names on YouTube, with
``youtube_mapping.txt`` (a line each: name, vid and number).
Prompt: the official models choose without one; the question, "Answer the question using a single word or phrase." as for ActivityNet-QA in lmms-eval.
Metric: normalised match, over all and by question word as in the paper; exact match, the official metric, in the summary. A judge where the user gives one.
"""

from __future__ import annotations

from pathlib import Path

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.open_answers import METRIC, asks_for, exact_share, open_question, open_score
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles

FILES = ("{split}_qa.json", "qa/{split}_qa.json", "MSVD-QA/{split}_qa.json")


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    rows = read_rows(source, FILES, columns=("id", "video_id", "question", "answer"))
    videos = VideoFiles(source, ("video", "videos", "YouTubeClips", "."))
    names = {number: name for root in videos.roots for number, name in _mapping(root / "youtube_mapping.txt").items()}
    samples = []
    for row in rows:
        file = videos.find(f"vid{row['video_id']}")
        if not file.exists() and f"vid{row['video_id']}" in names:
            file = videos.find(names[f"vid{row['video_id']}"])
        samples.append(Sample(str(row["id"]), open_question(row["question"]), (row["answer"],), video=file, kind=asks_for(row["question"])))
    videos.check(samples)
    return samples


def _mapping(file: Path) -> dict[str, str]:
    """Names on YouTube by number."""
    if not file.is_file():
        return {}
    pairs = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


BENCHMARK = Benchmark(
    "msvd-qa",
    "MSVD-QA",
    "video",
    load,
    open_score,
    source="Xu et al., ACM Multimedia 2017; files of github.com/xudejing/video-question-answering; prompt as for ActivityNet-QA in lmms-eval",
    layout="test_qa.json and video/vid{video_id}.avi, or YouTubeClips/ with youtube_mapping.txt",
    metric=METRIC,
    summary=exact_share,
    judge=True,
)
