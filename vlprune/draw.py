"""Pictures of what stayed: kept patches clear and outlined, dropped patches dim.

With one pruning point the colours are the method's roles (HiPrune's anchors, buffers and registers); with several they
tell at which point a token left. The records come from ``handle.report().points`` or ``handle.trace.points``.

Where tokens lie on the picture: a grid of R x C tokens is stretched over the whole picture, whatever its shape (Qwen's
grids are rectangular, LLaVA-1.5's are square). A model that looks at the middle square only (LLaVA-1.5 and CLIP crop)
wants ``crop="center"``. Tiled models (LLaVA-NeXT, LLaVA-OneVision) see a picture twice, small as a whole and large in
tiles: both are drawn, side by side, each over the whole picture; newline tokens have no place and are counted in the
legend only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlprune.errors import OptionError, VlpruneError
from vlprune.trace import PointRecord

if TYPE_CHECKING:
    from PIL.Image import Image

    Array = np.ndarray[Any, Any]

#: Colours of the roles, in their order; further roles start again.
ROLE_COLOURS = ("#ff5a36", "#ffc21f", "#2fb8ff", "#8de02c", "#d67bff")
#: Colours of the points at which a token left.
STAGE_COLOURS = ("#7a6cff", "#16b3c4", "#35c46a", "#9a6b3f")
#: Tokens that stay to the end, where there are no roles.
STAYED = "#ffb300"
DROPPED = "#3a414b"
TINT, VEIL, DIM = 0.08, 0.34, 0.42
INK, PAPER = (32, 36, 42), (255, 255, 255)


@dataclass(frozen=True)
class _Panel:
    """One picture of the sheet: which frame of which visual item."""

    image: Image
    item: int
    frame: int
    caption: str = ""
    plain: bool = False


@dataclass(frozen=True)
class Key:
    """What a colour means, and how many tokens have it."""

    label: str
    colour: str
    count: int


def draw_kept(
    image: Any,
    record: Any,
    item: int | Sequence[int] = 0,
    *,
    by: str = "auto",
    size: int | None = None,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    legend: bool = True,
    original: bool = False,
    crop: str = "none",
    save: str | Path | None = None,
) -> Image:
    """Draw which visual tokens stayed.

    Args:
        image: a picture (PIL image, uint8 array, or path), or the frames of a video.
        record: a `PointRecord`, several, or anything with ``.points`` (a report or a trace).
        item: number of the visual item in the record; for several pictures that are items of their own (one prompt with
            several images, or a batch) a number for each.
        by: ``"role"``, ``"stage"``, or ``"auto"``: stage where there are several points, else role.
        size: longer side of each picture in pixels; by default 512, less for contact sheets.
        columns: of a contact sheet.
        captions: a line under each frame, such as its time.
        title: a line above; ``None`` writes method, point and counts, ``""`` nothing.
        legend: whether to say below what the colours mean.
        original: put the untouched picture before each drawn one.
        crop: ``"center"`` if the model saw the middle square only.
        save: also write the picture to this file.

    Returns:
        The picture. With ``legend=False``, ``title=""``, no captions and one panel it has no margins.
    """
    if by not in ("auto", "role", "stage"):
        raise OptionError(f"by={by!r}: 'auto', 'role' or 'stage'")
    if crop not in ("none", "center"):
        raise OptionError(f"crop={crop!r}: 'none' or 'center'")
    records, by = _shown(_records(record), by)
    items = [item] if isinstance(item, int) else list(item)
    for number in items:
        if not 0 <= number < len(records[-1].items):
            raise OptionError(f"item={number}: the record has visual items 0 to {len(records[-1].items) - 1}")
    pictures = [_square(picture) if crop == "center" else picture for picture in _pictures(image)]
    panels = _panels(pictures, records[-1], items, captions)
    if original:
        panels = [part for panel in panels for part in (_Panel(panel.image, panel.item, panel.frame, plain=True), panel)]
        columns = 2 * columns if columns else None
    keys = _keys(records, items, by)
    side = size or (512 if len(panels) <= 2 else 320 if len(panels) <= 6 else 232)
    drawn = [_paint(panel, records, keys, side) for panel in panels]
    text = _title(records, items) if title is None else title
    notes = _notes(records, items)
    sheet = _sheet(drawn, [panel.caption for panel in panels], columns, text, keys if legend else [], notes if legend else "")
    if save is not None:
        target = Path(save)
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target)
    return sheet


def paint_kept(pictures: Sequence[Image], record: Any, item: int | Sequence[int] = 0, *, size: int = 208) -> tuple[list[Image], list[Key]]:
    """The drawn pictures alone, for sheets of one's own, and what their colours mean: roles or points, last the tokens that left first."""
    records, by = _shown(_records(record), "auto")
    items = [item] if isinstance(item, int) else list(item)
    keys = _keys(records, items, by)
    return [_paint(panel, records, keys, size) for panel in _panels(list(pictures), records[-1], items, None)], keys


def side_by_side(pictures: Sequence[Image], gap: int = 24) -> Image:
    """Put finished pictures next to each other, tops aligned."""
    image_module = _pillow()[0]
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = image_module.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise VlpruneError("drawing needs Pillow, which is not installed: pip install 'vlprune[draw]'") from error
    return Image, ImageDraw, ImageFont


def _records(record: Any) -> list[PointRecord]:
    found = getattr(record, "points", record)
    records = [one for one in ([found] if isinstance(found, PointRecord) else list(found or [])) if one.tokens == "visual"]
    if not records:
        raise OptionError("there is no pruning point to draw: run the model on a picture first, with a method that prunes (not 'dense', not keep=1.0)")
    return records


def _shown(records: list[PointRecord], by: str) -> tuple[list[PointRecord], str]:
    """The records that are drawn, and whether their roles or the points are coloured."""
    by_role = by == "role" or (by == "auto" and len(records) == 1)
    return (records[-1:], "role") if by_role else (records, "stage" if by == "auto" else by)


def _pictures(image: Any) -> list[Image]:
    image_module = _pillow()[0]
    many = isinstance(image, (list, tuple)) or (isinstance(image, np.ndarray) and image.ndim == 4)
    found = []
    for picture in image if many else [image]:
        if isinstance(picture, (str, Path)):
            picture = image_module.open(picture)
        elif not isinstance(picture, image_module.Image):
            picture = image_module.fromarray(np.asarray(picture))
        found.append(picture.convert("RGB"))
    return found


def _square(picture: Image) -> Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _grid(record: PointRecord, item: int) -> Array:
    grid = record.items[item].grid
    if grid is None:
        count = record.items[item].num_tokens
        raise OptionError(f"item {item} of {record.point} has no grid: this model does not say where on the picture its {count} tokens lie")
    return grid.numpy()


def _panels(pictures: list[Image], record: PointRecord, items: list[int], captions: Sequence[str] | None) -> list[_Panel]:
    """Which frame of which item belongs on which picture."""
    texts = list(captions or [])
    if captions is not None and len(texts) != len(pictures):
        raise OptionError(f"{len(texts)} captions for {len(pictures)} pictures")
    texts = texts or [""] * len(pictures)
    if len(items) > 1:
        if len(items) != len(pictures):
            raise OptionError(f"{len(items)} items, but {len(pictures)} pictures; give one picture for each item")
        return [panel for picture, text, item in zip(pictures, texts, items, strict=True) for panel in _views(picture, text, record, item)]
    item = items[0]
    frames = int(_grid(record, item)[:, 0].max()) + 1
    if record.items[item].modality == "image":
        if len(pictures) != 1:
            raise OptionError(f"item {item} is one image, but {len(pictures)} pictures were given; name an item for each: item=[0, 1, ...]")
        return _views(pictures[0], texts[0], record, item)
    step, rest = divmod(len(pictures), frames)                       # models may fuse neighbouring frames (Qwen: two)
    if rest or not step:
        raise OptionError(
            f"item {item} has tokens for {frames} frames, but {len(pictures)} pictures were given; give {frames}, or a multiple if the model fuses frames"
        )
    return [_Panel(pictures[frame * step], item, frame, texts[frame * step]) for frame in range(frames)]


def _views(picture: Image, text: str, record: PointRecord, item: int) -> list[_Panel]:
    """One panel for a plain picture, two for a tiled one."""
    if int(_grid(record, item)[:, 0].max()) == 0:
        return [_Panel(picture, item, 0, text)]
    names = ("whole picture", "tiles")
    return [_Panel(picture, item, frame, f"{text}  {name}".strip()) for frame, name in enumerate(names)]


def _classes(record: PointRecord, item: int, by: str) -> Array:
    """(N,) class of each token at one record: -1 dropped, else role (or 0)."""
    classes = np.full(record.items[item].num_tokens, -1)
    kept, roles = record.kept[item].cpu().numpy(), record.roles[item]
    classes[kept] = 0 if roles is None or by == "stage" else roles.cpu().numpy()
    return classes


def _keys(records: list[PointRecord], items: list[int], by: str) -> list[Key]:
    """Legend entries by class; the last entry is class -1."""
    total = sum(records[0].items[item].num_tokens for item in items)
    if by == "role":
        record = records[0]
        classes = np.concatenate([_classes(record, item, by) for item in items])
        counts = np.bincount(classes + 1, minlength=len(record.role_names) + 1)
        names = record.role_names
        colours = ROLE_COLOURS if len(names) > 1 else (STAYED,)
        found = [Key(name, colours[number % len(colours)], int(counts[number + 1])) for number, name in enumerate(names)]
        return [*found, Key("dropped", DROPPED, int(counts[0]))]
    kept = [sum(int(record.kept[item].numel()) for item in items) for record in records]
    found = [
        Key(f"dropped at {later.point}", STAGE_COLOURS[number % len(STAGE_COLOURS)], before - after)
        for number, (later, before, after) in enumerate(zip(records[1:], kept, kept[1:], strict=False))
    ]
    return [*found, Key("stays", STAYED, kept[-1]), Key(f"dropped at {records[0].point}", DROPPED, total - kept[0])]


def _notes(records: list[PointRecord], items: list[int]) -> str:
    """Tokens without a place."""
    total = stayed = 0
    for item in items:
        loose = _grid(records[-1], item)[:, 1] < 0
        total += int(loose.sum())
        stayed += int(loose[records[-1].kept[item].cpu().numpy()].sum())
    return f"counts include newline tokens, which have no place: {stayed} of {total} stay" if total else ""


def _title(records: list[PointRecord], items: list[int]) -> str:
    counts = [sum(int(record.kept[item].numel()) for item in items) for record in records]
    before = sum(records[0].items[item].num_tokens for item in items)
    places = " -> ".join(str(count) for count in [before, *counts])
    return f"{records[0].method} at {', '.join(record.point for record in records)}:  {places} visual tokens"


def _class_map(records: list[PointRecord], item: int, frame: int, height: int, width: int) -> tuple[Array, Array]:
    """(H, W) class of each pixel, and (H, W) number of the cell it lies in."""
    by = "role" if len(records) == 1 else "stage"
    level = np.zeros((height, width), dtype=np.int64)
    alive = np.ones((height, width), dtype=bool)
    cells = level
    for record in records:
        grid, classes = _grid(record, item), _classes(record, item, by)
        inside = (grid[:, 0] == frame) & (grid[:, 1] >= 0)
        rows, columns = (int(grid[inside, axis].max()) + 1 for axis in (1, 2))
        table = np.full((rows, columns), -1)
        table[grid[inside, 1], grid[inside, 2]] = classes[inside]
        row_of, column_of = np.arange(height) * rows // height, np.arange(width) * columns // width
        spread = table[row_of][:, column_of]
        cells = row_of[:, None] * columns + column_of[None, :]
        if by == "role":
            return spread, cells
        alive &= spread >= 0
        level += alive
    return level - 1, cells


def _paint(panel: _Panel, records: list[PointRecord], keys: list[Key], side: int) -> Image:
    """The picture with kept patches clear, tinted and outlined, and the others dim."""
    image_module = _pillow()[0]
    scale = side / max(panel.image.size)
    width, height = (max(1, round(length * scale)) for length in panel.image.size)
    resized = panel.image.resize((width, height), image_module.Resampling.LANCZOS if scale < 1 else image_module.Resampling.BICUBIC)
    if panel.plain:
        return resized
    pixels = np.asarray(resized).astype(np.float32)
    classes, cells = _class_map(records, panel.item, panel.frame, height, width)
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    out = DIM * grey[..., None] + (1 - DIM) * 0.4 * np.array(_rgb(DROPPED), dtype=np.float32)
    thick = max(1, round(side / 180))
    for number, key in enumerate(keys[:-1]):
        inside = classes == number
        if not inside.any():
            continue
        colour = np.array(_rgb(key.colour), dtype=np.float32)
        leaves = len(records) > 1 and number < len(keys) - 2                 # did not make it to the end: half dim
        clear, tint = (0.38 * pixels + 0.62 * out, VEIL) if leaves else (pixels, TINT)
        out[inside] = ((1 - tint) * clear + tint * colour)[inside]
        if not leaves:
            seams = inside & _edges(cells, 1)
            out[seams] = 0.75 * out[seams] + 0.25 * colour
        rim = inside & _edges(classes, thick)
        out[rim] = 0.12 * out[rim] + 0.88 * colour
    return image_module.fromarray(np.clip(out + 0.5, 0, 255).astype(np.uint8))


def _edges(labels: Array, thick: int) -> Array:
    """(H, W) bool: pixels within ``thick`` of another label or of the border of the picture."""
    padded = np.pad(labels, thick, constant_values=-9)
    height, width = labels.shape
    edge = np.zeros(labels.shape, dtype=bool)
    for step in range(1, thick + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            edge |= padded[thick + down : thick + down + height, thick + right : thick + right + width] != labels
    return edge


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _sheet(panels: list[Image], captions: list[str], columns: int | None, title: str, keys: list[Key], notes: str) -> Image:
    """Panels in rows, captions under them, title above, legend below."""
    image_module, draw_module, font_module = _pillow()
    plain = not (title or keys or any(captions))
    if plain and len(panels) == 1:
        return panels[0]
    columns = columns or (len(panels) if len(panels) <= 3 else math.ceil(len(panels) / math.ceil(len(panels) / 4)))
    columns = min(columns, len(panels))
    wide, high = max(panel.width for panel in panels), max(panel.height for panel in panels)
    small = max(12, min(15, wide // 18))
    font, head = font_module.load_default(small), font_module.load_default(small + 2)
    margin, gap = 14, 10
    caption_height = small + 8 if any(captions) else 0
    rows = math.ceil(len(panels) / columns)
    inner = columns * wide + (columns - 1) * gap
    entries = _legend_lines([*keys[-1:], *keys[:-1]] if len(keys) and keys[-1].label != "dropped" else keys, font, inner)
    title_lines = _wrapped(title, head, inner)
    top = margin + (len(title_lines) * (small + 8) + 4 if title_lines else 0)
    body = rows * (high + caption_height) + (rows - 1) * gap
    below = len(entries) * (small + 10) + (6 if entries else 0) + (small + 8 if notes else 0)
    sheet = image_module.new("RGB", (inner + 2 * margin, top + body + below + margin), PAPER)
    pen = draw_module.Draw(sheet)
    for number, line in enumerate(title_lines):
        pen.text((margin, margin - 2 + number * (small + 8)), line, font=head, fill=INK)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        row, column = divmod(number, columns)
        left, upper = margin + column * (wide + gap), top + row * (high + caption_height + gap)
        sheet.paste(panel, (left + (wide - panel.width) // 2, upper))
        if caption:
            pen.text((left + wide / 2, upper + high + 3), caption, font=font, fill=INK, anchor="ma")
    y = top + body + 8
    for entry in entries:
        x = margin
        for key, length in entry:
            box = small
            pen.rounded_rectangle((x, y + 1, x + box, y + 1 + box), 3, fill=_rgb(key.colour))
            pen.text((x + box + 6, y), f"{key.label}  {key.count}", font=font, fill=INK)
            x += length
        y += small + 10
    if notes:
        pen.text((margin, y), notes, font=font, fill=(110, 116, 124))
    return sheet


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break a line at spaces so that it fits."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if text else []


def _legend_lines(keys: list[Key], font: Any, width: int) -> list[list[tuple[Key, int]]]:
    """Legend entries with their widths, broken into lines."""
    lines: list[list[tuple[Key, int]]] = []
    used = 0
    for key in keys:
        length = int(font.getlength(f"{key.label}  {key.count}")) + 40
        if not lines or used + length > width + 18:
            lines.append([])
            used = 0
        lines[-1].append((key, length))
        used += length
    return lines
