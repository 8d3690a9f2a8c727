"""VisPruner: CLS rows by head and features before the projector in, kept patches out."""

from __future__ import annotations

from golden_case import Case, differ, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.vispruner import vispruner


def check(case: Case) -> str:
    """Head mean, then the method's own stage; indices and mask."""
    row = case["in.cls_attention"].mean(dim=1)
    method = vispruner(ModelFacts(vision_layers=24, feature_layer=22, has_cls=True), case.hyper["T"], important=case.hyper["important_ratio"])
    kept = run_stage(method.stages[0], (row, case["in.features"])).keep_indices
    mask = case["out.keep_mask"].new_zeros(row.shape).scatter(1, kept, 1)
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or differ("out.keep_mask", mask, case["out.keep_mask"])
