"""Moving digit scenes: the same pixels for the same arguments, answers that follow from what is drawn, and real files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from vlprune.evals import digits
from vlprune.evals import moving_scenes as S


@pytest.fixture(scope="module")
def clips() -> list[S.MovingScene]:
    return [S.clip(split, index) for split in digits.SPLITS for index in range(12)]


def inked(clip: S.MovingScene, actor: S.Actor, frame: int) -> float:
    """Share of the actor's box in a frame that has about its colour; the box of its nearest own frame where it is not there."""
    nearest = min(range(len(actor.frames)), key=lambda number: abs(actor.frames[number] - frame))
    left, top, right, bottom = actor.boxes[nearest]
    window = clip.frames[frame, top:bottom, left:right].astype(float)
    return float((np.abs(window - np.array(digits.COLOURS[actor.colour])).max(axis=2) < 80).mean())


def test_same_arguments_same_pixels() -> None:
    one, two = S.clip("heldout", 3, seed=1), S.clip("heldout", 3, seed=1)
    assert np.array_equal(one.frames, two.frames)
    assert np.array_equal(one.cover, two.cover)
    assert one.actors == two.actors
    assert not np.array_equal(one.frames, S.clip("heldout", 3, seed=2).frames)
    assert not np.array_equal(one.frames, S.clip("train", 3, seed=1).frames)


def test_splits_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a digit image nor a background, seen where they are drawn."""
    used: dict[str, set[object]] = {}
    split = ""
    background, digit = digits._background, digits._draw_digit
    monkeypatch.setattr(digits, "_background", lambda name: used[split].add(name) or background(name))
    monkeypatch.setattr(digits, "_draw_digit", lambda rng, source, *rest: used[split].add(source) or digit(rng, source, *rest))
    for split in digits.SPLITS:
        used[split] = set()
        for index in range(40):
            S.clip(split, index)
    train, heldout = (used[name] for name in digits.SPLITS)
    assert len(train) > 100
    assert len(heldout) > 50
    assert not train & heldout


@dataclass
class Seen:
    """What frames and boxes alone say about a clip, by digit: in which frames its ink is found, where its box is, and what follows from that."""

    clip: S.MovingScene

    def __post_init__(self) -> None:
        actors = self.clip.actors
        self.colour = {actor.digit: actor.colour for actor in actors}
        self.when = {actor.digit: [frame for frame in range(S.FRAMES) if inked(self.clip, actor, frame) > 0.1] for actor in actors}
        self.path = {actor.digit: np.array([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in actor.boxes]) for actor in actors}
        self.far = {digit: float(np.ptp(middle, axis=0).max()) for digit, middle in self.path.items()}
        self.moving = max(self.far, key=lambda digit: self.far[digit])
        self.come = sorted((digit for digit in self.when if self.when[digit][0] > 0), key=lambda digit: self.when[digit][0])
        self.rest = [digit for digit in self.when if digit != self.moving and digit not in self.come]

    def place(self, digit: int, end: int = 0) -> str:
        """The cell of the layout."""
        x, y = self.path[digit][end] // (digits.SIZE / 3)
        return digits.PLACES[3 * int(y) + int(x)]

    def time(self, digit: int) -> str:
        """A word of ``TIMES``."""
        return S.TIMES[self.when[digit][0] // 2 - 1]

    def way(self) -> str:
        """Where the moving digit goes."""
        right, down = self.path[self.moving][-1] - self.path[self.moving][0]
        return ("right" if right > 0 else "left") if abs(right) > abs(down) else "down" if down > 0 else "up"

    def answer(self, kind: str, text: str) -> Any:
        """To a question."""
        words, come, moving = text.split(), self.come, self.moving
        named = [digit for digit in self.when if str(digit) in words] or [digit for digit in self.when if self.colour[digit] in words]
        chosen = come[-1 if "last" in words else 0] if come else None
        found: dict[str, Callable[[], Any]] = {
            "moves": lambda: moving,
            "way": self.way,
            "colour_moves": lambda: self.colour[moving],
            "starts": lambda: self.place(moving),
            "ends": lambda: self.place(moving, -1),
            "stays": lambda: self.rest[0] if len(self.rest) == 1 else None,
            "does": lambda: "moves" if named == [moving] else "appears" if named[0] in come else "stays",
            "first": lambda: come[0],
            "last": lambda: come[-1],
            "colour_appears": lambda: self.colour[chosen],
            "place_appears": lambda: self.place(chosen),
            "when": lambda: self.time(named[0]),
            "appears_when": lambda: next(digit for digit in come if self.time(digit) in words),
            "order": lambda: come[come.index(named[0]) + (1 if "after" in words else -1)],
            "count": lambda: len(self.when),
            "count_appear": lambda: len(come),
        }
        return found[kind]()


def test_answers_follow_from_the_pictures(clips: list[S.MovingScene]) -> None:
    """What is asked is worked out again from frames and boxes alone."""
    asked = set()
    for clip in clips:
        seen = Seen(clip)
        assert len(set(seen.colour)) == len(set(seen.colour.values())) == len(clip.actors)
        assert seen.far[seen.moving] > 60
        assert sorted(seen.far.values())[-2] == 0
        for question in S.questions(clip):
            asked.add(question.kind)
            assert question.answer == str(seen.answer(question.kind, question.text)), question
    assert asked == set(S.KINDS)


def test_cover_is_where_the_ink_is(clips: list[S.MovingScene]) -> None:
    for clip in clips:
        for number, actor in enumerate(clip.actors):
            for frame in range(S.FRAMES):
                rows, columns = np.nonzero(clip.cover[frame] == number)
                assert bool(len(rows)) == (frame in actor.frames)
                if len(rows):
                    left, top, right, bottom = actor.boxes[actor.frames.index(frame)]
                    assert top // 8 - 1 <= rows.min() <= rows.max() <= bottom // 8 + 1
                    assert left // 8 - 1 <= columns.min() <= columns.max() <= right // 8 + 1


def test_every_word_is_in_the_vocabulary(clips: list[S.MovingScene]) -> None:
    used = {word for clip in clips for question in S.questions(clip) for word in [*question.text.split(), question.answer]}
    assert used <= set(S.vocabulary())


def test_no_answer_is_asked_for_much_more_than_others() -> None:
    """So that guessing the most frequent answer pays little: 25 questions of a kind."""
    pairs = S.heldout_questions(25 * len(S.KINDS))
    assert [question.kind for _, question in pairs[: len(S.KINDS)]] == list(S.KINDS)
    guessed = 0
    for kind in S.KINDS:
        guessed += Counter(question.answer for _, question in pairs if question.kind == kind).most_common(1)[0][1]
    assert guessed / len(pairs) < 0.26
    again = S.heldout_questions(5)
    assert [(a.index, b) for a, b in pairs[:5]] == [(a.index, b) for a, b in again]


def test_a_clip_is_a_real_file(tmp_path: Path) -> None:
    """Written and read back: the same frames up to the JPEG coding, at their times."""
    pytest.importorskip("decord")
    scene = S.clip("heldout", 5)
    found = S.read(S.write(scene, tmp_path / "clip.avi"))
    assert len(found.frames) == S.FRAMES
    assert found.times == pytest.approx([number / S.FPS for number in range(S.FRAMES)])
    difference = np.stack([np.asarray(frame) for frame in found.frames]).astype(int) - scene.frames
    assert np.abs(difference).mean() < 3
