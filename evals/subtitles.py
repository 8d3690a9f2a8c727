"""Subtitles of a video: read from SubRip or JSON files, and set beside the frames that were read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlprune.errors import OptionError

_SPAN = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")


@dataclass(frozen=True)
class Line:
    """A text and the seconds from and to which it is shown."""

    start: float
    end: float
    text: str


def read_srt(path: Path) -> list[Line]:
    """The lines of a SubRip file, without its markup; ``[]`` where there is no such file."""
    if not path.is_file():
        return []
    found = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")):
        span = _SPAN.search(block)
        if span:
            text = " ".join(re.sub(r"<[^>]*>", "", block[span.end() :]).split())
            found.append(Line(_seconds(*span.groups()[:4]), _seconds(*span.groups()[4:]), text))
    return [line for line in found if line.text]


def _seconds(hours: str, minutes: str, seconds: str, rest: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + float(f"{seconds}.{rest}")


def read_json(path: Path, begin: float = 0.0, duration: float = 0.0) -> list[Line]:
    """The lines of one of LongVideoBench's files, ``[{"timestamp": [0.0, 1.5], "text": ""}]`` or ``[{"start": "00:00:00.000", "end": "", "line": ""}]``.

    Args:
        path: of the file.
        begin: seconds of the subtitles at which the video begins.
        duration: of the video; where a line does not say when it ends.

    Raises:
        OptionError: no such file, or it holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for row in rows:
            if "timestamp" in row:
                start, end = row["timestamp"]
                end = end if isinstance(end, float) else begin + duration
            else:
                start, end = (_clock(row[name]) for name in ("start", "end"))
            found.append(Line(start - begin, end - begin, row["text"] if "timestamp" in row else row["line"]))
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"cannot read the subtitles {str(path)!r}: {type(error).__name__}: {error}") from error


def _clock(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def shown(lines: Sequence[Line], times: Sequence[float]) -> list[str]:
    """The texts on screen at any of the times, in order, each line once."""
    return [line.text for line in lines if any(line.start <= time < line.end for time in times)]


def between(lines: Sequence[Line], times: Sequence[float]) -> list[str | int]:
    """Frames, by their numbers, and the texts that are on screen at any of them, each text behind the last frame before its middle.

    A line shorter than a second counts as on screen for a second around its middle.
    """
    parts: list[str | int] = []
    place = 0
    for line in lines:
        middle = (line.start + line.end) / 2
        while place < len(times) and times[place] <= middle:
            parts.append(place)
            place += 1
        start, end = (middle - 0.5, middle + 0.5) if line.end - line.start < 1 else (line.start, line.end)
        if any(start < time < end for time in times):
            parts.append(line.text)
    return [*parts, *range(place, len(times))]
