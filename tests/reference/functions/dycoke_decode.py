"""DyCoke stage 2: attention of a few decoding steps in, keys that are looked at out."""

from __future__ import annotations

import torch
from golden_case import Case, differ

from vlprune.adapters._decode_select import Selection
from vlprune.method import ModelFacts
from vlprune.methods.dycoke import dycoke


def check(case: Case) -> str:
    """The choice of every step. The program's list forgets what was generated since it was made, ours does not."""
    hyper = case.hyper
    start, number, steps = hyper["image_start"], hyper["n_image"], case["out.similarity"].numel()
    select = dycoke(ModelFacts(decoder_layers=28), decode_keep=1 - hyper["dycoke_ratio"], reuse=hyper["threshold"]).decode_selects[0]
    keep, total = select.budget.num_keep(number), start + number + hyper["n_post"]
    visual = torch.arange(start, start + number)[None]
    others = torch.cat((torch.arange(start), torch.arange(start + number, total)))[None]
    state = Selection(visual, torch.tensor([number]), number, number, torch.tensor([keep]), keep, keep, others, total)
    made = total
    for step in range(steps):
        attention = case[f"in.attention.step{step}"]
        before, length = state.previous, attention.shape[-1]
        image = attention.mean(dim=1)[:, 0, start : start + number]
        alike = torch.zeros(1) if before is None else torch.cosine_similarity(image, before, dim=1)
        if not torch.allclose(alike, case["out.similarity"][step : step + 1], atol=1e-5):
            return f"out.similarity of step {step}: {float(alike):.4f}"
        state.choose(select, image)
        assert state.chosen is not None
        if float(alike) < hyper["threshold"]:
            made = length
        seen = state.view(length)[0][0].sort().values
        problem = differ(f"out.keep_indices.step{step}", state.chosen[0].sort().values - start, case[f"out.keep_indices.step{step}"]) or differ(
            f"out.kv_index.step{step}", seen[seen < made], case[f"out.kv_index.step{step}"]
        )
        if problem:
            return problem
    return differ("out.keep_indices", state.chosen[0].sort().values - start, case["out.keep_indices"]) if state.chosen is not None else "no steps"
