"""HiPrune on CLIP: attention maps of two layers in, kept patches out."""

from __future__ import annotations

from golden_case import Case, differ, grid_of, run_stage

from vlprune.method import ModelFacts
from vlprune.methods.hiprune import hiprune


def check(case: Case) -> str:
    """Column means without CLS, then the method's own stage; boolean mask and indices."""
    received = {which: case[f"in.attn_{which}"].mean(dim=(1, 2))[:, 1:] for which in ("deep", "object")}  # (B, N)
    num_items, num_tokens = received["deep"].shape
    side = case.hyper.get("grid", round(num_tokens**0.5))
    per_tile = case.hyper.get("per_tile_budget") or int(case.hyper["total_budget"] / num_items)
    facts = ModelFacts(decoder_layers=32, vision_layers=24, feature_layer=22, has_cls=True)
    method = hiprune(
        facts, per_tile, alpha=case.hyper["alpha"], object_layer=case.hyper["object_layer_1based"] - 1, variant="code"
    )
    grid = grid_of(1, side, num_tokens // side).expand(num_items, -1, -1)
    kept = run_stage(method.stages[0], (received["deep"], received["object"]), grid=grid).keep_indices
    mask = case["out.keep_mask"].new_zeros(num_items, num_tokens).scatter(1, kept, 1)
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or differ(
        "out.keep_mask", mask, case["out.keep_mask"]
    )
