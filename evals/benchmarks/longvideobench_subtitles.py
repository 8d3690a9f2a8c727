"""LongVideoBench with subtitles between the frames: see `vlprune.evals.benchmarks.longvideobench`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlprune.evals.benchmarks import longvideobench

BENCHMARK = replace(
    longvideobench.BENCHMARK,
    name="longvideobench-subtitles",
    title="LongVideoBench, validation, with subtitles",
    load=partial(longvideobench.load, with_subtitles=True),
    layout="lvb_val.json, videos/{video_path} and subtitles/{subtitle_path} (hub:longvideobench/LongVideoBench)",
)
