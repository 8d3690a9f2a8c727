"""FasterVLM: CLS rows by head in, kept patches out."""

from __future__ import annotations

from golden_case import Case, differ, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.fastervlm import fastervlm


def check(case: Case) -> str:
    """Head mean, then the method's own stage; indices and mask."""
    row = case["in.cls_attention"].mean(dim=1)
    method = fastervlm(ModelFacts(vision_layers=24, feature_layer=22, has_cls=True), case.hyper["T"])
    kept = run_stage(method.stages[0], (row,)).keep_indices
    mask = case["out.keep_mask"].new_zeros(row.shape).scatter(1, kept, 1)
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or differ("out.keep_mask", mask, case["out.keep_mask"])
