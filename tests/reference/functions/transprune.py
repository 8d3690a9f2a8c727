"""TransPrune: token transition variation of a module, and consecutive rank-and-drop stages."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ, run_stage
from torch import Tensor
from torch.nn import functional as F

from vlprune.method import ModelFacts
from vlprune.methods.transprune import transprune
from vlprune.scorers.transition import transition_statistics, transition_variation


def check(case: Case) -> str:
    """Either kind of case."""
    return _variation(case) if "in.before" in case else _rank_and_drop(case)


def _variation(case: Case) -> str:
    statistics = transition_statistics(case["in.before"], case["in.after"])
    # The program's denominator runs over the whole batch, ours over a row: add the rows up to compare.
    magnitude, cosine, total = statistics.unbind(dim=-1)
    statistics = torch.stack((magnitude, cosine, total[:, :1].sum().expand_as(total)), dim=-1)
    return apart("out.ttv", transition_variation(statistics, "code"), case["out.ttv"], rtol=1e-5)


def _rank_and_drop(case: Case) -> str:
    hyper, hidden, recorded = case.hyper, case["in.hidden_states"], case["in.ttv_layers"]
    start, num_tokens, num_recorded = hyper["image_start"], hyper["n_image"], recorded.shape[0]
    # Places are free in this stub: all recorded layers lie before the first stage.
    places = tuple(range(num_recorded, num_recorded + len(hyper["ratios"])))
    method = transprune(
        ModelFacts(decoder_layers=places[-1] + 1), tuple(hyper["ratios"]), layers=places, accumulate=range(num_recorded)
    )
    kept = torch.arange(num_tokens)
    for number, stage in enumerate(method.stages, start=1):
        image = slice(start, start + kept.numel())
        transitions = [_as_statistics(layer[None, image]) for layer in recorded]
        attention = _instruction_attention(case, hidden, image)
        stay = run_stage(stage, (*transitions, attention), num_original=num_tokens).keep_indices[0]
        kept = kept[stay]
        rows = torch.cat((torch.arange(start), stay + start, torch.arange(image.stop, hidden.shape[1])))
        hidden, recorded = hidden[:, rows], recorded[:, rows]
        problem = differ(f"out.keep_indices.stage{number}", kept, case[f"out.keep_indices.stage{number}"])
        if problem:
            return problem
    same = torch.equal(hidden, case["out.hidden_states"])
    return differ("out.keep_indices", kept, case["out.keep_indices"]) or ("" if same else "out.hidden_states differ")


def _as_statistics(variation: Tensor) -> Tensor:
    """Statistics (1, N, 6) whose variation is the one given: m of the first module with c = z = 1, then nothing."""
    one, zero = torch.ones_like(variation), torch.zeros_like(variation)
    return torch.stack((variation, one, one, zero, one, one), dim=-1)


def _instruction_attention(case: Case, hidden: Tensor, image: slice) -> Tensor:
    """(1, N): attention of the text after the image in the stub's next layer, mean over heads and queries."""
    heads, width, length = case.hyper["num_heads"], case.hyper["head_dim"], hidden.shape[1]
    normed = (
        hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + case.hyper["rms_eps"]) * case["in.ln_weight"]
    )
    frequency = case.hyper["rope_base"] ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)  # (L, d), renumbered positions
    queries, keys = (
        F.linear(normed, case[name]).view(1, length, heads, width).transpose(1, 2) for name in ("in.wq", "in.wk")
    )
    queries, keys = (
        x * angle.cos() + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1) * angle.sin()
        for x in (queries, keys)
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    attention = (queries @ keys.mT * width**-0.5).masked_fill(~causal, -torch.inf).softmax(dim=-1)  # (1, H, L, L)
    return attention[:, :, image.stop :, image].mean(dim=(1, 2))
