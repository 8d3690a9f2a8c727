"""TGIF-QA, FrameQA test: 13,691 open questions about animated GIFs.

Reference: Jang et al., CVPR 2017, arXiv:1704.04497. Official repository: https://github.com/YunseokJANG/tgif-qa (dataset/README.md).

Layout: ``Test_frameqa_question.csv`` (tabs between; gif_name, question, answer, type (0 object, 1 number, 2 colour, 3 location), vid_id, key, description)
and ``gifs/{gif_name}.gif``, or the same clips as other video files.
Prompt: the official models choose without one; the question, "Answer the question using a single word or phrase." as for ActivityNet-QA in lmms-eval.
Metric: normalised match, over all and by type; exact match, the official metric, in the summary. A judge where the user gives one.
Difference: of the four tasks this is the open one that video language models are compared on; counting, actions and transitions are not here.
"""

from __future__ import annotations

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.open_answers import METRIC, exact_share, open_question, open_score
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles

FILES = ("{split}_frameqa_question.csv", "dataset/{split}_frameqa_question.csv", "{split}_frameqa_question.tsv")
TYPES = ("object", "number", "colour", "location")


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    rows = read_rows(source, FILES, columns=("gif_name", "question", "answer", "type", "vid_id"), split="test" if source.folder is None else "Test")
    videos = VideoFiles(source, ("gifs", "videos", "."))
    samples = []
    for number, row in enumerate(rows):
        kind = TYPES[int(row["type"])]
        samples.append(Sample(f"{number}-{row['vid_id']}", open_question(row["question"]), (row["answer"],), video=videos.find(row["gif_name"]), kind=kind))
    videos.check(samples)
    return samples


BENCHMARK = Benchmark(
    "tgif-qa",
    "TGIF-QA, FrameQA",
    "video",
    load,
    open_score,
    source="Jang et al., arXiv:1704.04497; files and types of github.com/YunseokJANG/tgif-qa; prompt as for ActivityNet-QA in lmms-eval",
    layout="Test_frameqa_question.csv and gifs/{gif_name}.gif",
    metric=METRIC,
    summary=exact_share,
    judge=True,
)
