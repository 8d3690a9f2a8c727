"""LongVideoBench, validation: 1,337 multiple-choice questions about videos of up to an hour that refer to a moment in them.

Reference: Wu et al., NeurIPS 2024, arXiv:2407.15754. Official code: https://github.com/longvideobench/LongVideoBench (longvideobench_dataset.py).

Layout: ``lvb_val.json`` (list of id, video_path, question, candidates, correct_choice (from 0), duration_group, question_category, subtitle_path,
starting_timestamp_for_subtitles, duration), ``videos/{video_path}``, and for `longvideobench-subtitles` ``subtitles/{subtitle_path}``.
Prompt: the official one: "Question: ...", ``A. text`` lines, "Answer with the option's letter from the given choices directly."
With subtitles: as the official code, each text that is on screen at a frame lies between the frames, behind the last one before its middle.
Metric: accuracy, over all and by length of the video (the groups 15, 60, 600 and 3600 s).
Differences: a model that takes a video as one item gets the texts in order behind it, for nothing fits between its frames. Frames are those that `--frames`
and `--sampling` choose. A text without an end lasts until the video ends (official: the subtitles' beginning is subtracted, so it is lost where that is
not 0). Where no letter can be read the answer is wrong (official: drawn).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vlprune.evals import subtitles
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_at
from vlprune.evals.rows import Row, read_rows
from vlprune.evals.video_files import VideoFiles
from vlprune.video import Clip

FILES = ("lvb_{split}.json", "{split}-*.parquet", "{split}*.json")
COLUMNS = ("id", "video_path", "question", "candidates|option0", "correct_choice", "duration_group")
AFTER = "Answer with the option's letter from the given choices directly."


def load(source: Source, with_subtitles: bool = False) -> list[Sample]:
    """The questions with answers, in the order of the file."""
    needed = (*COLUMNS, *(("subtitle_path", "starting_timestamp_for_subtitles", "duration") if with_subtitles else ()))
    rows = read_rows(source, FILES, columns=needed, split="validation" if source.folder is None else "val")
    videos = VideoFiles(source, ("videos", "."))
    samples = []
    for row in rows:
        choices = candidates(row)
        prompt = asked(f"Question: {row['question']}", choices, after=AFTER)
        words = partial(said, prompt, [root / "subtitles" / row["subtitle_path"] for root in videos.roots], row) if with_subtitles else None
        right = letter_at(row["correct_choice"], choices, f"longvideobench: {row['id']}")
        file = videos.find(row["video_path"])
        samples.append(Sample(str(row["id"]), prompt, (right,), video=file, choices=choices, kind=f"{row['duration_group']} s", words=words))
    videos.check(samples)
    return samples


def candidates(row: Row) -> tuple[str, ...]:
    """The choices: a list in the official file, columns with "N/A" behind the last on the hub."""
    given = row["candidates"] if "candidates" in row else [row[f"option{number}"] for number in range(5) if f"option{number}" in row]
    return tuple(str(choice) for choice in given if choice != "N/A")


def said(prompt: str, files: Sequence[Path], row: Row, clip: Clip) -> list[str | int]:
    """Frames and subtitles in the order of time, then the prompt."""
    file = next((path for path in files if path.is_file()), files[0])
    lines = subtitles.read_json(file, row["starting_timestamp_for_subtitles"], row["duration"])
    return [*subtitles.between(lines, clip.times), prompt]


BENCHMARK = Benchmark(
    "longvideobench",
    "LongVideoBench, validation",
    "video",
    load,
    choice_score,
    source="Wu et al., arXiv:2407.15754; prompt and subtitles of github.com/longvideobench/LongVideoBench longvideobench_dataset.py",
    layout="lvb_val.json and videos/{video_path} (hub:longvideobench/LongVideoBench)",
)
