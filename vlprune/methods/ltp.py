"""LTP: before each layer the text leaves to which the layer below paid less attention than a threshold; how much that is, is in the data.

Reference: "Learned Token Pruning for Transformers", arXiv:2107.00910 (KDD 2022). Official code: https://github.com/kssteven418/LTP
(`src/transformers/models/ltp/prune_modules.py`).

Convention: score p[j] is the attention that token j received in layer l, mean over heads and queries; tokens with p[j] below theta_l leave before the next
layer. ``thresholds`` gives every theta (learned with `vlprune.skipping.soft_thresholds`, soft masks by a sigmoid, or found otherwise); without, theta rises
linearly, ``threshold * l / L`` in layer l counted from 1, at least 1e-5. ``keep`` is the share or number of a prompt's text that always stays, however low
its attention; the report says how many did.

``rule`` says what a threshold is: ``"absolute"`` as in the paper; ``"max"``, times the largest p of the prompt (the program's relative variant); ``"mean"``,
times the mean p (ours, and the default: p falls with the length of a prompt, and the paper's thresholds are learned for short ones).

Differences:
- The paper prunes encoders. In a causal decoder few queries see a late token, so ``per="seen"`` (default) takes the mean over those that do;
  ``per="all"`` is the paper's. No encoder can be put on here: towers keep counts that are known before the data.
- The first and the last token always stay (``protect``).
- Rows of a batch keep their own numbers; each costs one host read a layer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import given_protect, given_tokens
from vlprune.methods._stages import given_layers
from vlprune.points import LLMLayer
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors.above import RULES, Above
from vlprune.skipping.soft_thresholds import load_thresholds

LOWEST = 1e-5
PER = {"all": "mean", "seen": "seen"}


def ltp(
    facts: ModelFacts,
    keep: Keep = 0.5,
    *,
    threshold: float = 1.0,
    thresholds: Sequence[float] | str | os.PathLike[str] | None = None,
    rule: str = "mean",
    per: str = "seen",
    layers: Sequence[int] | None = None,
    tokens: str = "text",
    protect: tuple[int, int] = (1, 1),
) -> PruningMethod:
    """Let tokens leave whose attention is below a threshold.

    Args:
        facts: of the model.
        keep: share or number of the tokens that always stay.
        threshold: of the last layer; those below rise to it linearly.
        thresholds: instead, one for each layer, or a file of `vlprune.skipping.soft_thresholds.save_thresholds`. The last layer's is not used.
        rule: ``"mean"``, ``"max"`` or ``"absolute"``.
        per: mean over the queries that see a token (``"seen"``), or over ``"all"``.
        layers: before which tokens leave, from 1 on; all if not given.
        tokens: ``"text"`` or ``"all"``.
        protect: how many of the first and last text tokens always stay.
    """
    depth = facts.decoder_layers
    for name, given, known in (("rule", rule, RULES), ("per", per, tuple(PER))):
        if given not in known:
            raise OptionError(f"{name}={given!r}: one of {', '.join(map(repr, known))}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise OptionError(f"threshold={threshold!r}: a number above 0")
    if thresholds is None:
        thetas = [max(LOWEST, threshold * (number + 1) / depth) for number in range(depth)]
    else:
        thetas = load_thresholds(thresholds) if isinstance(thresholds, (str, os.PathLike)) else [float(theta) for theta in thresholds]
    if len(thetas) != depth:
        raise OptionError(f"thresholds: {len(thetas)} numbers, and this model has {depth} layers; give one for each")
    chosen = tuple(range(1, depth)) if layers is None else given_layers("layers", layers, 1, depth)
    budget, row, sets = Budget(keep), given_protect(protect), given_tokens(tokens)
    stages = (
        Stage(
            LLMLayer(layer), SignalScore(Tap("received", layer - 1, (PER[per],))), Above(thetas[layer - 1], rule), Drop(), budget, tokens=sets, protect=row
        )
        for layer in chosen
    )  # fmt: skip
    return PruningMethod("ltp", tuple(stages))


CARD = MethodCard(
    "ltp",
    ltp,
    "text that gets at least a threshold of attention, layer by layer",
    paper="arXiv:2107.00910",
    code="https://github.com/kssteven418/LTP",
    points=("llm:K",),
    needs=("received",),
    text_aware=True,
    adaptive=True,
    tokens="text",
    default_keep=0.5,
)
