"""SparseVLM: raters, scores, kept tokens and recycling of one layer; the choice of heads; the clustering."""

from __future__ import annotations

import torch
from golden_case import Case, differ
from torch import Tensor

from vlprune.adapters._decoder_taps import rater_rows_plus, text_raters
from vlprune.kernels.recycling import density_peaks, num_clustered, recycle
from vlprune.method import ModelFacts
from vlprune.methods.sparsevlm import LISTS, sparsevlm
from vlprune.protocols import ScoreInputs

FACTS = ModelFacts(decoder_layers=32)
LAYER_AFTER = {2: 0, 6: 1, 15: 2}


def check(case: Case) -> str:
    """Any of the three kinds."""
    if "in.tokens" in case:
        return _clusters(case)
    return _stage(case) if "in.embeds" in case else _heads(case)


def _stage(case: Case) -> str:
    hyper = case.hyper
    start, number, variant = hyper["v_token_start"], hyper["n_image"], f"v{hyper['version'][0]}"
    image, text = slice(start, start + number), slice(start + number, None)
    embeds, attention = case["in.embeds"], case["in.attention"]
    raters = text_raters(embeds[:, image], embeds[:, text], torch.ones_like(embeds[:, text, 0], dtype=torch.bool))[0]
    problem = differ("out.rater_index", raters.nonzero().flatten(), case["out.rater_index"])
    if problem:
        return problem
    scores = attention.mean(dim=1)[:, text, image][:, raters].mean(dim=1)
    if not torch.allclose(scores, case["out.scores"], rtol=1e-5, atol=0.0):
        return "out.scores differ"
    listed = min(LISTS[variant][hyper["retain"]][LAYER_AFTER[hyper["layer"]]], number - 1)
    pooled, clusters = num_clustered(number - listed)
    stage = sparsevlm(FACTS, (number - 1,) * 3, variant=variant, **({"appended": True} if variant == "v1" else {})).stages[0]
    num_keep = listed if variant == "v2" else listed + clusters
    tokens = case["in.layer_output"][:, image]
    inputs = ScoreInputs(tokens, num_keep, num_original=number, signals={stage.needs[0]: scores})
    selection = stage.selector(stage.scorer(inputs), inputs)
    kept = selection.keep_indices[0] if selection.roles is None else selection.keep_indices[0, selection.roles[0] == 0]
    mask = torch.zeros(number, dtype=torch.uint8)
    mask[kept] = 1
    problem = differ("out.keep_indices", kept, case["out.keep_indices"]) or differ("out.keep_mask", mask[None], case["out.keep_mask"])
    if problem or variant == "v2":
        return problem
    if (clusters, pooled) != (hyper["clusters"], recycle(scores, tokens, num_keep).pool.shape[1]):
        return f"{pooled} tokens into {clusters} clusters, expected {hyper['clusters']}"
    reduced = stage.reducer(inputs, selection).tokens
    assert reduced is not None
    return _close("out.recycled_sequence", _around(case, reduced, start, number), case["out.recycled_sequence"])


def _around(case: Case, visual: Tensor, start: int, number: int) -> Tensor:
    states = case["in.layer_output"]
    return torch.cat([states[:, :start], visual, states[:, start + number :]], dim=1)


def _heads(case: Case) -> str:
    """Without positions (a response of one) the score is the mean over the heads that look at the picture most."""
    start, number, text = case.hyper["v_token_start"], case.hyper["n_image"], case.hyper["n_text"]
    rows, columns = slice(start + number, start + number + text), slice(start, start + number)
    weights = torch.zeros(1, text)
    weights[0, case["in.rater_absolute_index"] - rows.start] = 1 / case["in.rater_absolute_index"].numel()
    got = rater_rows_plus(case["in.attention"][:, :, rows, columns], weights, torch.ones(1, text, number), 14)
    want = case["out.head_mean_attention"][0, case["in.rater_absolute_index"], columns].mean(dim=0)[None]
    return _close("mean over out.head_index_score_order", got, want)


def _clusters(case: Case) -> str:
    """The clusters' means, in the order of their centres."""
    tokens, clusters = case["in.tokens"], case.hyper["cluster_num"]
    _, owner = density_peaks(tokens, clusters, clusters)
    member = torch.nn.functional.one_hot(owner, clusters).to(tokens.dtype)               # (B, N, c)
    return _close("out.merged", member.mT @ tokens / member.sum(dim=1)[..., None], case["out.merged"])


def _close(name: str, got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    return "" if torch.allclose(got, want, rtol=1e-4, atol=1e-5) else f"{name}: largest difference {(got - want).abs().max():.2e}"
