"""ActivityNet-QA, test: 8,000 open questions about 800 long videos of human activities.

Reference: Yu et al., AAAI 2019, arXiv:1906.02467. Official repository: https://github.com/MILVLG/activitynet-qa (dataset/README.md, evaluation/eval.py).

Layout: ``test_q.json`` (list of video_name, question, question_id), ``test_a.json`` (list of answer, type, question_id), videos as ``v_{video_name}.mp4`` in
``videos/``, ``all_test/`` or beside. On the hub: lmms-eval/ActivityNetQA, with all columns in one table.
Prompt: lmms-eval's: the question with a capital and a question mark, "Answer the question using a single word or phrase."
Metric: normalised match, over all and by the nine official types; exact match, the official metric, in the summary. A judge where the user gives one.
Difference: lmms-eval scores with a language model by default; here that is only done with a judge that the user gives.
"""

from __future__ import annotations

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.open_answers import METRIC, exact_share, open_question, open_score
from vlprune.evals.rows import check_columns, read_rows
from vlprune.evals.video_files import VideoFiles

TYPES = ("motion", "spatial relation", "temporal relation", "yes/no", "colour", "object", "location", "number", "other")


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    rows = read_rows(source, ("{split}_q.json", "dataset/{split}_q.json"), columns=("video_name", "question", "question_id"))
    if source.folder is None:
        answers = rows
    else:
        answers = read_rows(source, ("{split}_a.json", "dataset/{split}_a.json"))
    check_columns(answers, ("answer", "type", "question_id"), "activitynet-qa")
    by_id = {row["question_id"]: row for row in answers}
    videos = VideoFiles(source, ("videos", "all_test", "."))
    samples = []
    for row in rows:
        name = row["question_id"]
        if name not in by_id:
            raise OptionError(f"activitynet-qa: question {name!r} has no answer in the file of answers")
        kind = TYPES[int(by_id[name]["type"])]
        samples.append(Sample(name, open_question(row["question"]), (str(by_id[name]["answer"]),), video=videos.find(f"v_{row['video_name']}"), kind=kind))
    videos.check(samples)
    return samples


BENCHMARK = Benchmark(
    "activitynet-qa",
    "ActivityNet-QA",
    "video",
    load,
    open_score,
    source="Yu et al., arXiv:1906.02467; files, types and exact match of github.com/MILVLG/activitynet-qa; prompt as in lmms-eval",
    layout="test_q.json, test_a.json and videos/v_{video_name}.mp4 (hub:lmms-eval/ActivityNetQA)",
    metric=METRIC,
    summary=exact_share,
    judge=True,
)
