"""Recent: the first few tokens of a prompt's text and its last ones; a baseline that knows nothing but places.

Reference for why the first tokens matter: "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453. Here it is a cut of the prompt
before one decoder layer, not a cache policy while decoding.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import SinkRecent, given_point, given_tokens
from vlprune.points import Point
from vlprune.reducers import Drop
from vlprune.selectors import TopK


def recent(facts: ModelFacts, keep: Keep = 1 / 2, *, sinks: int = 4, point: str | Point = "before_llm", tokens: str = "text") -> PruningMethod:
    """Keep the first ``sinks`` tokens and the last ones.

    Args:
        facts: of the model (unused).
        keep: share or number of the text tokens of a row, first and last ones together.
        sinks: how many of the first tokens rank before all others.
        point: where, ``"before_llm"`` or ``"llm:2"``.
        tokens: ``"text"`` or ``"all"``.
    """
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 1:
        raise OptionError(f"sinks={sinks!r}: a whole number from 1, the first tokens that stay")
    stage = Stage(given_point(point), SinkRecent(sinks - 1), TopK(), Drop(), Budget(keep), tokens=given_tokens(tokens))
    return PruningMethod("recent", (stage,))


CARD = MethodCard(
    "recent", recent, "the first few tokens of the prompt's text and the last ones", paper="arXiv:2309.17453", equivariant=False, tokens="text",
    default_keep=0.5,
)  # fmt: skip
