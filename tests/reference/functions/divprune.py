"""DivPrune: projected features in, kept tokens out, in the order of picking."""

from __future__ import annotations

from golden_case import Case, differ, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.divprune import divprune
from vlprune.protocols import ScoreInputs


def check(case: Case) -> str:
    """The number kept, the order of picking, and what the stage keeps."""
    stage = divprune(ModelFacts(), case.hyper["ratio"]).stages[0]
    tokens = case["in.features"][None]
    kept = run_stage(stage, (), tokens=tokens).keep_indices[0]
    inputs = ScoreInputs(tokens, kept.numel())
    order = stage.selector.picks(stage.scorer(inputs), inputs)[0]  # type: ignore[attr-defined]
    return differ("out.selected_order", order, case["out.selected_order"]) or differ("out.keep_indices", kept, case["out.keep_indices"])
