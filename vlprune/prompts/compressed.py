"""Compressed: a shorter prompt that remembers what it was made of."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.prompts.words import Word


@dataclass(frozen=True)
class Compressed:
    """What `vlprune.prompts.compress` returns; ``str(it)`` is the text.

    Attributes:
        text: the shorter prompt.
        original: the prompt as given.
        method: name of the method.
        asked: share of the words (LLMLingua-2: of their tokens) that was to stay.
        words: words of the prompt that could go; placeholders and special tokens are not among them.
        kept: whether each of them stayed. Empty where a callable rewrote the text instead of leaving words out.
        forced: whether each of them had to stay.
        scores: what each of them was chosen by; empty where there are none.
        protected: spans of ``original`` that were out of reach.
        tokens: tokens of the original and of the result, where a tokenizer was given to count them.
    """

    text: str
    original: str
    method: str
    asked: float
    words: tuple[Word, ...] = ()
    kept: tuple[bool, ...] = ()
    forced: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    protected: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def num_words(self) -> int:
        """Words that could go."""
        return len(self.words)

    @property
    def num_kept(self) -> int:
        """Words that stayed; counted in the result where a callable rewrote the text."""
        return sum(self.kept) if self.kept or not self.words else len(self.text.split())

    @property
    def reached(self) -> float:
        """Share of the words that stayed; 1 where there were none."""
        return self.num_kept / self.num_words if self.words else 1.0

    @property
    def reached_tokens(self) -> float | None:
        """Share of the tokens that stayed, everything counted; ``None`` if they were not counted."""
        return None if self.tokens is None else self.tokens[1] / max(self.tokens[0], 1)

    @property
    def dropped(self) -> tuple[Word, ...]:
        """Words that left, with their places in ``original``."""
        return tuple(word for word, stays in zip(self.words, self.kept, strict=False) if not stays)

    def restore(self) -> str:
        """The prompt as it was."""
        return self.original

    def marked(self, start: str = "[-", end: str = "-]") -> str:
        """The original with what left between ``start`` and ``end``."""
        out, at = [], 0
        for word in self.dropped:
            out += [self.original[at : word.start], start, word.text, end]
            at = word.end
        return "".join([*out, self.original[at:]])

    def report(self) -> str:
        """One line: words, share asked and reached, tokens if known."""
        line = f"{self.method}: {self.num_words} -> {self.num_kept} words, asked {self.asked:.3g}, reached {self.reached:.3g}"
        return line if self.tokens is None else f"{line}; {self.tokens[0]} -> {self.tokens[1]} tokens"
