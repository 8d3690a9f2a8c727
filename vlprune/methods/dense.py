"""Dense: the untouched model, as a method, so that tables have their first row."""

from __future__ import annotations

from vlprune.budget import Keep
from vlprune.method import MethodCard, ModelFacts, PruningMethod


def dense(facts: ModelFacts, keep: Keep = 1.0) -> PruningMethod:
    """No stage at all, whatever ``keep`` says."""
    return PruningMethod("dense")


CARD = MethodCard("dense", dense, "every token stays; the baseline", points=(), equivariant=True, default_keep=1.0)
