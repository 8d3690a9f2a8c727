"""What methods that ask the vision tower which tokens matter have in common."""

from __future__ import annotations

from vlprune.method import ModelFacts
from vlprune.protocols import Tap


def attention_tap(facts: ModelFacts) -> Tap:
    """Attention of CLS in the last block whose output is used; without CLS what is received from all tokens, where all of them are seen."""
    if facts.has_cls:
        return Tap("cls_row", facts.feature_layer)
    return Tap("column_mean", facts.nearest_global(facts.feature_layer))
