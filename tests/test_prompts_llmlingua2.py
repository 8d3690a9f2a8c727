"""LLMLingua-2: fixtures, hand-worked choices, and a real tiny classifier against loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.prompt_tools import token_classifier, tokenizer
from vlprune.errors import NotFiniteError, OptionError
from vlprune.prompts import LLMLingua2, TokenScores, compress
from vlprune.prompts.llmlingua2 import above_percentile, percentile_of, without_repeats
from vlprune.prompts.words import chunks, split_words

TEXT = "Sam bought a dozen boxes, each with 30 highlighter pens inside, for $10 each box. He rearranged five boxes into packages.\nStep 1: count them!"


def by_table(table: dict[str, float], other: float = 0.1):
    """A classifier that knows some words."""

    def score(text: str) -> TokenScores:
        words = split_words(text, "punctuation")
        return TokenScores([(word.start, word.end) for word in words], [table.get(word.text, other) for word in words])

    return score


def test_percentiles_of_the_spec() -> None:
    assert [percentile_of(rate) for rate in (0.9, 0.8, 0.7, 0.6, 0.5)] == [10, 20, 31, 41, 51]


def test_words_above_the_percentile_stay() -> None:
    """Ten equal words: the percentile 51 of 0.0 to 0.9 is 0.459, five are above it."""
    assert above_percentile([n / 10 for n in range(10)], [1] * 10, [False] * 10, 0.5) == [False] * 5 + [True] * 5
    heavy = above_percentile([0.1, 0.2, 0.9], [1, 1, 8], [False] * 3, 0.5)
    assert heavy == [False, False, True], "threshold is 0.9 itself: nothing is above it, so the best stays"
    assert above_percentile([0.1, 0.2, 0.9], [1, 1, 1], [False] * 3, 0.5) == [False, False, True]
    assert above_percentile([0.1, 0.2, 0.9], [8, 1, 1], [False] * 3, 0.5) == [False, True, True], "a word of many tokens is counted as often"


def test_forced_words_stay_at_percentile_one() -> None:
    assert above_percentile([1.0, 1.0, 0.2], [1, 1, 1], [True, True, False], 0.1) == [True, True, False]


def test_sub_words_are_averaged() -> None:
    def score(text: str) -> TokenScores:
        assert text == "alpha beta gamma"
        return TokenScores([(0, 0), (0, 2), (2, 5), (6, 10), (11, 13), (13, 16), (0, 0)], [9.0, 0.9, 0.1, 0.6, 0.2, 0.4, 9.0])

    found = compress("alpha beta gamma", "llmlingua2", 0.5, classifier=score)
    assert found.scores == pytest.approx((0.5, 0.6, 0.3))
    assert found.text == "beta"


def test_forced_tokens_and_repeats() -> None:
    text = "Step 1: add them. Step 2: Step 2: divide it by that"
    score = by_table({"add": 0.9, "divide": 0.8})
    plain = compress(text, "llmlingua2", 0.5, classifier=score, protect_numbers=False)
    assert plain.text == "add divide", "equal probabilities are not above themselves"
    forced = compress(text, "llmlingua2", 0.5, classifier=score, force_tokens=("Step", ":"))
    assert forced.text == "Step 1: Step 2: Step 2:", "the threshold is 1, and what is forced stays"
    single = compress("Step: Step: Step: go now", "llmlingua2", 0.5, classifier=by_table({}), force_tokens=("Step",), drop_consecutive=True)
    assert single.text == "Step"
    assert without_repeats(["a", "a", "b", "a"], [True, True, False, True], {"a"}) == [True, False, False, False]
    assert without_repeats(["a", "x", "a"], [True, True, True], {"a"}) == [True, True, True]
    assert without_repeats(["a", ":", "a"], [True, True, True], {"a", ":"}) == [True, True, True]


def test_line_breaks_stay_if_forced() -> None:
    score = by_table({"one": 0.9, "two": 0.9})
    assert compress("one thing\nand two things", "llmlingua2", 0.5, classifier=score).text == "one two"
    assert compress("one thing\nand two things", "llmlingua2", 0.5, classifier=score, force_tokens=["\n"]).text == "one\ntwo"


def test_chunks_end_after_a_sentence() -> None:
    assert chunks([1] * 10, [False, False, True, False, False, False, False, True, False, False], 6) == [(0, 3), (3, 8), (8, 10)]
    assert chunks([3, 3, 3], [False] * 3, 6) == [(0, 2), (2, 3)]
    assert chunks([9, 1], [False, False], 6) == [(0, 1), (1, 2)], "a word that is too long is alone"
    assert chunks([2, 2, 2], [True, False, False], 6) == [(0, 3)], "what fits whole is not cut"
    assert chunks([], [], 6) == []


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6, 0.5, 0.2])
@pytest.mark.parametrize("chunk", [510, 24])
def test_a_tiny_classifier_against_loops(keep: float, chunk: int) -> None:
    tokens = tokenizer()
    model = token_classifier(tokens)
    found = compress(TEXT, "llmlingua2", keep, classifier=model, tokenizer=tokens, chunk=chunk, protect_numbers=False)
    words = split_words(TEXT, "punctuation")
    lengths = [len(tokens(word.text, add_special_tokens=False)["input_ids"]) for word in words]
    starts, at = [0], 0                                                                  # the rule by hand: fill up, go back to the last sentence's end
    while at < len(words):
        last, total = at, 0
        while last < len(words) and (total + lengths[last] <= chunk):
            total += lengths[last]
            last += 1
        if last < len(words):
            for place in range(last - 1, at - 1, -1):
                after = TEXT[words[place].end : words[place + 1].start]
                if words[place].text.endswith(".") or "\n" in after:
                    last = place + 1
                    break
        starts.append(last)
        at = last
    kept, scores = [], []
    for first, last in itertools.pairwise(starts):
        given = tokens(TEXT[words[first].start : words[last - 1].end], return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**given).logits.softmax(-1)[0, 1:-1, 1].tolist()
        means = []
        for length in lengths[first:last]:
            means.append(float(np.mean(probabilities[:length])))
            probabilities = probabilities[length:]
        assert not probabilities
        repeated = [mean for mean, length in zip(means, lengths[first:last], strict=True) for _ in range(length)]
        threshold = np.percentile(repeated, int(100 * (1 - keep) + 1))
        kept += [mean > threshold for mean in means]
        scores += means
    assert (len(starts) > 2) == (chunk == 24)
    assert found.scores == pytest.approx(scores, abs=1e-5)
    assert list(found.kept) == kept
    assert chunk == 24 or abs(sum(n for n, stays in zip(lengths, kept, strict=True) if stays) / sum(lengths) - keep) < 0.1


def test_the_target_tokenizer_counts() -> None:
    score = by_table({"heavy": 0.5}, other=0.2)
    light = compress("so heavy it is now", "llmlingua2", 0.3, classifier=score, target_tokenizer=lambda word: 1)
    assert light.text == "heavy"
    ranks = by_table({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    assert compress("a b c d", "llmlingua2", 0.5, classifier=ranks).text == "c d"
    assert compress("a b c d", "llmlingua2", 0.5, classifier=ranks, target_tokenizer=lambda word: 5 if word == "a" else 1).text == "b c d"
    tokens = tokenizer()
    assert compress("a b c d", "llmlingua2", 0.5, classifier=ranks, target_tokenizer=tokens).text == "c d"


def test_a_very_long_word_and_a_long_text() -> None:
    """Longer than the model takes, in one word and in many."""
    tokens = tokenizer(64)
    model = token_classifier(tokens)
    text = "x" * 300 + " " + "some words here and there. " * 40
    found = compress(text, "llmlingua2", 0.5, classifier=model, tokenizer=tokens, chunk=60)
    assert 0.3 < found.reached < 0.7
    assert len(found.scores) == len(found.words)
    with pytest.raises(Exception, match=r"size|index"):                                  # the chunk has to fit the model, which its own error says
        compress(text, "llmlingua2", 0.5, classifier=model, tokenizer=tokens)


def test_a_chunk_never_vanishes() -> None:
    assert compress("Why?", "llmlingua2", 0.5, classifier=by_table({"Why": 0.3})).text == "Why"


def test_errors() -> None:
    tokens = tokenizer()
    for options, wanted in (
        ({}, "needs a token classifier"),
        ({"classifier": 3}, "classifier=3"),
        ({"classifier": token_classifier(tokens)}, "fast tokenizer; no tokenizer was given"),
        ({"classifier": len, "force_tokens": "Step"}, r"force_tokens=\['Step'\]"),
        ({"classifier": len, "chunk": 0}, "chunk=0"),
        ({"classifier": len, "colour": 1}, "colour"),
        ({"classifier": lambda text: [0.1]}, "gave 1 numbers for a text of 3 words"),
        ({"classifier": lambda text: TokenScores([(0, 1)], [0.1, 0.2])}, "1 offsets came with 2 scores"),
        ({"classifier": token_classifier(tokens), "tokenizer": tokens, "keep_label": 2}, "classes 0 to 1"),
        ({"classifier": lambda text: [0.5] * 3, "target_tokenizer": 5}, "cannot count tokens"),
    ):
        with pytest.raises(OptionError, match=wanted):
            compress("one two three", "llmlingua2", 0.5, **options)
    for value in (float("nan"), 1.5):
        with pytest.raises(NotFiniteError, match="a probability between 0 and 1"):
            compress("one two three", "llmlingua2", 0.5, classifier=lambda text, value=value: [value] * 3)


def test_it_is_a_plain_transform() -> None:
    """``(text, keep) -> text``, with nothing protected but forced words."""
    transform = LLMLingua2(by_table({"word": 0.9}))
    assert transform("the word 12", 0.3) == "word"
    assert transform("the word 12", 1.0) == "the word 12"
    assert transform("", 0.3) == ""
