"""WUPS: how near the words of an answer are to the right ones in WordNet, so that "carton" for "box" is not simply wrong.

Reference: Malinowski and Fritz, NeurIPS 2014, arXiv:1410.0210, section 4; the official calculate_wups.py takes nouns only. WordNet is read through nltk,
whose data has to be there: ``pip install nltk`` and ``python -m nltk.downloader wordnet``.

For the words A of an answer and T of the reference: the smaller of prod_{a in A} max_{t in T} s(a, t) and prod_{t in T} max_{a in A} s(a, t), where s is the
similarity of Wu and Palmer, and a tenth of it where it is below the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

from vlprune.errors import VlpruneError

Similarity = Callable[[str, str], float]


def wups(answer: Sequence[str], reference: Sequence[str], threshold: float, similarity: Similarity | None = None) -> float:
    """WUPS of one answer, in [0, 1].

    Args:
        answer: its words.
        reference: the right words; without any on one side it is 0.
        threshold: of the similarity, 0.9 and 0.0 in papers.
        similarity: of two words; ``None``: `noun_similarity`.
    """
    measure = similarity or noun_similarity

    def near(one: str, other: str) -> float:
        value = 1.0 if one == other else measure(one, other)
        return value if value >= threshold else 0.1 * value

    if not answer or not reference:
        return 0.0
    there = prod(max(near(word, right) for right in reference) for word in answer)
    back = prod(max(near(word, right) for word in answer) for right in reference)
    return min(there, back)


@lru_cache(maxsize=100_000)
def noun_similarity(one: str, other: str) -> float:
    """The highest Wu-Palmer similarity of any meanings as nouns; 0 where a word is no noun."""
    from nltk.corpus import wordnet

    pairs = [(a, b) for a in wordnet.synsets(one, pos=wordnet.NOUN) for b in wordnet.synsets(other, pos=wordnet.NOUN)]
    return max((float(a.wup_similarity(b) or 0) for a, b in pairs), default=0.0)


def check_wordnet() -> None:
    """Whether WordNet can be read.

    Raises:
        VlpruneError: what is missing, and how to get it.
    """
    remedy = "pip install nltk, then python -m nltk.downloader wordnet"
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise VlpruneError(f"WUPS needs nltk, which is not installed: {remedy}") from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise VlpruneError(f"WUPS needs the WordNet data of nltk, which are not there: {remedy}") from error
