"""PiToMe: groups, means and sizes of one round, for pictures, its bipartite variant, and text."""

from __future__ import annotations

from dataclasses import replace

from functions.tome import check_merge
from golden_case import Case

from vlprune.method import ModelFacts
from vlprune.methods.pitome import pitome
from vlprune.protocols import ScoreInputs, Tap
from vlprune.selectors.matching import Ranked


def check(case: Case) -> str:
    """The method's own stage on the patches; for text its parts with the shape and the split that the program has there."""
    hyper = case.hyper
    prefix = int(hyper["class_token"])
    keys, tokens = case["in.metric"][:, prefix:], case["in.x"][:, prefix:]
    count = tokens.shape[1]
    num_keep = count - int(count - count * hyper["ratio"])
    variant = "code" if hyper.get("use_bsm_pitome") else "paper"
    (stage,) = pitome(ModelFacts(vision_layers=1, has_cls=prefix > 0), num_keep, margin=hyper["margin"], variant=variant).stages
    if hyper["function"] == "pitome_text":
        stage = replace(stage, scorer=replace(stage.scorer, shape="gaussian"), selector=replace(stage.selector, split=Ranked("halves")))
    inputs = ScoreInputs(tokens=tokens, num_keep=stage.budget.num_keep(count), signals={Tap("vision_keys", 0): keys})
    return check_merge(case, stage, inputs, prefix)
