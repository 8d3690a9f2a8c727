"""Random text: a seeded random subset of the text of a prompt, the baseline that every method for text has to beat.

As `random`, with other tokens: the first and the last text token of a row always stay and count in the budget. ``tokens="all"`` draws among text and
visual tokens alike.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import given_point, given_protect, given_tokens
from vlprune.methods.random_drop import RandomScore
from vlprune.points import Point
from vlprune.reducers import Drop
from vlprune.selectors import TopK


def random_text(
    facts: ModelFacts,
    keep: Keep = 1 / 2,
    *,
    seed: int = 0,
    point: str | Point = "before_llm",
    tokens: str = "text",
    protect: tuple[int, int] = (1, 1),
) -> PruningMethod:
    """Keep a random subset of every row at one point.

    Args:
        facts: of the model (unused).
        keep: share or number of the text tokens of a row.
        seed: of the draw.
        point: where, ``"before_llm"`` or ``"llm:2"``.
        tokens: ``"text"`` or ``"all"``.
        protect: how many of the first and of the last text tokens always stay.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError(f"seed={seed!r}: an int is needed")
    stage = Stage(given_point(point), RandomScore(seed), TopK(), Drop(), Budget(keep), tokens=given_tokens(tokens), protect=given_protect(protect))
    return PruningMethod("random_text", (stage,))


CARD = MethodCard(
    "random_text", random_text, "a seeded random subset of the prompt's text; the baseline to beat", equivariant=False, tokens="text", default_keep=0.5
)
