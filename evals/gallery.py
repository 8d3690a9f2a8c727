"""A few samples of a benchmark with what stayed of their pictures or frames under each setting, for the page of a results folder.

Samples are chosen on which the settings disagree most, of different kinds where that can be had. The model is run once more on each, under the settings
that are shown: dense, then random and the others of the smallest keep, then of the next larger ones while they fit.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vlprune
from vlprune.contact_sheet import look, resized
from vlprune.draw import Key
from vlprune.errors import VlpruneError
from vlprune.evals.asking import Opened, inputs_for, open_sample
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.settings import DENSE, RANDOM, Setting, parse_share
from vlprune.evals.worker import Worker
from vlprune.fitting import Fit

if TYPE_CHECKING:
    from PIL.Image import Image

Records = Mapping[tuple[str, str], Mapping[str, Any]]

SETTINGS = 12                               # of a sample, at most
FRAMES = 8                                  # of a clip, at most
PICTURE, FRAME = 224, 128                   # longer side in pixels


@dataclass
class Shown:
    """A setting on a sample.

    Attributes:
        verdict: ``"right"``, ``"wrong"``, a share of the score between, or ``"failed"``.
        pictures: data URLs with the captions of their frames.
        count, where: how many tokens stayed, and behind which points.
        problem: why there is no picture, or no answer.
    """

    row: str
    answer: str
    verdict: str
    pictures: list[tuple[str, str]] = field(default_factory=list)
    count: str = ""
    where: str = ""
    keys: list[Key] = field(default_factory=list)
    problem: str = ""


@dataclass
class Exhibit:
    """A sample on the page."""

    sample: Sample
    right: int
    asked: int
    shown: list[Shown]
    frames: str = ""
    problem: str = ""


class Album:
    """Turns pictures into data URLs until their bytes are used up."""

    def __init__(self, most: int) -> None:
        self.left, self.refused = most, 0

    def add(self, picture: Image) -> str | None:
        """A data URL, or ``None`` where there is no room."""
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=84, optimize=True)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        if len(url) > self.left:
            self.refused += 1
            return None
        self.left -= len(url)
        return url


def read_records(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of a benchmark by setting and sample."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        found[record["setting"], record["id"]] = record
    return found


def choose_settings(settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]], most: int = SETTINGS) -> tuple[list[Setting], str]:
    """The settings that are shown, in the order of the table, and in words which are not.

    Where a keep has more settings than there is room for, those with the best score on the benchmark are shown, of what drops visual tokens first.
    """
    score = {row["row"]: row["score"] for row in rows}
    once = [setting for setting in settings if setting.draw == 0]
    chosen = [setting for setting in once if setting.method == DENSE]
    keeps = sorted({setting.keep for setting in once if setting.method != DENSE}, key=lambda keep: float(parse_share(keep)))
    for number, keep in enumerate(keeps):
        group = [setting for setting in once if setting.keep == keep and setting.method != DENSE]
        if len(chosen) + len(group) > most:
            if number:
                break
            group.sort(key=lambda setting: (setting.method != RANDOM, not drops(setting), -score.get(setting.row, 0.0)))
            group = group[: most - len(chosen)]
        chosen += group
    hidden = [setting for setting in once if setting not in chosen]
    others = list(dict.fromkeys(setting.method for setting in hidden if setting.method not in {one.method for one in chosen}))
    larger = [keep for keep in keeps if not any(setting.keep == keep for setting in chosen)]
    words = []
    if others:
        best = sum(one.method not in (DENSE, RANDOM) for one in chosen)
        words.append(f"Shown are random and, of what drops visual tokens, the {best} with the best score at keep {keeps[0]}; not shown: {', '.join(others)}.")
    if larger:
        words.append(f"Keep {', '.join(reversed(larger))} is not shown.")
    return [setting for setting in once if setting in chosen], " ".join(words)


def drops(setting: Setting) -> bool:
    """Whether visual tokens leave at a point, so that there is something to draw."""
    return setting.built is not None and any(stage.tokens == "visual" and not stage.budget.is_everything for stage in setting.built.stages)


def choose_samples(samples: Sequence[Sample], settings: Sequence[Setting], records: Records, count: int) -> list[Sample]:
    """Samples on which the settings disagree most; among equals those that dense gets right and kinds that are not there yet, then in order."""
    rated: list[tuple[float, bool, int]] = []
    for place, sample in enumerate(samples):
        found = [records.get((setting.label, sample.id)) for setting in settings]
        scores = [float(record["score"]) for record in found if record is not None]
        if not scores or any(record is not None and record.get("failed") == "open" for record in found):
            continue
        mean = sum(scores) / len(scores)
        dense = next((record["score"] for setting, record in zip(settings, found, strict=True) if record is not None and setting.method == DENSE), 0.0)
        rated.append((-round(mean * (1 - mean), 9), dense < 1, place))
    rated.sort()
    most = -rated[0][0] if rated else 0.0
    kinds: set[str] = set()
    first = []
    for entry in rated:
        if samples[entry[2]].kind not in kinds and -entry[0] >= most / 2:          # nearly as telling as the best
            kinds.add(samples[entry[2]].kind)
            first.append(entry)
    order = first + [entry for entry in rated if entry not in first]
    return [samples[place] for _, _, place in order[:count]]


def exhibit(worker: Worker, card: Benchmark, sample: Sample, shown: Sequence[Setting], records: Records, album: Album, asked: Sequence[Setting]) -> Exhibit:
    """A sample with its answers and pictures. What cannot be drawn says why; the answers are there all the same."""
    scores = [records[setting.label, sample.id]["score"] for setting in asked if not setting.draw and (setting.label, sample.id) in records]
    made = Exhibit(sample, sum(score >= 1 for score in scores), len(scores), [_said(setting, sample, records) for setting in shown])
    try:
        opened = open_sample(sample, worker.plan.frames)
        inputs = inputs_for(worker.loaded, opened)
        pictures = [worker.loaded.seen(picture, inputs) for picture in opened.pictures]
    except Exception as error:                                           # whatever it is, the page is written
        made.problem = f"The pictures cannot be shown: {_words(error)}"
        return made
    if not pictures:
        made.problem = "This question has no picture."
        return made
    side = PICTURE if len(pictures) == 1 else FRAME
    panels: dict[str, list[Image]] = {}
    for setting, one in zip(shown, made.shown, strict=True):
        try:
            panels[setting.label] = _panels(worker, setting, one, inputs, pictures, side)
        except Exception as error:
            one.problem = one.problem or f"cannot be drawn: {_words(error)}"
    fused = min((len(found) for found in panels.values() if found), default=len(pictures))
    if opened.clip is not None and len(pictures) % fused == 0:                   # models that fuse neighbouring frames show the first of each
        panels = {label: found[:: max(len(found) // fused, 1)] for label, found in panels.items()}
    for setting, one in zip(shown, made.shown, strict=True):
        found = panels.get(setting.label, [])
        captions = _captions(opened, len(found))
        for place in _spread(len(found), FRAMES):
            url = album.add(found[place])
            if url is None:
                one.problem = one.problem or "no room for all pictures: the page would grow too large"
                break
            one.pictures.append((url, captions[place]))
    if fused > FRAMES:
        made.frames = f"{FRAMES} of {fused} frames are shown."
    return made


def _said(setting: Setting, sample: Sample, records: Records) -> Shown:
    record = records.get((setting.label, sample.id))
    if record is None:
        return Shown(setting.row, "", "failed", problem="was not asked")
    if record.get("failed"):
        return Shown(setting.row, "", "failed", problem=f"failed: {record['error']}")
    score = float(record["score"])
    return Shown(setting.row, record["answer"], "right" if score >= 1 else "wrong" if score <= 0 else f"{100 * score:.0f} % right")


@torch.no_grad()
def _panels(worker: Worker, setting: Setting, one: Shown, inputs: dict[str, Any], pictures: list[Image], side: int) -> list[Image]:
    if setting.built is None or not drops(setting):
        one.where = "as the model sees it" if setting.method == DENSE else "drops no visual tokens"
        return [resized(picture, side) for picture in pictures]
    entry = look(worker.loaded, inputs, pictures, Fit(vlprune.get_method(setting.method), setting.built), side)
    one.count, one.where, one.keys = entry.count, entry.where, entry.keys
    return entry.panels


def _captions(opened: Opened, panels: int) -> list[str]:
    """Times of the frames; models that fuse neighbours have fewer panels than frames."""
    if opened.clip is None or not panels or len(opened.clip.captions) % panels:
        return [""] * panels
    return opened.clip.captions[:: len(opened.clip.captions) // panels]


def _spread(count: int, most: int) -> Iterable[int]:
    return range(count) if count <= most else [place * count // most for place in range(most)]


def _words(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return (line if isinstance(error, VlpruneError) else f"{type(error).__name__}: {line}")[:300]
