"""Clips of handwritten digits on real photographs, longer than `moving_digits`: one moves, one to three appear, one or two stay; questions about time.

Eight frames of 128x128 pixels over one background, drawn with the digits, backgrounds and splits of `vlprune.evals.digits`; nothing is downloaded. In
most clips a patch of the picture flickers, so that change alone does not tell what matters. The same split, index and seed give the same pixels.

Words used in the questions: the *moving* digit goes along a row or a column of the 3x3 layout, from one end to the other, in all frames; a digit that
*appears* is there for a quarter of the clip, which is the second ("early"), the third ("middle") or the fourth ("late"), no two in the same one; a
digit that *stays* is there in all frames at one place. "In all" counts every digit that is there in any frame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vlprune.evals import digits
from vlprune.evals.moving_digits import WAYS, Actor, _stamp
from vlprune.video import Clip, read_video, write_video

FRAMES, FPS = 8, 8
SPAN = 2                                                                  # frames that a digit which appears is there for
TIMES = ("early", "middle", "late")
ROLES = ("moves", "appears", "stays")
KINDS = (
    "moves", "way", "colour_moves", "starts", "ends", "stays", "does", "first", "last", "colour_appears", "place_appears", "when", "appears_when",
    "order", "count", "count_appear",
)  # fmt: skip
FLICKERS = 0.75
QUALITY = 95                                                              # of the JPEG pictures in a video file


@dataclass(frozen=True)
class MovingScene:
    """Frames and what is in them.

    Attributes:
        frames: uint8 array, FRAMES x SIZE x SIZE x 3.
        actors: the moving digit, those that appear in the order of their times, those that stay.
        cover: int8 array, FRAMES x GRID x GRID: which actor's ink covers a patch of 8 x 8 pixels, or -1.
        flicker: x0, y0, x1, y1 of what flickers, or ``None``.
        way: where the moving digit goes, one of ``WAYS``.
    """

    frames: np.ndarray
    actors: tuple[Actor, ...]
    cover: np.ndarray
    flicker: tuple[int, int, int, int] | None
    way: str
    split: str
    index: int

    @property
    def moving(self) -> Actor:
        """The digit that moves."""
        return self.actors[0]

    @property
    def appearing(self) -> tuple[Actor, ...]:
        """Those that appear, the first one first."""
        return tuple(actor for actor in self.actors if actor.role == "appears")

    @property
    def still(self) -> tuple[Actor, ...]:
        """Those that stay."""
        return tuple(actor for actor in self.actors if actor.role == "stays")


def clip(split: str, index: int, *, seed: int = 0, warp: float = 0.0) -> MovingScene:
    """Draw one clip; no two of its digits are alike in class or colour.

    Args:
        split: "train" or "heldout".
        index: number of the clip; any non-negative integer.
        seed: another seed gives another series of clips.
        warp: strength of the elastic distortion, for training (0 for none).
    """
    rng = np.random.default_rng((seed, 78, digits.SPLITS.index(split), index))
    canvas, flicker = _background(rng, split)
    line, end, vertical = int(rng.integers(3)), int(rng.integers(2)), bool(rng.integers(2))
    path = [(step, line) if vertical else (line, step) for step in ((2, 1, 0) if end else (0, 1, 2))]
    free = [cell for cell in np.ndindex(3, 3) if cell not in path]
    others = [free[number] for number in rng.permutation(len(free))]
    appear, stay = int(rng.choice((1, 2, 3), p=(0.25, 0.35, 0.4))), int(rng.integers(1, 3))
    when = sorted(int(number) for number in rng.permutation(len(TIMES))[:appear])
    always = tuple(range(FRAMES))
    plan = [("moves", path[0], path[2], always)]
    plan += [("appears", cell, cell, tuple(SPAN * (time + 1) + frame for frame in range(SPAN))) for cell, time in zip(others, when, strict=False)]
    plan += [("stays", cell, cell, always) for cell in others[appear : appear + stay]]
    classes, colours = rng.permutation(10), rng.permutation(len(digits.COLOUR_NAMES))
    ink = np.zeros((len(plan), FRAMES, digits.GRID, digits.GRID), dtype=np.float32)
    actors = []
    for (role, start, goal, frames), digit, colour, covered in zip(plan, classes, colours, ink, strict=False):
        name = digits.COLOUR_NAMES[colour]
        boxes = draw(rng, canvas, covered, split, int(digit), name, [_between(start, goal, frame) for frame in frames], frames, warp)
        places = tuple(digits.PLACES[3 * cell[0] + cell[1]] for cell in (start, goal))
        actors.append(Actor(role, int(digit), name, frames, places, boxes))  # type: ignore[arg-type]
    canvas += 4.0 * rng.standard_normal((FRAMES, digits.SIZE, digits.SIZE, 1), dtype=np.float32)
    pixels, way = np.clip(canvas, 0, 255).astype(np.uint8), WAYS[2 * vertical + (not end)]
    return MovingScene(pixels, tuple(actors), owners(ink), flicker, way, split, index)


def draw(
    rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, split: str, digit: int, colour: str, cells: list[tuple[float, float]],
    frames: tuple[int, ...], warp: float,
) -> tuple[tuple[int, int, int, int], ...]:  # fmt: skip
    """Draw one digit into some frames of a canvas, at a (fractional) cell of the layout for each, and add up its ink.

    Args:
        rng: where its looks come from.
        canvas: float32, F x SIZE x SIZE x 3, changed in place.
        ink: float32, F x GRID x GRID; the share of each patch that the digit covers is written here.
        split: whose digit images are drawn.
        digit: its class.
        colour: a name of ``digits.COLOURS``.
        cells: row and column for each of ``frames``.
        frames: those that it is drawn into.
        warp: strength of the elastic distortion.

    Returns:
        Its box in each of the frames.
    """
    pool = digits.digit_pool(split)[digit]
    mask = digits._draw_digit(rng, pool[rng.integers(len(pool))], rng.uniform(34.0, 40.0), warp)
    rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
    mask = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 2)
    tint = np.clip(np.array(digits.COLOURS[colour]) * rng.uniform(0.85, 1.0) + rng.normal(0, 8.0, 3), 0, 255)
    down, right = rng.uniform(-0.06, 0.06, 2)                                                     # not quite in the middle of its cell
    boxes = []
    for frame, (row, column) in zip(frames, cells, strict=True):
        boxes.append(_stamp(canvas[frame], mask, tint, row + down, column + right))
        ink[frame] = digits._patch_share(mask, boxes[-1][1] - 2, boxes[-1][0] - 2)
    return tuple(boxes)


def owners(ink: np.ndarray) -> np.ndarray:
    """Which of the digits covers a patch, -1 for none: from shares (A, ...) to numbers (...)."""
    return np.where(ink.max(0) >= 0.12, ink.argmax(0), -1).astype(np.int8)


def _between(start: tuple[int, int], goal: tuple[int, int], frame: int) -> tuple[float, float]:
    """Where a digit is on its way."""
    share = frame / (FRAMES - 1)
    return start[0] + (goal[0] - start[0]) * share, start[1] + (goal[1] - start[1]) * share


def _background(rng: np.random.Generator, split: str, frames: int = FRAMES) -> tuple[np.ndarray, tuple[int, int, int, int] | None]:
    """The same crop of a photograph in every frame, and in most clips a patch with another part of a second one in each."""
    canvas = np.repeat(digits._draw_background(rng, split)[1][None], frames, axis=0)
    if rng.random() >= FLICKERS:
        return canvas, None
    width, height = (int(side) for side in rng.integers(30, 60, 2))
    x, y = int(rng.integers(digits.SIZE - width)), int(rng.integers(digits.SIZE - height))
    second = digits._draw_background(rng, split)[1]
    for frame in range(frames):
        left, top = int(rng.integers(digits.SIZE - width)), int(rng.integers(digits.SIZE - height))
        canvas[frame, y : y + height, x : x + width] = second[top : top + height, left : left + width]
    return canvas, (x, y, x + width, y + height)


def questions(scene: MovingScene) -> list[digits.Question]:
    """Every question that has exactly one answer in a clip, in a fixed order."""
    moving, appearing, still = scene.moving, scene.appearing, scene.still
    asked = [
        ("moves", "which digit moves ?", str(moving.digit)),
        ("way", "which way does the moving digit go ?", scene.way),
        ("colour_moves", "what colour is the moving digit ?", moving.colour),
        ("starts", "where does the moving digit start ?", moving.places[0]),
        ("ends", "where does the moving digit end ?", moving.places[1]),
    ]
    if len(still) == 1:
        asked.append(("stays", "which digit stays ?", str(still[0].digit)))
    asked += [("does", f"what does the {actor.digit} do ?", actor.role) for actor in scene.actors]
    if len(appearing) > 1:
        for kind, actor in (("first", appearing[0]), ("last", appearing[-1])):
            asked.append((kind, f"which digit appears {kind} ?", str(actor.digit)))
            asked.append(("colour_appears", f"what colour is the digit that appears {kind} ?", actor.colour))
            asked.append(("place_appears", f"where is the digit that appears {kind} ?", actor.places[0]))
    for actor in appearing:
        asked.append(("when", f"when does the {actor.digit} appear ?", time_of(actor)))
        asked.append(("when", f"when does the {actor.colour} digit appear ?", time_of(actor)))
        asked.append(("appears_when", f"which digit appears {'in the middle' if time_of(actor) == 'middle' else time_of(actor)} ?", str(actor.digit)))
    for one, two in pairwise(appearing):
        asked.append(("order", f"which digit appears after the {one.digit} ?", str(two.digit)))
        asked.append(("order", f"which digit appears before the {two.digit} ?", str(one.digit)))
    asked.append(("count", "how many digits are there in all ?", str(len(scene.actors))))
    asked.append(("count_appear", "how many digits appear ?", str(len(appearing))))
    return [digits.Question(*entry) for entry in asked]


def time_of(actor: Actor) -> str:
    """When a digit that appears does so, a word of ``TIMES``."""
    return TIMES[actor.frames[0] // SPAN - 1]


def heldout_questions(n: int, seed: int = 0) -> list[tuple[MovingScene, digits.Question]]:
    """``n`` held-out questions, each about a clip of its own: kinds in turn, and the answers of a kind about equally often.

    Args:
        n: number of questions.
        seed: another seed gives other clips.
    """
    rng = np.random.default_rng((seed, 79))
    asked: dict[str, dict[str, int]] = {kind: defaultdict(int) for kind in KINDS}
    clips = _clips(seed)
    found: list[tuple[MovingScene, digits.Question]] = []
    while len(found) < n:
        kind = KINDS[len(found) % len(KINDS)]
        options = [(drawn, question) for drawn in (next(clips), next(clips)) for question in questions(drawn) if question.kind == kind]
        if options:
            least = min(asked[kind][question.answer] for _, question in options)
            rarest = [pair for pair in options if asked[kind][pair[1].answer] == least]
            found.append(rarest[rng.integers(len(rarest))])
            asked[kind][found[-1][1].answer] += 1
    return found


def _clips(seed: int) -> Iterator[MovingScene]:
    index = 0
    while True:
        yield clip("heldout", index, seed=seed)
        index += 1


def write(scene: MovingScene, path: str | Path, quality: int = QUALITY) -> Path:
    """Write a clip as a video file of one second (Motion JPEG in AVI)."""
    return write_video(path, list(scene.frames), fps=FPS, quality=quality)


def read(path: str | Path) -> Clip:
    """Read such a file, every frame of it, with decord."""
    return read_video(path, FRAMES)


def vocabulary() -> list[str]:
    """Every word that questions and answers use, sorted."""
    text = (
        "which digit moves ? way does the moving go what colour is where start end stays do appears first last that appear when early middle late in "
        "after before how many digits are there all left right up down"
    )
    return sorted(set(text.split()) | set(digits.PLACES) | set(digits.COLOUR_NAMES) | {str(number) for number in range(10)})
