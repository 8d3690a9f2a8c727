"""MoDES: in a mixture of experts, those of a token's experts do not run that matter least, with thresholds of their own for text and for visual tokens.

Reference: "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping", arXiv:2511.15690. No public code read.

Convention: the score of an expert that the router chose is the layer's importance times its probability out of 1 for all experts (before the model makes
the chosen ones' weights sum to 1); it runs if the score reaches the threshold for the token's kind. ``keep`` is the share of chosen experts that run, the
paper's skip ratio is ``1 - keep``. Importances sum to 1 over the layers and are measured beforehand, as is which thresholds a share needs
(`vlprune.skipping.expert_importance`, with pictures in its inputs; ``vlprune calibrate --method modes`` does it with texts), given as ``importance=FOLDER``.
Acts in prompts and while decoding.

- ``tau=(text, visual)``: thresholds instead of a share; without ``importance`` all layers matter alike. Larger thresholds skip more.
- ``keep`` as a number: at most so many experts of each token run, the likeliest; needs nothing measured.

Differences and open places:
- Whether the other experts' weights are made to sum to 1 again is not written where we could read it: they stay as they are. Experts that all tokens share
  always run.
- A token may lose all of its experts, as the rule says; then the layer's MLP gives it nothing. ``at_least=1`` keeps its likeliest one.
- Which threshold is the larger is left to the search (our sources disagree).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, RouteMask
from vlprune.methods._schedules import given_count
from vlprune.skipping.expert_importance import ExpertImportance, Thresholds, load_importance


def modes(
    facts: ModelFacts,
    keep: Keep = 0.5,
    *,
    importance: str | os.PathLike[str] | ExpertImportance | None = None,
    tau: Sequence[float] | None = None,
    at_least: int = 0,
) -> PruningMethod:
    """Let only those experts of a token run that matter.

    Args:
        facts: of the model.
        keep: share of the chosen experts that run, which ``importance`` turns into thresholds; or how many of a token's do, at most.
        importance: what the calibration wrote.
        tau: thresholds for text and for visual tokens, instead of a share.
        at_least: how many of a token's experts always run, the likeliest.
    """
    given_count("at_least", at_least, 0, "experts of a token that always run")
    budget, limits = Budget(keep), None if tau is None else given_tau(tau)
    measured = load_importance(importance) if isinstance(importance, (str, os.PathLike)) else importance
    if measured is not None and not isinstance(measured, ExpertImportance):
        raise OptionError(f"importance={type(measured).__name__}: the folder that vlprune calibrate --method modes wrote")
    if budget.is_everything:
        return PruningMethod("modes")
    layers = facts.expert_layers or tuple(range(facts.decoder_layers))                   # where there are none, what is missing is said when it is put on
    if measured is not None and facts.expert_layers and measured.layers != facts.expert_layers:
        raise OptionError(f"importance was measured in layers {measured.layers}, and this model has experts in {facts.expert_layers}: measure this one")
    if limits is None and isinstance(keep, float):
        if measured is None:
            raise OptionError(
                f"keep={keep!r}: which thresholds let this share of experts run has to be measured: importance=FOLDER of "
                "vlprune.skipping.calibrate.calibrate('modes', model, inputs, FOLDER). Or give tau=(text, visual), thresholds of your own, or "
                "a number such as keep=2, at most so many experts for each token."
            )
        limits = measured.thresholds(keep)
    text, visual = (0.0, 0.0) if limits is None else limits
    most = keep if isinstance(keep, int) else None
    if most is not None and at_least > most:
        raise OptionError(f"at_least={at_least}: more than keep={keep}, the most experts that run for a token")
    alpha = dict(zip(measured.layers, measured.alpha, strict=True)) if measured is not None else dict.fromkeys(layers, 1.0 / max(len(layers), 1))
    masks = [RouteMask(layer, Thresholds(alpha[layer], text, visual, most, at_least)) for layer in layers if layer in alpha]
    return PruningMethod("modes", route_masks=tuple(masks))


def given_tau(tau: Any) -> tuple[float, float]:
    """Two thresholds, as the user wrote them."""
    numbers = tuple(tau) if isinstance(tau, (tuple, list)) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, float)) or not n >= 0 for n in numbers):
        raise OptionError(f"tau={tau!r}: two numbers from 0, thresholds for text and for visual tokens, such as (0.01, 0.02)")
    return float(numbers[0]), float(numbers[1])


CARD = MethodCard(
    "modes",
    modes,
    "experts that matter least do not run, with thresholds for text and for visual tokens (mixtures of experts)",
    paper="arXiv:2511.15690",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    default_keep=0.5,
    test_options={"tau": (0.05, 0.08)},
)
