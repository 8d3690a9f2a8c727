"""One sheet with what each method keeps of the same picture, or of the frames of the same clip.

Kept patches are clear and outlined, dropped ones dim, in the colours of `vlprune.draw`: by role where a method has roles, by point where it drops at
several. For a picture the methods stand side by side, under headings that say where they act; for a clip the frames are the columns and the methods the
rows. Methods that do not fit are listed below with the reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlprune.api import apply
from vlprune.demo import open_image
from vlprune.draw import INK, PAPER, Key, _pillow, _rgb, _wrapped, paint_kept
from vlprune.embedded_video import load_llava_video
from vlprune.errors import OptionError, VlpruneError
from vlprune.fitting import Fit, fitting, reason
from vlprune.loading import Loaded, load_embedded
from vlprune.trace import PointRecord
from vlprune.video import Clip, read_video

if TYPE_CHECKING:
    from PIL.Image import Image

GREY, RULE = (112, 118, 126), (222, 226, 231)
BASELINES = ("dense", "random", "uniform")
SECTIONS = ("Baselines", "Inside the vision tower", "Before the language model", "Inside the language model")
MARGIN, GAP = 20, 12
PICTURE, FRAME, LABEL = 208, 128, 236       # widths: of a picture, of a frame, of the text before a row of frames
COLUMNS = 6
SCENE, CLIP = 5, 8                          # numbers of the held-out scenes that are drawn
MEANING = (
    "Clear and outlined: stays. Dim: dropped, where there are several points at the first of them. Colours: the roles of what stays, or the points where "
    "the others left, as said at each."
)


@dataclass(frozen=True)
class Subject:
    """What is drawn on.

    Attributes:
        pictures: one, or the frames of a clip.
        question: to go with it for the embedded model, which knows few words.
        captions: of the frames; none for a picture.
        clip: where the frames come from, if that is a file.
    """

    name: str
    pictures: list[Image]
    question: str
    captions: list[str] = field(default_factory=list)
    clip: Clip | None = None


@dataclass(frozen=True)
class Entry:
    """What one method keeps.

    Attributes:
        panels: a picture, or one for each frame.
        where: its points, in words.
        keys: what the colours mean, where there is more than one.
    """

    name: str
    panels: list[Image]
    kept: int
    total: int
    where: str = ""
    section: int = 0
    keys: list[Key] = field(default_factory=list)

    @property
    def count(self) -> str:
        """Tokens that stay."""
        return f"{self.kept:,} of {self.total:,}"


@dataclass(frozen=True)
class Sheet:
    """The finished picture, what is on it, and what is not."""

    picture: Image
    entries: list[Entry]
    left_out: dict[str, str]


def subject(image: Path | None, video: Path | None, clip: bool, frames: int) -> Subject:
    """A picture or video file, or without one a held-out scene of digits, or a clip of moving ones."""
    if sum((image is not None, video is not None, clip)) > 1:
        raise OptionError("give --image FILE, --video FILE or --clip, one of them")
    if image is not None:
        return Subject(image.name, [open_image(image)], "how many digits are there ?")
    if video is not None:
        found = read_video(video, frames)
        return Subject(video.name, found.frames, "how many digits are there ?", found.captions, found)
    try:
        from PIL import Image

        digits, moving = (importlib.import_module(f"vlprune.evals.{name}") for name in ("digits", "moving_digits"))
        if not clip:
            return Subject("a scene of digits", [digits.scene("heldout", SCENE).pil()], "where is the 0 ?")
        pictures = [Image.fromarray(frame) for frame in moving.clip("heldout", CLIP).frames]
    except ImportError as error:
        raise VlpruneError(f"the scenes of digits need {error.name}, which is not installed: pip install 'vlprune[evals]'") from error
    return Subject("a clip of moving digits", pictures, "where is the 9 ?", [f"frame {number}" for number in range(len(pictures))])


def embedded(given: Subject) -> Loaded:
    """The embedded model, for pictures or for videos."""
    return load_llava_video() if given.captions else load_embedded()


def draw_sheet(
    loaded: Loaded,
    given: Subject,
    names: Sequence[str],
    keep: Any,
    question: str,
    *,
    size: int | None = None,
    save: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Sheet:
    """Run every method that fits on the same input and draw what stays.

    Args:
        loaded: the model and its processor. One that takes no videos gets the frames of a clip as pictures.
        given: a picture or a clip.
        names: of methods; `dense` is the picture itself, which is always there.
        keep: share or number of visual tokens, for all of them.
        question: the methods that read the text read this.
        size: longer side of each picture in pixels.
        save: also write the sheet to this file.
        progress: called with the name of the method at work.
    """
    as_video = bool(given.captions) and loaded.takes_video
    inputs = loaded.inputs(question, given.pictures, video=as_video, clip=given.clip)
    shown = [loaded.seen(picture, inputs) for picture in given.pictures]
    fits, left_out = fitting(loaded.model, [name for name in names if name != "dense"], keep, "video" if as_video else "image")
    side = size or (FRAME if given.captions else PICTURE)
    entries = []
    for one in fits:
        progress(one.name)
        try:
            entries.append(look(loaded, inputs, shown, one, side))
        except VlpruneError as error:
            left_out[one.name] = reason(error).removeprefix(f"{one.name} ")
    if not entries:
        raise OptionError("nothing to draw: " + ("; ".join(f"{name}: {why}" for name, why in left_out.items()) or "name a method that drops something"))
    first = Entry("what the model sees", [resized(picture, side) for picture in shown], entries[0].total, entries[0].total)
    title = f"keep = {keep if isinstance(keep, int) else f'{keep:.3g}'} of the visual tokens of {loaded.name}"
    subtitle = "   ".join([f"asked: {question}", *loaded.notes])
    picture = compose([first, *entries], given.captions, title, subtitle, left_out, side)
    if save is not None:
        target = Path(save)
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, optimize=True)
    return Sheet(picture, entries, left_out)


@torch.no_grad()
def look(loaded: Loaded, inputs: dict[str, Any], pictures: Sequence[Image], one: Fit, side: int) -> Entry:
    """One method at work on the input."""
    model = loaded.model
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with apply(model, one.method) as handle:
        model(**inputs, **options)
        records = handle.report().points
    if not records:
        raise OptionError("drops nothing here")
    items = list(range(len(records[-1].items)))
    returns = any(stage.restore is not None for stage in one.method.stages)
    records = dropping(records)
    panels, keys = paint_kept(pictures, records, items, size=side)
    kept, total = (sum(part) for part in zip(*((int(records[-1].kept[i].numel()), records[0].items[i].num_tokens) for i in items), strict=True))
    labels = [record.point for record in records]
    where = (", ".join(labels) if len(labels) < 4 else f"{labels[0]} ... {labels[-1]}") + (", then back" if returns else "")
    return Entry(one.name, panels, kept, total, where, section_of(one.name, records), legend(keys))


def legend(keys: Sequence[Key]) -> list[Key]:
    """What needs saying: roles, if there are several; or who left where, in that order, and who stays. That the dim ones are dropped is seen."""
    *others, first = keys
    if len(others) < 2:
        return []
    if first.label == "dropped":
        return [key for key in others if key.count]
    return [key for key in (first, *others) if key.count]


def dropping(records: Sequence[PointRecord]) -> list[PointRecord]:
    """The records at which something leaves: the LLM repeats what the tower dropped, and a last stage may have nothing to do."""
    found: list[PointRecord] = []
    for record in records:
        if not found or any(now.numel() != before.numel() for now, before in zip(record.kept, found[-1].kept, strict=True)):
            found.append(record)
    return found


def section_of(name: str, records: Sequence[PointRecord]) -> int:
    """The heading that a method comes under: where it first drops."""
    place = records[0].point.partition(":")[0]
    return 0 if name in BASELINES else 1 if place.startswith("vision") else 2 if place == "before_llm" else 3


# laying out


def resized(picture: Image, side: int) -> Image:
    """Scaled to a longer side of ``side``."""
    image_module = _pillow()[0]
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), image_module.Resampling.LANCZOS if scale < 1 else image_module.Resampling.BICUBIC)


class Canvas:
    """A page that grows downwards: what is put on it is drawn at the end, when its height is known."""

    def __init__(self, width: int) -> None:
        _, _, fonts = _pillow()
        self.width, self.y = width, MARGIN
        self.small, self.normal, self.large = (fonts.load_default(size) for size in (12, 14, 20))
        self.actions: list[Callable[[Any, Any], None]] = []

    def text(self, x: float, y: float, words: str, font: Any, colour: Any = INK, anchor: str = "la") -> None:
        """Write a line."""
        self.actions.append(lambda sheet, pen: pen.text((x, y), words, font=font, fill=colour, anchor=anchor))

    def paste(self, x: int, y: int, picture: Image) -> None:
        """Put a picture."""
        self.actions.append(lambda sheet, pen: sheet.paste(picture, (x, y)))

    def line(self, y: int) -> None:
        """A thin rule across the page."""
        self.actions.append(lambda sheet, pen: pen.line((MARGIN, y, self.width - MARGIN, y), fill=RULE))

    def paragraph(self, words: str, font: Any, colour: Any, step: int) -> None:
        """Lines across the page, one under the other."""
        for line in _wrapped(words, font, self.width - 2 * MARGIN):
            self.text(MARGIN, self.y, line, font, colour)
            self.y += step

    def box(self, x: int, y: int, colour: Any) -> None:
        """A small square."""
        self.actions.append(lambda sheet, pen: pen.rounded_rectangle((x, y, x + 9, y + 9), 2, fill=colour))

    def chips(self, x: int, y: int, keys: Sequence[Key], width: int) -> int:
        """Colours with their names and counts, in as many lines as they take; the height used."""
        left, top = x, y
        for key in keys:
            words = f"{short(key)} {key.count:,}"
            length = int(self.small.getlength(words)) + 14
            if left > x and left + length > x + width:
                left, top = x, top + 17
            self.box(left, top + 3, _rgb(key.colour))
            self.text(left + 13, top, words, self.small, GREY)
            left += length + 9
        return top + 17 - y if keys else 0

    def finish(self) -> Image:
        """The page."""
        image_module, draw_module, _ = _pillow()
        sheet = image_module.new("RGB", (self.width, self.y + MARGIN), PAPER)
        pen = draw_module.Draw(sheet)
        for action in self.actions:
            action(sheet, pen)
        return sheet


def short(key: Key) -> str:
    """A legend entry for a narrow column."""
    return key.label.replace("dropped at ", "left at ").replace("stays", "stay")


def compose(entries: Sequence[Entry], captions: Sequence[str], title: str, subtitle: str, left_out: dict[str, str], side: int) -> Image:
    """Title, pictures in sections or frames in rows, what the looks mean, what is left out."""
    frames = len(entries[0].panels)
    moving = bool(captions)
    wide = max(panel.width for entry in entries for panel in entry.panels)
    columns = frames if moving else min(COLUMNS, len(entries))
    canvas = Canvas(max(720, 2 * MARGIN + (LABEL if moving else 0) + columns * (wide + GAP) - GAP))
    canvas.paragraph(title, canvas.large, INK, 28)
    canvas.paragraph(subtitle, canvas.small, GREY, 17)
    canvas.y += 6
    if moving:
        for number, caption in enumerate(captions):
            canvas.text(MARGIN + LABEL + number * (wide + GAP) + wide / 2, canvas.y, caption, canvas.small, GREY, "ma")
        canvas.y += 20
    for section, heading in enumerate(SECTIONS):
        members = [entry for entry in entries if entry.section == section]
        if not members:
            continue
        if section or not moving:
            canvas.text(MARGIN, canvas.y + 4, heading.upper(), canvas.small, GREY)
            canvas.line(canvas.y + 22)
            canvas.y += 32
        if moving:
            for entry in members:
                _row(canvas, entry, wide)
        else:
            for start in range(0, len(members), columns):
                _tiles(canvas, members[start : start + columns], wide, side)
    canvas.line(canvas.y)
    canvas.y += 8
    canvas.paragraph(MEANING, canvas.small, GREY, 17)
    if left_out:
        canvas.y += 6
        canvas.text(MARGIN, canvas.y, "Not here", canvas.normal)
        canvas.y += 20
        groups: dict[str, list[str]] = {}
        for name, why in left_out.items():
            groups.setdefault(why, []).append(name)
        for why, names in groups.items():
            canvas.paragraph(f"{', '.join(names)}: {why}", canvas.small, GREY, 17)
    return canvas.finish()


def _tiles(canvas: Canvas, entries: Sequence[Entry], wide: int, side: int) -> None:
    """Pictures side by side, their captions below."""
    high, below = max(entry.panels[0].height for entry in entries), 0
    for number, entry in enumerate(entries):
        x, y = MARGIN + number * (wide + GAP), canvas.y
        canvas.paste(x + (wide - entry.panels[0].width) // 2, y, entry.panels[0])
        canvas.text(x, y + high + 5, entry.name, canvas.normal)
        canvas.text(x + wide, y + high + 7, entry.count, canvas.small, GREY, "ra")
        used = 24
        if entry.where:
            canvas.text(x, y + high + used, entry.where, canvas.small, GREY)
            used += 17
        below = max(below, used + canvas.chips(x, y + high + used, entry.keys, wide))
    canvas.y += high + below + GAP


def _row(canvas: Canvas, entry: Entry, wide: int) -> None:
    """A method's frames, its name and counts before them."""
    high, y = max(panel.height for panel in entry.panels), canvas.y
    canvas.text(MARGIN, y, entry.name, canvas.normal)
    canvas.text(MARGIN, y + 20, entry.count, canvas.small, GREY)
    canvas.text(MARGIN, y + 37, entry.where, canvas.small, GREY)
    used = 57 + canvas.chips(MARGIN, y + 57, entry.keys, LABEL - 24)
    for number, panel in enumerate(entry.panels):
        canvas.paste(MARGIN + LABEL + number * (wide + GAP), y, panel)
    canvas.y += max(high, used) + GAP
