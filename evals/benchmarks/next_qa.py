"""NExT-QA, multiple choice: why, how, when and what in 5,440 videos of daily life, five choices each.

Reference: Xiao et al., CVPR 2021, arXiv:2105.08276. Official repository: https://github.com/doc-doc/NExT-QA (dataset/nextqa, eval_mc.py).

Layout: ``test.csv`` or ``val.csv`` (columns video, frame_count, width, height, question, answer (0 to 4), qid, type, a0 to a4), perhaps
``map_vid_vidorID.json``, and videos as ``NExTVideo/{video}.mp4`` or in the folders that the map names.
Prompt: the paper evaluates models that choose without a prompt; this is lmms-eval's: the question, ``A. text`` lines, "Answer with the option's letter from
the given choices directly."
Metric: accuracy, over all and by type; as in eval_mc.py TP counts as TN, and the summary has causal (C), temporal (T) and descriptive (D).
Differences: lmms-eval's nextqa_mc_test leaves the instruction to the model; the wording is that of its other multiple-choice tasks. Where no letter can be
read it draws one; here the answer is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_at
from vlprune.evals.rows import find_files, read_file, read_rows
from vlprune.evals.video_files import VideoFiles

FILES = ("{split}.csv", "nextqa/{split}.csv", "dataset/nextqa/{split}.csv")
MAPS = ("map_vid_vidorID.json", "nextqa/map_vid_vidorID.json", "dataset/nextqa/map_vid_vidorID.json")
COLUMNS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
AFTER = "Answer with the option's letter from the given choices directly."
GROUPS = {"C": "causal %", "T": "temporal %", "D": "descriptive %"}


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    rows = read_rows(source, FILES, columns=COLUMNS, config="MC" if source.hub else None)
    videos = VideoFiles(source, ("NExTVideo", "videos", "."))
    folders = {}
    if source.folder is not None and any((source.folder / name).is_file() for name in MAPS):
        folders = read_file(find_files(source.folder, MAPS)[0])[0]
    samples = []
    for row in rows:
        name, place = str(row["video"]), f"{row['video']}_{row['qid']}"
        choices = tuple(str(row[f"a{number}"]).strip() for number in range(5))
        file = videos.find(name)
        if not file.exists() and name in folders:
            file = videos.find(folders[name])
        kind = "TN" if row["type"] == "TP" else row["type"]
        prompt = asked(row["question"].strip(), choices, after=AFTER)
        samples.append(Sample(place, prompt, (letter_at(row["answer"], choices, f"next-qa: {place}"),), video=file, choices=choices, kind=kind))
    videos.check(samples)
    return samples


def by_group(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """Percent right of the causal, temporal and descriptive questions."""
    found: dict[str, list[float]] = {}
    for sample, score in zip(samples, scores, strict=True):
        found.setdefault(GROUPS.get(sample.kind[:1], "other %"), []).append(score)
    return {name: 100 * sum(values) / len(values) for name, values in sorted(found.items())}


BENCHMARK = Benchmark(
    "next-qa",
    "NExT-QA, multiple choice",
    "video",
    load,
    choice_score,
    source="Xiao et al., arXiv:2105.08276; files and groups of github.com/doc-doc/NExT-QA; prompt as in lmms-eval",
    layout="test.csv and NExTVideo/{video}.mp4, with map_vid_vidorID.json where the videos are in folders (hub:lmms-eval/NExTQA)",
    summary=by_group,
)
