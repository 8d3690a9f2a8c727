"""Video-MME: 2,700 multiple-choice questions about 900 videos from 11 seconds to an hour.

Reference: Fu et al., arXiv:2405.21075. Official repository: https://github.com/BradyFU/Video-MME (prompt in its README, eval_your_results.py).

Layout: ``videomme/test-*.parquet`` (columns video_id, duration, domain, sub_category, videoID, question_id, task_type, question, options, answer; as on
the hub at lmms-eval/Video-MME), ``data/{videoID}.mp4``, and for `video-mme-subtitles` ``subtitle/{videoID}.srt``.
Prompt: the README's. With subtitles: those on screen at the frames that were read, as it asks for; "based on the video" stays, as in its example.
Metric: accuracy, over all and by length (short, medium, long). The summary has the six domains.
Differences: an answer without a letter is wrong (official: not counted), and a letter is looked for by `vlprune.evals.scoring.chosen_letter` (official: the
first A, B, C or D anywhere, also inside of a word). Without any subtitle on screen the prompt is the one without subtitles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vlprune.evals import subtitles
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, without_letters
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles
from vlprune.video import Clip

FILES = ("videomme/{split}*.parquet", "{split}*.parquet", "videomme*.json", "{split}*.json")
COLUMNS = ("duration", "domain", "videoID|video_id", "question_id", "question", "options", "answer")
BEFORE = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
AFTER = "The best answer is:"
SUBTITLES = "This video's subtitles are listed below:"


def load(source: Source, with_subtitles: bool = False) -> list[Sample]:
    """All questions, in the official order."""
    rows = read_rows(source, FILES, columns=COLUMNS)
    videos = VideoFiles(source, ("data", "videos", "."))
    samples = []
    for row in rows:
        name = row.get("videoID") or row["video_id"]
        choices = without_letters(row["options"])
        prompt = asked(row["question"], choices, before=BEFORE, after=AFTER)
        words = partial(said, prompt, [root / "subtitle" / f"{name}.srt" for root in videos.roots]) if with_subtitles else None
        facts = {"domain": row["domain"]}
        file = videos.find(name)
        samples.append(Sample(row["question_id"], prompt, (row["answer"],), video=file, choices=choices, kind=row["duration"], facts=facts, words=words))
    videos.check(samples)
    return samples


def said(prompt: str, files: Sequence[Path], clip: Clip) -> list[str | int]:
    """The prompt with the subtitles at the frames of a clip in front."""
    lines = subtitles.shown([line for file in files for line in subtitles.read_srt(file)], clip.times)
    return ["\n".join([SUBTITLES, *lines, prompt]) if lines else prompt]


def by_domain(samples: Sequence[Sample], scores: Sequence[float]) -> Mapping[str, float]:
    """Percent right in each domain."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample, score in zip(samples, scores, strict=True):
        found[sample.facts["domain"]].append(score)
    return {f"{name} %": 100 * sum(values) / len(values) for name, values in sorted(found.items())}


LAYOUT = "videomme/test-*.parquet and data/{videoID}.mp4"
BENCHMARK = Benchmark(
    "video-mme",
    "Video-MME",
    "video",
    load,
    choice_score,
    source="Fu et al., arXiv:2405.21075; prompt and metric of github.com/BradyFU/Video-MME; columns of lmms-eval/Video-MME",
    layout=f"{LAYOUT} (hub:lmms-eval/Video-MME)",
    summary=by_domain,
)
