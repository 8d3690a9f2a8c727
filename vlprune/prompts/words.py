"""Words of a prompt with their places, so that what is left out can be shown and put back.

Two ways to cut: ``"space"``, at white space; ``"punctuation"``, where marks at the edge of such a word are words of their own, since a compressor may want to
keep the colon of a step and drop what stands in front of it. Marks inside a word never part it (``3.14``, ``don't``), nor do brackets that it opens and
closes (``f(x)``, ``\\frac{1}{2}``), and signs of a number stay on it (``$40``, ``-3``, ``12%``, ``5!``). Chinese and Japanese
characters are words of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vlprune.errors import OptionError

WAYS = ("space", "punctuation")
EDGE = ",.;:!?\"'()[]{}«»“”\u2018\u2019…"
_OPENS = {")": "(", "]": "[", "}": "{"}
_CJK = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"                         # ideographs, kana and their punctuation: written without spaces
_SPACE_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


class Word(NamedTuple):
    """``text[start:end]`` of the prompt."""

    text: str
    start: int
    end: int

    @property
    def has_digit(self) -> bool:
        """Whether there is a number in it."""
        return any(character.isdigit() for character in self.text)


class TokenScores(NamedTuple):
    """What a classifier or an attribution says of a text: one number for each of its sub-words.

    Attributes:
        offsets: (start, end) of each in the text; an empty span (a special token) is passed over.
        scores: as many numbers.
    """

    offsets: Sequence[tuple[int, int]]
    scores: Sequence[float]


def split_words(text: str, way: str = "space", holes: Sequence[tuple[int, int]] = ()) -> list[Word]:
    """Words of ``text`` in order, none of them inside or across the spans ``holes``."""
    if way not in WAYS:
        raise OptionError(f"words={way!r}: {' or '.join(map(repr, WAYS))}")
    return [word for start, end in between(len(text), holes) for word in _cut(text, start, end, way)]


def between(length: int, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The spans of a text that are outside ``holes`` (sorted, apart), empty ones included: one more than there are holes."""
    at = 0
    for start, end in holes:
        yield at, start
        at = end
    yield at, length


def _cut(text: str, start: int, end: int, way: str) -> Iterator[Word]:
    for match in _SPACE_WORD.finditer(text, start, end):
        low, high = match.span()
        first, last = low, high
        if way == "punctuation":
            while first < last and text[first] in EDGE and not _opens_number(text, first, last):
                first += 1
            while last > first and _peels(text[first:last]):
                last -= 1
        yield from (Word(text[place], place, place + 1) for place in range(low, first))
        if first < last:
            yield Word(text[first:last], first, last)
        yield from (Word(text[place], place, place + 1) for place in range(last, high))


def _opens_number(text: str, place: int, last: int) -> bool:
    """The point of ``.5`` belongs to the number."""
    return text[place] in ".," and place + 1 < last and text[place + 1].isdigit()


def _peels(word: str) -> bool:
    """Whether the last character is a mark of its own."""
    mark = word[-1]
    if mark in _OPENS:
        return word.count(_OPENS[mark]) < word.count(mark)
    return mark in EDGE and not (mark == "!" and word[-2:-1].isdigit())


def join_kept(text: str, words: Sequence[Word], kept: Sequence[bool], *, newlines: bool = False) -> str:
    """Kept words in order, one space where there was white space between them.

    With ``newlines`` a line break stays one. Words that touched each other go on touching where nothing between them left.
    """
    out: list[str] = []
    last: Word | None = None
    for word, stays in zip(words, kept, strict=True):
        if not stays:
            continue
        if last is not None:
            gap = text[last.end : word.start]
            if newlines and "\n" in gap:
                out.append("\n")
            elif any(map(str.isspace, gap)):
                out.append(" ")
        out.append(word.text)
        last = word
    return "".join(out)


def gather_scores(words: Sequence[Word], tokens: TokenScores, shift: int = 0) -> list[list[float]]:
    """Scores of the sub-words of each word; a sub-word belongs to the word in which its first character that is no space stands, or the first it overlaps.

    Args:
        words: in order.
        tokens: offsets relative to ``shift``, in order.
        shift: where the scored text begins in the prompt.
    """
    if len(tokens.offsets) != len(tokens.scores):
        raise OptionError(f"{len(tokens.offsets)} offsets came with {len(tokens.scores)} scores; one score for each sub-word is wanted")
    parts: list[list[float]] = [[] for _ in words]
    at = 0
    for (start, end), score in sorted(zip(tokens.offsets, tokens.scores, strict=True), key=lambda pair: pair[0]):
        low, high = start + shift, end + shift
        if high <= low:
            continue
        while at < len(words) and words[at].end <= low:
            at += 1
        if at < len(words) and words[at].start < high:
            parts[at].append(float(score))
    return parts


def chunks(counts: Sequence[int], ends: Iterable[bool], limit: int) -> list[tuple[int, int]]:
    """Cut words into runs of at most ``limit`` tokens, each after the last word that ends a sentence, where there is one.

    Args:
        counts: tokens of each word.
        ends: whether a word ends in a full stop or is followed by a line break.
        limit: a single word with more tokens makes a run of its own.

    Returns:
        (first, one past the last) word of each run, in order.
    """
    closes, runs, first = list(ends), [], 0
    while first < len(counts):
        last, total = first, 0
        while last < len(counts) and (last == first or total + counts[last] <= limit):
            total += counts[last]
            last += 1
        if last < len(counts):
            last = next((place + 1 for place in range(last - 1, first - 1, -1) if closes[place]), last)
        runs.append((first, last))
        first = last
    return runs


def ends_sentence(text: str, words: Sequence[Word]) -> list[bool]:
    """Which words end in a full stop or stand in front of a line break."""
    starts = [word.start for word in words[1:]] + [len(text)]
    return [word.text.endswith(".") or "\n" in text[word.end : start] for word, start in zip(words, starts, strict=True)]
