"""Sign language: 20 clips of one to three seconds, a word of American Sign Language each, asked with four words as choices.

Source: folder asl_gestures of https://github.com/intel-iot-devkit/sample-videos (CC-BY-4.0), made to demonstrate recognition.

Layout: ``{word}.mkv`` in the folder, or below ``intel_asl``, ``videos/intel_asl`` or ``asl_gestures``. The word is the file's name; any clips so named will do.
Prompt: ours, as the clips have none: "Which word is signed in the video?", ``A. again`` lines with four words, "Answer with the option's letter from the
given choices directly." The words are those a quarter, a half and three quarters of the alphabetical list further on. Every word of such a foursome is right
once, so that always the same letter, as chance, is right in 25 %.
Metric: accuracy; 20 clips mean a standard error of up to 11 points.
"""

from __future__ import annotations

from pathlib import Path

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score
from vlprune.evals.scoring import LETTERS
from vlprune.evals.video_files import ENDINGS, VideoFiles

QUESTION = "Which word is signed in the video?"
AFTER = "Answer with the option's letter from the given choices directly."
PLACES = ("intel_asl", "videos/intel_asl", "asl_gestures", ".")


def load(source: Source) -> list[Sample]:
    """The clips, by name."""
    if source.folder is None and source.hub is None:
        raise OptionError("sign-language: a folder with the clips, or hub:ID, is needed")
    if source.split is not None:
        raise OptionError(f"--split {source.split!r}: the clips of sign-language are not split")
    folders = [root / place for place in PLACES for root in VideoFiles(source).roots]
    clips = next((found for found in map(_clips, folders) if found), [])
    if len(clips) < 2:
        looked = ", ".join(repr(str(folder)) for folder in folders)
        raise OptionError(f"sign-language: there are no two clips, such as again.mkv and yes.mkv, in one of {looked}; endings: {', '.join(ENDINGS)}")
    words = [path.stem.replace("_", " ") for path in clips]
    samples = []
    for place, path in enumerate(clips):
        choices, right = foursome(words, place)
        samples.append(Sample(path.stem, asked(QUESTION, choices, after=AFTER), (LETTERS[right],), video=path, choices=choices))
    return samples


def foursome(words: list[str], place: int) -> tuple[tuple[str, ...], int]:
    """The choices for the word at a place of the list, and where among them it is."""
    count = min(4, len(words))
    right = place % count
    steps = [((number - right) % count) * len(words) // count for number in range(count)]
    return tuple(words[(place + step) % len(words)] for step in steps), right


def _clips(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in ENDINGS) if folder.is_dir() else []


BENCHMARK = Benchmark(
    "sign-language",
    "Sign language, 20 clips",
    "video",
    load,
    choice_score,
    source="clips of github.com/intel-iot-devkit/sample-videos (asl_gestures); the question is ours",
    layout="{word}.mkv, perhaps in intel_asl/",
)
