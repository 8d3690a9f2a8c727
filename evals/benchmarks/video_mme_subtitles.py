"""Video-MME with subtitles: see `vlprune.evals.benchmarks.video_mme`; the texts on screen at the frames that were read are in front of the question."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlprune.evals.benchmarks import video_mme

BENCHMARK = replace(
    video_mme.BENCHMARK,
    name="video-mme-subtitles",
    title="Video-MME with subtitles",
    load=partial(video_mme.load, with_subtitles=True),
    layout=f"{video_mme.LAYOUT}, subtitle/{{videoID}}.srt where a video has some (hub:lmms-eval/Video-MME)",
)
