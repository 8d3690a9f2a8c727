"""VQA accuracy: an answer is right where three of the other people said the same, after the official normalisation.

Reference: Antol et al., ICCV 2015, arXiv:1505.00468; normalisation of github.com/GT-Vision-Lab/VQA (PythonEvaluationTools, vqaEval.py), and of EvalAI's
processor, by which TextVQA is scored (facebookresearch/mmf, processors.py). Written anew after their rules.

For each of the ten people, the answer gets a third for each of the nine others who said the same, at most 1; the mean over the ten counts. So 2 people
make 0.6, 3 make 0.9 and 4 make 1.
Difference: vqaEval.py leaves an answer as it is where all ten people agree, so that "Yes" would be wrong against ten times "yes"; here, as in lmms-eval,
every answer is normalised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd "
    "it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've 'ow's'at"
)
_COMMA = re.compile(r"\d,+\d")
_DOT = re.compile(r"\.(?!\d)")


def _without_one_mark(word: str) -> list[str]:
    """The word without one of its apostrophes, each in turn."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


#: Words that lack one apostrophe, and as they are written. As official, "hell", "ill", "shell", "well" and "were" stay what they are.
WHOLE = {short: word for word in CONTRACTIONS.split() for short in _without_one_mark(word)}


def normalised_vqa(text: str) -> str:
    """As vqaEval.py: punctuation removed or a space, number words as digits, no articles, apostrophes put back, lower case."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found, number = text, _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        aside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if aside or number else " ")
    words = [NUMBERS.get(word, word) for word in _DOT.sub("", found).lower().split()]
    return " ".join(WHOLE.get(word, word) for word in words if word not in ARTICLES)


def normalised_evalai(text: str) -> str:
    """As EvalAI's processor: lower case, no commas and question marks, the genitive a word of its own; then as `normalised_vqa`."""
    return normalised_vqa(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer: str, references: Sequence[str], normalise: Callable[[str], str] = normalised_vqa) -> float:
    """The share that is right, in [0, 1].

    Args:
        answer: of the model.
        references: of all people, usually ten; with one alone it counts by itself.
        normalise: applied to all of them.
    """
    plain = normalise(answer)
    same = [normalise(reference) == plain for reference in references]
    if len(same) == 1:
        return float(same[0])
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)
