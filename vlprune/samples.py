"""Pictures with questions to measure on: a folder, a list in a file, or scenes of digits for the embedded model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.demo import open_image
from vlprune.errors import OptionError, VlpruneError
from vlprune.loading import Loaded
from vlprune.video import read_video

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")


@dataclass(frozen=True)
class Sample:
    """One question about pictures together, or about a video.

    Attributes:
        pictures: pictures, or their files.
        video: a video's file; then there are no pictures.
    """

    question: str
    pictures: tuple[Any, ...] = ()
    video: Path | None = None

    def inputs(self, loaded: Loaded, frames: int = 8) -> dict[str, Any]:
        """Model inputs. A model that takes no videos gets ``frames`` pictures."""
        if self.video is not None:
            clip = read_video(self.video, frames)
            return loaded.inputs(self.question, clip.frames, video=loaded.takes_video, clip=clip)
        return loaded.inputs(self.question, [open_image(picture) if isinstance(picture, Path) else picture for picture in self.pictures])


def read_samples(source: Path, question: str, most: int) -> list[Sample]:
    """At most ``most`` samples, evenly spread over what there is.

    Args:
        source: a folder of pictures and videos, or a ``.jsonl`` file with an object a line: ``"image"`` (a file, relative to this one), ``"images"``
            or ``"video"``, and ``"question"`` if it has one of its own. Other keys are left alone.
        question: asked where there is no other.
        most: how many are enough.
    """
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in (*PICTURES, *VIDEOS))
        if not files:
            raise OptionError(f"no picture or video in the folder {str(source)!r} (looked for {', '.join((*PICTURES, *VIDEOS))})")
        found = [Sample(question, video=path) if path.suffix.lower() in VIDEOS else Sample(question, (path,)) for path in files]
    elif source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines()
        found = [_from_line(line, f"{source}:{number}", source.parent, question) for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise OptionError(f"{str(source)!r} is empty")
    else:
        raise OptionError(f"samples={str(source)!r}: there is no such folder of pictures or .jsonl file")
    count = min(most, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def digit_samples(most: int, seed: int = 1) -> list[Sample]:
    """Scenes that the embedded model could have been trained on, one question each; the held-out ones stay for measuring."""
    try:
        digits: Any = importlib.import_module("vlprune.evals.digits")
        digits.scene("train", 0)
    except ImportError as error:
        raise VlpruneError(f"the digit scenes need {error.name}, which is not installed: pip install 'vlprune[evals]'") from error
    found = []
    for number in range(most):
        scene = digits.scene("train", number, seed=seed)
        asked = digits.questions(scene)
        found.append(Sample(asked[7 * number % len(asked)].text, (scene.pil(),)))
    return found


def _from_line(line: str, where: str, folder: Path, question: str) -> Sample:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{where} is no JSON: {error}") from error
    if not isinstance(entry, Mapping) or sum(name in entry for name in ("image", "images", "video")) != 1:
        raise OptionError(f'{where}: an object with one of "image", "images" or "video" is needed, such as {{"image": "a.jpg", "question": "..."}}')
    text = str(entry.get("question", question))
    if "video" in entry:
        return Sample(text, video=folder / str(entry["video"]))
    names = entry["images"] if "images" in entry else [entry["image"]]
    if not isinstance(names, list) or not names:
        raise OptionError(f'{where}: "images" is a list of files')
    return Sample(text, tuple(folder / str(name) for name in names))
