"""HiPrune on Qwen2.5-VL: two score vectors on a rectangular grid in, kept tokens out."""

from __future__ import annotations

from golden_case import Case, differ, grid_of, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.hiprune import hiprune


def check(case: Case) -> str:
    """With the released exclusion always; with the library's own (exactly K) wherever the program kept K as well."""
    scores = (case["in.deep_scores"][None], case["in.object_scores"][None])
    grid = grid_of(1, case.hyper["h"], case.hyper["w"])
    facts = ModelFacts(decoder_layers=28, vision_layers=32, feature_layer=31, global_vision_layers=(7, 15, 23, 31))
    expected = case["out.keep_indices"]
    num_keep = round(case.hyper["retention"] * scores[0].shape[1])
    for subtract in (1.0, None) if expected.numel() == num_keep else (1.0,):
        method = hiprune(facts, case.hyper["retention"], alpha=case.hyper["alpha"], variant="code", subtract=subtract)
        kept = run_stage(method.stages[0], scores, grid=grid).keep_indices[0]
        problem = differ(f"out.keep_indices (subtract={subtract})", kept, expected)
        if problem:
            return problem
    return ""
