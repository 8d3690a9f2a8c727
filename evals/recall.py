"""Associative recall over a long text: keys and values between filler, then questions for values; nothing is downloaded.

A text is random filler words, with pairs *key value* scattered all over it; every key is there once. Behind it come questions, each *? key*, and the answer is
the value that followed that key, up to two thousand tokens earlier. Guessing pays one in ``VALUES``. The same split, index and settings give the same text.

The task is the multi-query associative recall of Arora et al. 2023 (arXiv:2312.04927), with filler of its own between the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAD, BOS, QUESTION = 0, 1, 2
KEYS, VALUES, FILLER = 64, 64, 120
FIRST_KEY = 8
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
VOCABULARY = FIRST_FILLER + FILLER
LENGTH = 2048
PAIRS = 24
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Recall:
    """A text with questions.

    Attributes:
        context: int64 array (length), what comes before the questions, BOS first.
        keys, values: int64 arrays (questions), token ids that are asked for in turn and their answers.
        places: (questions) where each answer stands in the context.
    """

    context: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    places: np.ndarray


def text(split: str, index: int, *, length: int = LENGTH, pairs: int = PAIRS, seed: int = 0) -> Recall:
    """Draw one text, all of whose pairs are asked for in random order.

    Args:
        split: ``"train"`` or ``"heldout"``.
        index: number of the text in its split.
        length: tokens of the context, at least ``2 * pairs + 1``.
        pairs: how many, at most ``KEYS``.
        seed: another one gives other texts.
    """
    rng = np.random.default_rng((seed, 78, SPLITS.index(split), index))
    context = rng.integers(FIRST_FILLER, VOCABULARY, length)
    context[0] = BOS
    slots = (length - 1) // 2                                            # pairs start at odd places, so that they never overlap
    starts = 1 + 2 * np.sort(rng.permutation(slots)[:pairs])
    keys = FIRST_KEY + rng.permutation(KEYS)[:pairs]
    values = FIRST_VALUE + rng.integers(0, VALUES, pairs)
    context[starts], context[starts + 1] = keys, values
    order = rng.permutation(pairs)
    return Recall(context, keys[order], values[order], starts[order] + 1)


def prompt(drawn: Recall, number: int = 0) -> np.ndarray:
    """(length + 2) the text with one question; the answer is the next token."""
    return np.concatenate([drawn.context, [QUESTION, drawn.keys[number]]])
