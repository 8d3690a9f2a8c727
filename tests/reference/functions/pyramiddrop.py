"""PyramidDrop: consecutive rank-and-drop stages that reuse one stub layer."""

from __future__ import annotations

import torch
from golden_case import Case, differ, run_stage
from torch import Tensor
from torch.nn import functional as F

from vlprune.method import ModelFacts
from vlprune.methods.pyramiddrop import pyramiddrop


def check(case: Case) -> str:
    """Attention of the last token in the stub's layer, then the method's own stages; indices, positions and hidden states."""
    hyper, hidden = case.hyper, case["in.hidden_states"]
    start, num_tokens = hyper["image_start"], hyper["n_image"]
    places = tuple(range(1, 1 + len(hyper["ratios"])))
    method = pyramiddrop(ModelFacts(decoder_layers=places[-1] + 1), tuple(hyper["ratios"]), layers=places)
    kept = torch.arange(num_tokens)
    for number, stage in enumerate(method.stages, start=1):
        image = slice(start, start + kept.numel())
        stay = run_stage(stage, (_last_row(case, hidden)[:, image],), num_original=num_tokens).keep_indices[0]
        kept = kept[stay]
        rows = torch.cat((torch.arange(start), stay + start, torch.arange(image.stop, hidden.shape[1])))
        hidden = hidden[:, rows]
        problem = differ(f"out.keep_indices.stage{number}", kept, case[f"out.keep_indices.stage{number}"]) or differ(
            f"out.position_ids.stage{number}", torch.arange(hidden.shape[1])[None], case[f"out.position_ids.stage{number}"]
        )
        if problem:
            return problem
    same = torch.equal(hidden, case["out.hidden_states"])
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or ("" if same else "out.hidden_states differ")


def _last_row(case: Case, hidden: Tensor) -> Tensor:
    """(1, L): attention of the last token in the stub's next layer, mean over heads; renumbered positions."""
    heads, width, length = case.hyper["num_heads"], case.hyper["head_dim"], hidden.shape[1]
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + case.hyper["rms_eps"]) * case["in.ln_weight"]
    frequency = case.hyper["rope_base"] ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
    queries, keys = (F.linear(normed, case[name]).view(1, length, heads, width).transpose(1, 2) for name in ("in.wq", "in.wk"))
    queries, keys = (x * angle.cos() + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1) * angle.sin() for x in (queries, keys))
    return (queries[:, :, -1:] @ keys.mT * width**-0.5).softmax(dim=-1).mean(dim=1)[:, 0]
