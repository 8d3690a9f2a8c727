"""Real handwritten digits on real photographs, with questions whose answers are known.

A scene is a 128x128 picture with a few tinted digits (scikit-learn's ``load_digits``) on a crop of a photograph or
texture that is installed with scikit-image or scikit-learn. Nothing is downloaded. Every digit sits in one cell of a
3x3 layout, so that places have names, and every scene knows which patches its digits cover. The splits "train" and
"heldout" share neither a digit image nor a background picture. The same split, index and seed give the same pixels.

Words used in the questions:

* *left of / right of X*: the nearest digit in the same row of the layout; *above / below X*: in the same column.
* *the largest digit* is asked only where one digit is at least 1.25 times as large as every other one.
* "the 7" and "the red digit" are used only where exactly one digit fits.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

SIZE, PATCH = 128, 8
GRID = SIZE // PATCH
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
COLOURS = {
    "red": (228, 38, 38),
    "orange": (255, 146, 20),
    "yellow": (250, 240, 60),
    "green": (40, 200, 60),
    "blue": (50, 100, 255),
    "purple": (200, 70, 235),
    "white": (250, 250, 250),
}
COLOUR_NAMES = tuple(COLOURS)
SPLITS = ("train", "heldout")
BACKGROUNDS = {
    "train": (
        "astronaut.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "flower.jpg", "grass.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png",
        "retina.jpg", "rocket.jpg",
    ),
    "heldout": ("brick.png", "china.jpg", "coffee.png", "coins.png", "gravel.png", "text.png"),
}  # fmt: skip
KINDS = (
    "digit_at", "digit_of_colour", "colour_at", "colour_of_digit", "place_of_digit", "place_of_colour", "count",
    "count_colour", "neighbour", "largest", "sum", "exists",
)  # fmt: skip
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
LARGEST_RATIO = 1.25
_SOURCE = 40  # side of the smoothly upscaled digit images
_CELL = SIZE / 3


@dataclass(frozen=True)
class SceneObject:
    """One digit in a scene.

    Attributes:
        digit: Its class, 0 to 9.
        colour: A name of ``COLOURS``.
        place: A name of ``PLACES``; no two digits of a scene share one.
        box: Tight bounding box of the visible ink: x0, y0, x1, y1, in pixels, ends excluded.
        size: Side of the digit's frame in pixels (how large it was drawn).
        source: Index of the digit image in ``load_digits``.
    """

    digit: int
    colour: str
    place: str
    box: tuple[int, int, int, int]
    size: float
    source: int

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column in the 3x3 layout."""
        return divmod(PLACES.index(self.place), 3)


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: uint8 array, SIZE x SIZE x 3.
        objects: The digits, in the order of ``PLACES``.
        patch_object: int8 array GRID x GRID, index into ``objects`` or -1 for background.
        patch_digit: int8 array GRID x GRID, digit class or -1.
        patch_colour: int8 array GRID x GRID, index into ``COLOUR_NAMES`` or -1.
        background: File name of the background picture.
        split: "train" or "heldout".
        index: Number of the scene in its split.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    patch_object: np.ndarray
    patch_digit: np.ndarray
    patch_colour: np.ndarray
    background: str
    split: str
    index: int

    def pil(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.image)


@dataclass(frozen=True)
class Question:
    """A question about a scene; ``answer`` is one word."""

    kind: str
    text: str
    answer: str


@lru_cache(maxsize=1)
def _digit_images() -> tuple[list[Image.Image], np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = []
    for pixels in data.images:
        padded = np.pad(pixels / 16.0, 1).astype(np.float32)
        pictures.append(Image.fromarray(padded, mode="F").resize((_SOURCE, _SOURCE), Image.BICUBIC))
    return pictures, data.target


@cache
def digit_pool(split: str) -> dict[int, tuple[int, ...]]:
    """Indices into ``load_digits`` that a split draws from, by class (every fifth image of a class is held out)."""
    targets = _digit_images()[1]
    pool = {}
    for digit in range(10):
        indices = np.flatnonzero(targets == digit)
        held = np.arange(len(indices)) % 5 == 4
        pool[digit] = tuple(int(i) for i in indices[held if split == "heldout" else ~held])
    return pool


@cache
def _background(name: str) -> Image.Image:
    import skimage
    import sklearn.datasets

    folders = (
        os.path.join(os.path.dirname(skimage.__file__), "data"),
        os.path.join(os.path.dirname(sklearn.datasets.__file__), "images"),
    )
    path = next(p for p in (os.path.join(folder, name) for folder in folders) if os.path.exists(p))
    picture = Image.open(path).convert("RGB")
    scale = min(1.0, 640 / max(picture.size))
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.LANCZOS)


def _draw_background(rng: np.random.Generator, split: str) -> tuple[str, np.ndarray]:
    name = BACKGROUNDS[split][rng.integers(len(BACKGROUNDS[split]))]
    picture = _background(name)
    side = int(rng.uniform(min(110, min(picture.size)), min(picture.size) + 1))
    left = int(rng.integers(picture.width - side + 1))
    top = int(rng.integers(picture.height - side + 1))
    crop = picture.resize((SIZE, SIZE), Image.BILINEAR, (left, top, left + side, top + side), reducing_gap=1.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = np.asarray(crop, dtype=np.float32)
    # A little duller and darker than the photograph, so that the tint of a digit stays readable on top of it.
    grey = pixels.mean(axis=2, keepdims=True)
    return name, (0.45 * pixels + 0.55 * grey) * rng.uniform(0.5, 0.7)


def _draw_digit(rng: np.random.Generator, source: int, size: float, warp: float) -> np.ndarray:
    """Coverage mask (0 to 1) of one digit, rotated, sheared and drawn at ``size`` pixels."""
    side = int(np.ceil(size * 1.12))
    angle, shear = rng.normal(0.0, 0.13), rng.normal(0.0, 0.08)
    stretch = np.exp(rng.normal(0.0, 0.05))
    cos, sin = np.cos(angle), np.sin(angle)
    steps = np.linspace(-0.5, 0.5, 3) * side / size * _SOURCE
    u, v = np.meshgrid(steps, steps)
    x = (cos * u + sin * v) * stretch + shear * v + _SOURCE / 2
    y = (-sin * u + cos * v) / stretch + _SOURCE / 2
    if warp:  # moves the corners of a 2x2 mesh: bent strokes, other proportions
        x, y = x + rng.normal(0.0, warp, (3, 3)), y + rng.normal(0.0, warp, (3, 3))
    cuts = (0, side // 2, side)
    mesh = []
    for i in range(2):
        for j in range(2):
            quad = [(x[a, b], y[a, b]) for a, b in ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))]
            mesh.append(((cuts[j], cuts[i], cuts[j + 1], cuts[i + 1]), sum(quad, ())))
    drawn = _digit_images()[0][source].transform((side, side), Image.MESH, mesh, Image.BILINEAR)
    ink = np.asarray(drawn)
    threshold = 0.40 + (rng.uniform(-0.1, 0.1) if warp else 0.0)
    return np.clip((ink - threshold) * 4.0 + 0.5, 0.0, 1.0)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask grown by one pixel: the dark rim around a digit."""
    wide = mask.copy()
    np.maximum(wide[1:], mask[:-1], out=wide[1:])
    np.maximum(wide[:-1], mask[1:], out=wide[:-1])
    rim = wide.copy()
    np.maximum(rim[:, 1:], wide[:, :-1], out=rim[:, 1:])
    np.maximum(rim[:, :-1], wide[:, 1:], out=rim[:, :-1])
    return rim


def _patch_share(mask: np.ndarray, y: int, x: int) -> np.ndarray:
    """Mean of the mask in every patch, for a mask whose top-left pixel is at (y, x)."""
    top, left = y // PATCH, x // PATCH
    rows, cols = -(-(y + mask.shape[0]) // PATCH) - top, -(-(x + mask.shape[1]) // PATCH) - left
    block = np.zeros((rows * PATCH, cols * PATCH), dtype=np.float32)
    block[y - top * PATCH :, x - left * PATCH :][: mask.shape[0], : mask.shape[1]] = mask
    out = np.zeros((GRID, GRID), dtype=np.float32)
    out[top : top + rows, left : left + cols] = block.reshape(rows, PATCH, cols, PATCH).mean(axis=(1, 3))
    return out


def scene(split: str, index: int, *, seed: int = 0, digits: tuple[int, int] | None = None, warp: float = 0.0) -> Scene:
    """Draws one scene.

    Args:
        split: "train" or "heldout".
        index: Number of the scene; any non-negative integer.
        seed: Another seed gives another series of scenes.
        digits: Smallest and largest number of digits; None draws 3 to 5, now and then 2 or 6.
        warp: Strength of the elastic distortion in source pixels (augmentation for training; 0 for none).

    Returns:
        The scene; equal arguments give equal pixels.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    count = int(rng.choice(5, p=(0.1, 0.27, 0.27, 0.26, 0.1))) + 2 if digits is None else int(
        rng.integers(digits[0], digits[1] + 1)
    )  # fmt: skip
    name, canvas = _draw_background(rng, split)
    cells = np.sort(rng.permutation(9)[:count])
    palette = rng.permutation(7)[: 7 if rng.random() < 0.6 else 2]
    sizes = rng.uniform(31.0, 41.0, count)
    if rng.random() < 0.4:  # one clearly larger digit
        sizes = rng.uniform(29.0, 35.0, count)
        sizes[rng.integers(count)] = rng.uniform(44.0, 48.0)
    pool = digit_pool(split)
    ink = np.zeros((count, GRID, GRID), dtype=np.float32)
    objects = []
    for k, cell in enumerate(cells):
        digit, colour = int(rng.integers(10)), COLOUR_NAMES[palette[rng.integers(len(palette))]]
        source = pool[digit][rng.integers(len(pool[digit]))]
        mask = _draw_digit(rng, source, sizes[k], warp)
        rows, cols = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
        mask = np.pad(mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], 2)
        height, width = mask.shape
        row, col = divmod(int(cell), 3)
        free_y, free_x = max(_CELL - height, 0.0) / 2, max(_CELL - width, 0.0) / 2
        y = int(np.clip(row * _CELL + (_CELL - height) / 2 + rng.uniform(-free_y, free_y), 0, SIZE - height))
        x = int(np.clip(col * _CELL + (_CELL - width) / 2 + rng.uniform(-free_x, free_x), 0, SIZE - width))
        window = canvas[y : y + height, x : x + width]
        window *= 1.0 - 0.75 * _grown(mask)[..., None]
        tint = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.85, 1.0) + rng.normal(0, 8.0, 3), 0, 255)
        window += mask[..., None] * (tint - window)
        ink[k] = _patch_share(mask, y, x)
        box = (x + 2, y + 2, x + width - 2, y + height - 2)
        objects.append(SceneObject(digit, colour, PLACES[cell], box, float(sizes[k]), source))
    canvas += 4.0 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    patch_object = np.where(ink.max(0) >= 0.12, ink.argmax(0), -1).astype(np.int8)
    digit_of = np.array([o.digit for o in objects] + [-1], dtype=np.int8)
    colour_of = np.array([COLOUR_NAMES.index(o.colour) for o in objects] + [-1], dtype=np.int8)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(
        image, tuple(objects), patch_object, digit_of[patch_object], colour_of[patch_object], name, split, index
    )


def neighbour(objects: tuple[SceneObject, ...], of: SceneObject, relation: str) -> SceneObject | None:
    """The nearest digit in a direction of ``RELATIONS`` along the row or column of ``of``, or None."""
    down, right = RELATIONS[relation]
    by_cell = {o.cell: o for o in objects}
    row, col = of.cell
    for step in (1, 2):
        if (row + down * step, col + right * step) in by_cell:
            return by_cell[row + down * step, col + right * step]
    return None


def questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one answer in a scene, in a fixed order."""
    objects = scene.objects
    by_digit: dict[int, list[SceneObject]] = defaultdict(list)
    by_colour: dict[str, list[SceneObject]] = defaultdict(list)
    for item in objects:
        by_digit[item.digit].append(item)
        by_colour[item.colour].append(item)
    out = [Question("count", "how many digits are there ?", str(len(objects)))]
    for item in objects:
        out.append(Question("digit_at", f"which digit is at the {item.place} ?", str(item.digit)))
        out.append(Question("colour_at", f"what colour is the digit at the {item.place} ?", item.colour))
    for digit in range(10):
        found = by_digit[digit]
        out.append(Question("exists", f"is there a {digit} ?", "yes" if found else "no"))
        if len(found) == 1:
            out.append(Question("colour_of_digit", f"what colour is the {digit} ?", found[0].colour))
            out.append(Question("place_of_digit", f"where is the {digit} ?", found[0].place))
    for colour in COLOUR_NAMES:
        found = by_colour[colour]
        out.append(Question("exists", f"is there a {colour} digit ?", "yes" if found else "no"))
        if len(found) <= 3:
            out.append(Question("count_colour", f"how many {colour} digits are there ?", str(len(found))))
        if len(found) == 1:
            out.append(Question("digit_of_colour", f"which digit is {colour} ?", str(found[0].digit)))
            out.append(Question("place_of_colour", f"where is the {colour} digit ?", found[0].place))
    for item in objects:
        names = [str(item.digit)] if len(by_digit[item.digit]) == 1 else []
        names += [f"{item.colour} digit"] if len(by_colour[item.colour]) == 1 else []
        for relation in RELATIONS:
            other = neighbour(objects, item, relation)
            if other is not None:
                out += [Question("neighbour", f"which digit is {relation} the {n} ?", str(other.digit)) for n in names]
    ranked = sorted(objects, key=lambda o: -o.size)
    if ranked[0].size >= LARGEST_RATIO * ranked[1].size:
        out.append(Question("largest", "which digit is the largest ?", str(ranked[0].digit)))
    single = [items[0] for items in by_colour.values() if len(items) == 1]
    for i, one in enumerate(single):
        for two in single[i + 1 :]:
            text = f"what is the sum of the {one.colour} and the {two.colour} digit ?"
            out.append(Question("sum", text, str(one.digit + two.digit)))
    return out


def heldout_questions(n: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """Held-out questions, one a scene, balanced so that guessing pays little.

    Kinds come in turn, and within a kind the answer that was asked least so far is preferred, so that the answers of
    a kind are about equally frequent.

    Args:
        n: Number of questions.
        seed: Another seed gives other scenes.

    Returns:
        n pairs of scene and question, each with a scene of its own.
    """
    rng = np.random.default_rng((seed, 77))
    asked: dict[str, dict[str, int]] = {kind: defaultdict(int) for kind in KINDS}
    out: list[tuple[Scene, Question]] = []
    index = 0
    while len(out) < n:
        kind = KINDS[len(out) % len(KINDS)]
        counts = asked[kind]
        options: list[tuple[Scene, Question]] = []
        for _ in range(2 if counts else 1):  # two scenes to choose from: rare answers are met more often
            drawn = scene("heldout", index, seed=seed)
            index += 1
            options += [(drawn, q) for q in questions(drawn) if q.kind == kind]
        if not options:
            continue
        least = min(counts[q.answer] for _, q in options)
        rarest = [pair for pair in options if counts[pair[1].answer] == least]
        chosen = rarest[rng.integers(len(rarest))]
        counts[chosen[1].answer] += 1
        out.append(chosen)
    return out


def vocabulary() -> list[str]:
    """Every word that questions and answers use, sorted."""
    text = (
        "how many digits are there ? which digit is at the what colour is where is a of and the sum largest left "
        "right above below yes no"
    )
    numbers = {str(k) for k in range(19)}
    return sorted(set(text.split()) | set(PLACES) | set(COLOUR_NAMES) | numbers)
