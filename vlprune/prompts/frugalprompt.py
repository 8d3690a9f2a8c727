"""FrugalPrompt: an attribution says how much each word matters to an encoder; the words that matter most stay.

Reference: FrugalPrompt, arXiv:2510.16439. Official code: https://github.com/Starscream-11813/Frugal-ICL

Convention: the paper's ``p`` in percent is ``100 * keep``. The text is cut into sentences, each is scored by itself, the score of a word is the *sum* over its
sub-words, and the best ``round(words * p / 100)`` words of the whole text stay, in order, with a space between them. ``select`` has the paper's baselines too.

Differences:
- The sentence splitter is a rule (a full stop, question or exclamation mark, white space, then anything but a small letter; or an empty line), since the
  released one needs data to be downloaded; give ``sentences=nltk.sent_tokenize`` to have that.
- `vlprune.prompts.compress` has numbers stay, which the paper does not and which costs it dearly on arithmetic: ``protect_numbers=False`` is the paper's.
- At least one word stays.
- The paper does not say whether words compete within their sentence or with all; they compete with all (``per="sentence"`` for the other reading).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from vlprune.errors import NotFiniteError, OptionError
from vlprune.prompts.llmlingua2 import by_place
from vlprune.prompts.transform import TextScorer, checked_keep
from vlprune.prompts.words import Word, gather_scores, join_kept, split_words

NAME = "frugalprompt"
SELECTS = ("top", "bottom", "random")
PERS = ("text", "sentence")
_BREAK = re.compile("(?<=[.!?\u2026])[\"'\u201d\u2019)\\]]*\\s+(?=[^a-z\\s])|(?<=[\u3002\uff01\uff1f])|\\n\\s*\\n")


@dataclass(frozen=True)
class FrugalPrompt:
    """A `vlprune.prompts.PromptTransform`.

    Attributes:
        attribution: gives a sentence's sub-words (`TokenScores`) or white-space words (numbers alone) their importance; `vlprune.prompts.GlobEnc` is one.
        select: ``"top"``, or the baselines ``"bottom"`` and ``"random"``.
        sentences: cuts a text into sentences; ``None``: by rule.
        per: ``"text"`` or ``"sentence"``: among which words each competes.
        seed: of ``"random"``.
    """

    attribution: TextScorer | None = None
    select: str = "top"
    sentences: Callable[[str], Sequence[str]] | None = None
    per: str = "text"
    seed: int = 0
    name: str = NAME
    way: str = "space"

    def __post_init__(self) -> None:
        if self.select not in SELECTS:
            raise OptionError(f"select={self.select!r}: {', '.join(map(repr, SELECTS))}")
        if self.per not in PERS:
            raise OptionError(f"per={self.per!r}: {' or '.join(map(repr, PERS))}")
        if self.select != "random" and not callable(self.attribution):
            raise OptionError(f"attribution={self.attribution!r}: a callable text -> TokenScores, as vlprune.prompts.GlobEnc(model, tokenizer) is")

    def __call__(self, text: str, keep: float) -> str:
        """The text alone, nothing protected; `vlprune.prompts.compress` protects placeholders and numbers."""
        words = split_words(text, self.way)
        if checked_keep(keep) == 1 or not words:
            return text
        return self.join(text, words, self.choose(text, words, [False] * len(words), keep)[0])

    def join(self, text: str, words: Sequence[Word], kept: Sequence[bool]) -> str:
        """The kept words with a space between them."""
        return join_kept(text, words, kept)

    def choose(self, text: str, words: Sequence[Word], forced: Sequence[bool], keep: float) -> tuple[list[bool], list[float]]:
        """Which words stay, and their importance."""
        groups = self._groups(text, words)
        scores = [score for start, end, first, last in groups for score in self._scores(text[start:end], start, words[first:last])]
        if self.per == "text":
            return best(scores, forced, keep), scores
        return [stays for *_, first, last in groups for stays in best(scores[first:last], forced[first:last], keep)], scores

    def _groups(self, text: str, words: Sequence[Word]) -> list[tuple[int, int, int, int]]:
        """Each sentence that has words: its span, and (first, one past the last) of its words."""
        spans = split_sentences(text) if self.sentences is None else placed(text, self.sentences(text))
        groups: list[tuple[int, int, int, int]] = []
        first = 0
        for place, (start, end) in enumerate(spans):
            last = len(words) if place == len(spans) - 1 else next((n for n in range(first, len(words)) if words[n].start >= spans[place + 1][0]), len(words))
            if last > first:
                groups.append((min(start, words[first].start), max(end, words[last - 1].end), first, last))
            first = last
        return groups

    def _scores(self, sentence: str, start: int, words: Sequence[Word]) -> list[float]:
        if self.select == "random":
            draw = random.Random(f"{self.seed} {start} {sentence}")                      # so that a text gets the same words wherever it stands in a batch
            return [draw.random() for _ in words]
        assert self.attribution is not None
        sums = [sum(parts) for parts in gather_scores(words, by_place(self.attribution(sentence), sentence), start)]
        if not all(map(isfinite, sums)):
            raise NotFiniteError(f"the attribution gave numbers that are not finite for {sentence!r}")
        return sums if self.select == "top" else [-value for value in sums]


def best(scores: Sequence[float], forced: Sequence[bool], keep: float) -> list[bool]:
    """The ``round(n * p / 100)`` words with the highest scores; at least one; forced ones come first and all stay; of equals the earlier."""
    number = max(1, round(len(scores) * round(100 * keep, 9) / 100))
    order = sorted(range(len(scores)), key=lambda place: (not forced[place], -scores[place], place))
    chosen = set(order[:number])
    return [place in chosen or forced[place] for place in range(len(scores))]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences, by rule; together they hold every word."""
    spans, at = [], 0
    for match in _BREAK.finditer(text):
        spans.append((at, match.end()))
        at = match.end()
    return [*spans, (at, len(text))]


def placed(text: str, sentences: Sequence[str]) -> list[tuple[int, int]]:
    """Where sentences that a splitter returned stand in the text."""
    spans, at = [], 0
    for sentence in sentences:
        start = text.find(sentence, at)
        if start < 0:
            raise OptionError(f"the splitter gave {sentence!r}, which does not stand in the text after the sentences before it")
        at = start + len(sentence)
        spans.append((start, at))
    return spans or [(0, len(text))]
