"""Short clips of handwritten digits on real photographs: one moves, others appear in a single frame, one stays; questions with known answers.

Six frames of 128x128 pixels over one background, drawn with the digits, backgrounds and splits of `vlprune.evals.digits`; nothing is downloaded.
In most clips a patch of the picture flickers (another crop of a photograph in every frame), so that change alone does not tell what matters. The
same split, index and seed give the same pixels.

Words used in the questions: the *moving* digit goes along a row or a column of the 3x3 layout, from one end to the other; digits that *appear*
are in one frame only, each in another one, never in the first; the digit that *stays* is there from the first frame to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlprune.evals import digits

FRAMES = 6
WAYS = ("left", "right", "up", "down")
KINDS = ("moves", "way", "colour_moves", "appears_first", "appears_last", "colour_first", "colour_last", "place_first", "place_last", "stays")
#: Words of the questions and answers beyond those of `vlprune.evals.digits`.
WORDS = ("appears", "moves", "stays", "first", "last", "way", "up", "down", "that")
FLICKERS = 0.75


@dataclass(frozen=True)
class Actor:
    """One digit of a clip.

    Attributes:
        role: "moves", "appears" or "stays".
        frames: the frames that it is in.
        places: its place in the 3x3 layout where it comes and where it goes.
        boxes: for each of its frames x0, y0, x1, y1, in pixels.
    """

    role: str
    digit: int
    colour: str
    frames: tuple[int, ...]
    places: tuple[str, str]
    boxes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class DigitClip:
    """Frames and what is in them.

    Attributes:
        frames: uint8 array, FRAMES x SIZE x SIZE x 3.
        actors: the digits.
        flicker: x0, y0, x1, y1 of what flickers, or ``None``.
        way: where the moving digit goes, one of ``WAYS``.
    """

    frames: np.ndarray
    actors: tuple[Actor, ...]
    flicker: tuple[int, int, int, int] | None
    way: str
    split: str
    index: int


def clip(split: str, index: int, *, seed: int = 0) -> DigitClip:
    """Draw one clip: a digit that moves, two that appear, one that stays; no two are alike in digit or colour."""
    rng = np.random.default_rng((seed, 77, digits.SPLITS.index(split), index))
    canvas = np.repeat(digits._draw_background(rng, split)[1][None], FRAMES, axis=0)
    flicker = None
    if rng.random() < FLICKERS:
        width, height = (int(side) for side in rng.integers(30, 60, 2))
        x, y = int(rng.integers(digits.SIZE - width)), int(rng.integers(digits.SIZE - height))
        flicker = (x, y, x + width, y + height)
        for frame in range(FRAMES):
            canvas[frame, y : y + height, x : x + width] = digits._draw_background(rng, split)[1][:height, :width]
    line, end, vertical = int(rng.integers(3)), int(rng.integers(2)), bool(rng.integers(2))
    path = [(step, line) if vertical else (line, step) for step in ((2, 1, 0) if end else (0, 1, 2))]
    way = WAYS[2 * vertical + (not end)]
    free = [cell for cell in np.ndindex(3, 3) if cell not in path]
    others = [free[number] for number in rng.permutation(len(free))[:3]]
    classes, colours = rng.permutation(10)[:4], rng.permutation(len(digits.COLOUR_NAMES))[:4]
    when = sorted(int(frame) for frame in rng.permutation(np.arange(1, FRAMES))[:2])
    plan = [("moves", path[0], path[-1], tuple(range(FRAMES)))]
    plan += [("appears", cell, cell, (frame,)) for cell, frame in zip(others, when, strict=False)]
    plan.append(("stays", others[2], others[2], tuple(range(FRAMES))))
    actors = []
    for (role, start, goal, frames), digit, colour in zip(plan, classes, colours, strict=True):
        name = digits.COLOUR_NAMES[colour]
        pool = digits.digit_pool(split)[int(digit)]
        mask = digits._draw_digit(rng, pool[rng.integers(len(pool))], rng.uniform(34.0, 40.0), 0.0)
        rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
        mask = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 2)
        tint = np.clip(np.array(digits.COLOURS[name]) * rng.uniform(0.85, 1.0) + rng.normal(0, 8.0, 3), 0, 255)
        boxes = []
        for frame in frames:
            share = frame / (FRAMES - 1)
            row, column = (a + (b - a) * share for a, b in zip(start, goal, strict=True))
            boxes.append(_stamp(canvas[frame], mask, tint, row, column))
        places = tuple(digits.PLACES[3 * cell[0] + cell[1]] for cell in (start, goal))
        actors.append(Actor(role, int(digit), name, frames, places, tuple(boxes)))  # type: ignore[arg-type]
    canvas += 4.0 * rng.standard_normal((FRAMES, digits.SIZE, digits.SIZE, 1), dtype=np.float32)
    return DigitClip(np.clip(canvas, 0, 255).astype(np.uint8), tuple(actors), flicker, way, split, index)


def _stamp(picture: np.ndarray, mask: np.ndarray, tint: np.ndarray, row: float, column: float) -> tuple[int, int, int, int]:
    """Draw a digit in the middle of a (fractional) cell; its box."""
    height, width = mask.shape
    cell = digits.SIZE / 3
    y = int(np.clip((row + 0.5) * cell - height / 2, 0, digits.SIZE - height))
    x = int(np.clip((column + 0.5) * cell - width / 2, 0, digits.SIZE - width))
    window = picture[y : y + height, x : x + width]
    window *= 1.0 - 0.75 * digits._grown(mask)[..., None]
    window += mask[..., None] * (tint - window)
    return x + 2, y + 2, x + width - 2, y + height - 2


def questions(clip: DigitClip) -> list[digits.Question]:
    """One question of each kind."""
    moving, first, last, still = clip.actors
    asked = [
        ("moves", "which digit moves ?", str(moving.digit)),
        ("way", "which way is the digit that moves ?", clip.way),
        ("colour_moves", "what colour is the digit that moves ?", moving.colour),
        ("appears_first", "which digit appears first ?", str(first.digit)),
        ("appears_last", "which digit appears last ?", str(last.digit)),
        ("colour_first", "what colour is the digit that appears first ?", first.colour),
        ("colour_last", "what colour is the digit that appears last ?", last.colour),
        ("place_first", "where is the digit that appears first ?", first.places[0]),
        ("place_last", "where is the digit that appears last ?", last.places[0]),
        ("stays", "which digit stays ?", str(still.digit)),
    ]
    return [digits.Question(*entry) for entry in asked]


def heldout_questions(n: int, seed: int = 0) -> list[tuple[DigitClip, digits.Question]]:
    """``n`` held-out questions, kinds in turn, each about a clip of its own."""
    clips = (clip("heldout", number, seed=seed) for number in range(n))
    return [(found, questions(found)[number % len(KINDS)]) for number, found in enumerate(clips)]
