"""LLMLingua-2: a token classifier says how likely each word is worth keeping; those above a percentile stay.

Reference: LLMLingua-2, arXiv:2403.12968.
Official code: https://github.com/microsoft/LLMLingua (`llmlingua/prompt_compressor.py`)

Convention: the paper's ``rate`` is our ``keep``. The text is cut into chunks of at most 510 tokens after a full stop or a line break; the probability of a word
is the mean over its sub-words; forced words and numbers have 1; the threshold of a chunk is the percentile ``int(100 * (1 - keep) + 1)`` of the words'
probabilities, each counted as often as the word has tokens in the target tokenizer; words *above* it stay. The integer is cut off in floating point as in
the released program: 10, 20, 31, 41, 51 for keep .9, .8, .7, .6, .5.

Differences:
- Words are cut at white space and at marks on their edges, whatever the classifier's tokenizer calls a word, so that offsets are enough and any
  tokenizer does. They are joined with the spaces that they had (released: by the tokenizer's own marks of a word's beginning).
- Forced words stay even where the percentile is 1, and a chunk never vanishes: where nothing is above the threshold its most probable word stays.
- ``keep=1`` is the text itself. The default target tokenizer is the classifier's (released: that of GPT-3.5).
- A consecutive forced word is one like the forced word before it with nothing else kept between; it leaves after the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import NotFiniteError, OptionError
from vlprune.prompts.transform import TextScorer, checked_keep
from vlprune.prompts.words import TokenScores, Word, chunks, ends_sentence, gather_scores, join_kept, split_words

NAME = "llmlingua2"
CHUNK = 510


@dataclass(frozen=True)
class LLMLingua2:
    """A `vlprune.prompts.PromptTransform`.

    Attributes:
        classifier: a Hugging Face token classifier, in evaluation mode; or a callable that gives a text's sub-words (`TokenScores`) or white-space words
            (numbers alone) their probability to stay.
        tokenizer: of the model, a fast one (it must give offsets). With a callable it only measures chunks; without it these are measured in words.
        target_tokenizer: counts how many tokens each word is worth: a tokenizer, or a callable ``str -> int``.
        force_tokens: words that always stay; ``"\\n"`` among them keeps line breaks.
        drop_consecutive: whether a forced word that only repeats the one before it leaves.
        chunk: tokens of a chunk at most, special tokens not counted.
        keep_label: which of the model's classes means that a token stays.
    """

    classifier: nn.Module | TextScorer
    tokenizer: Any = None
    target_tokenizer: Any = None
    force_tokens: Sequence[str] = ()
    drop_consecutive: bool = False
    chunk: int = CHUNK
    keep_label: int = 1
    name: str = NAME
    way: str = "punctuation"

    def __post_init__(self) -> None:
        if not callable(self.classifier):
            raise OptionError(f"classifier={self.classifier!r}: a Hugging Face token classifier with its tokenizer, or a callable text -> TokenScores")
        if isinstance(self.classifier, nn.Module) and not getattr(self.tokenizer, "is_fast", False):
            given = "no tokenizer was given" if self.tokenizer is None else f"{type(self.tokenizer).__name__} gives no offsets"
            raise OptionError(f"{NAME} needs the classifier's fast tokenizer; {given}. Pass tokenizer=AutoTokenizer.from_pretrained(...).")
        if isinstance(self.force_tokens, str):
            raise OptionError(f"force_tokens={self.force_tokens!r}: a list of words, so write force_tokens=[{self.force_tokens!r}]")
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise OptionError(f"chunk={self.chunk!r}: tokens of a chunk, an int from 1")

    def __call__(self, text: str, keep: float) -> str:
        """The text alone, nothing protected but ``force_tokens``; `vlprune.prompts.compress` protects placeholders and numbers."""
        words = split_words(text, self.way)
        if checked_keep(keep) == 1 or not words:
            return text
        return self.join(text, words, self.choose(text, words, [False] * len(words), keep)[0])

    def join(self, text: str, words: Sequence[Word], kept: Sequence[bool]) -> str:
        """The kept words as a text."""
        return join_kept(text, words, kept, newlines="\n" in self.force_tokens)

    def choose(self, text: str, words: Sequence[Word], forced: Sequence[bool], keep: float) -> tuple[list[bool], list[float]]:
        """Which words stay, and their probabilities."""
        wanted = set(self.force_tokens)
        forced = [must or word.text in wanted for word, must in zip(words, forced, strict=True)]
        worth = self._worth(words)
        kept: list[bool] = []
        scores: list[float] = []
        for first, last in self._chunks(text, words):
            probabilities = [1.0 if must else value for value, must in zip(self._classify(text, words[first:last]), forced[first:last], strict=True)]
            scores += probabilities
            kept += above_percentile(probabilities, worth[first:last], forced[first:last], keep)
        if self.drop_consecutive:
            kept = without_repeats([word.text for word in words], kept, wanted)
        return kept, scores

    def _worth(self, words: Sequence[Word]) -> list[int]:
        counter = self.target_tokenizer if self.target_tokenizer is not None else self.tokenizer
        return [1] * len(words) if counter is None else count_tokens(counter, [word.text for word in words])

    def _chunks(self, text: str, words: Sequence[Word]) -> list[tuple[int, int]]:
        counts = [1] * len(words)
        if self.tokenizer is not None:
            spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            counts = [max(len(parts), 1) for parts in gather_scores(words, TokenScores(spans, [0.0] * len(spans)))]
        return chunks(counts, ends_sentence(text, words), self.chunk)

    def _classify(self, text: str, words: Sequence[Word]) -> list[float]:
        """Mean probability of the sub-words of each word of one chunk."""
        start = words[0].start
        part = text[start : words[-1].end]
        if isinstance(self.classifier, nn.Module):
            tokens = classify(self.classifier, self.tokenizer, part, self.keep_label, self.chunk)
        else:
            tokens = by_place(self.classifier(part), part)
        means = [sum(values) / len(values) if values else 0.0 for values in gather_scores(words, tokens, start)]
        if not all(0 <= value <= 1 for value in means):
            raise NotFiniteError(f"the classifier gave {next(v for v in means if not 0 <= v <= 1)!r} where a probability between 0 and 1 is wanted")
        return means


def percentile_of(keep: float) -> int:
    """The percentile that is the threshold, cut off in floating point as in the released program."""
    return int(100 * (1 - keep) + 1)


def above_percentile(probabilities: Sequence[float], worth: Sequence[int], forced: Sequence[bool], keep: float) -> list[bool]:
    """Which words of a chunk stay: the forced ones and those above the percentile; the most probable one if there are none."""
    import numpy as np

    repeated = np.repeat(np.asarray(probabilities, dtype=np.float64), np.maximum(worth, 1))
    threshold = np.percentile(repeated, min(percentile_of(keep), 100))
    kept = [bool(must or value > threshold) for value, must in zip(probabilities, forced, strict=True)]
    if not any(kept):
        kept[int(np.argmax(probabilities))] = True
    return kept


def without_repeats(words: Sequence[str], kept: Sequence[bool], forced: set[str]) -> list[bool]:
    """Take out a forced word that is the same as the forced word before it with nothing else kept between them."""
    out, last = list(kept), None
    for place, word in enumerate(words):
        if out[place]:
            out[place] = word not in forced or word != last
            last = word
    return out


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones not counted; ``tokenizer`` may be a callable ``str -> int``."""
    if hasattr(tokenizer, "encode"):
        return [len(tokenizer.encode(text, **({"add_special_tokens": False} if hasattr(tokenizer, "all_special_tokens") else {}))) for text in texts]
    if callable(tokenizer):
        counts = [tokenizer(text) for text in texts]
        if all(isinstance(count, int) for count in counts):
            return counts
    raise OptionError(f"{tokenizer!r} cannot count tokens: a tokenizer with encode(), or a callable str -> int")


def classify(model: nn.Module, tokenizer: Any, text: str, keep_label: int = 1, limit: int = CHUNK) -> TokenScores:
    """Probability of ``keep_label`` for every sub-word of a text; at most ``limit`` of them at a time."""
    extra = tokenizer.num_special_tokens_to_add(pair=False)
    given = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=limit + extra, return_overflowing_tokens=True, stride=0)
    device = next(model.parameters()).device
    offsets: list[tuple[int, int]] = []
    scores: list[float] = []
    for row, places in enumerate(given["offset_mapping"]):
        inputs = {name: torch.tensor([given[name][row]], device=device) for name in tokenizer.model_input_names if name in given}
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits.float()                              # (1, L, C)
        if logits.dim() != 3 or logits.shape[1] != len(places):
            raise OptionError(f"{type(model).__name__} gave logits of shape {tuple(logits.shape)} for {len(places)} tokens; a token classifier is wanted")
        if logits.shape[-1] == 1:
            values = logits[0, :, 0].sigmoid()
        elif 0 <= keep_label < logits.shape[-1]:
            values = logits[0].softmax(dim=-1)[:, keep_label]
        else:
            raise OptionError(f"keep_label={keep_label}: this classifier has the classes 0 to {logits.shape[-1] - 1}")
        offsets += [(int(start), int(end)) for start, end in places]
        scores += values.tolist()
    return TokenScores(offsets, scores)


def by_place(scores: TokenScores | Sequence[float], text: str) -> TokenScores:
    """What a callable gave as sub-words with places; numbers alone are those of the words between white space."""
    if isinstance(scores, TokenScores):
        return scores
    words = split_words(text)
    if len(scores) != len(words):
        raise OptionError(f"the callable gave {len(scores)} numbers for a text of {len(words)} words; one a word is wanted, or TokenScores(offsets, scores)")
    return TokenScores([(word.start, word.end) for word in words], scores)
