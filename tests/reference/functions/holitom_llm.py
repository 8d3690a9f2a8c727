"""HoliTom inside the LLM: last row of the layer before and hidden states in; what stays, with the others averaged in, out."""

from __future__ import annotations

import torch
from golden_case import Case, differ

from vlprune.method import ModelFacts
from vlprune.methods.holitom import holitom
from vlprune.protocols import ScoreInputs

TOLERANCE = 1e-5


def check(case: Case) -> str:
    """The method's second stage, and its count."""
    hyper = case.hyper
    start, number = hyper["image_start"], hyper["n_image"]
    image, states = slice(start, start + number), case["in.hidden_states"]
    stage = holitom(ModelFacts(decoder_layers=28), number, llm_keep=1 - hyper["r"]).stages[1]
    num_keep = stage.budget.num_keep(number)
    scores = case["in.attention_last_row"].mean(dim=1)[:, image]
    inputs = ScoreInputs(states[:, image], num_keep, num_original=number, modality="video", signals={stage.needs[0]: scores})
    selection = stage.selector(stage.scorer(inputs), inputs)
    merged = stage.reducer(inputs, selection).tokens
    assert merged is not None
    kept = selection.keep_indices[0]
    before, after = torch.arange(start), torch.arange(start + number, states.shape[1])
    sequence = torch.cat([states[:, :start], merged, states[:, start + number :]], dim=1)
    error = float((sequence - case["out.hidden_states"]).abs().max()) if sequence.shape == case["out.hidden_states"].shape else float("nan")
    return (
        differ("out.keep_indices", kept, case["out.keep_indices"])
        or differ("out.keep_positions", torch.cat([before, kept + start, after]), case["out.keep_positions"])
        or (f"out.hidden_states differ by {error:.1e}" if not error <= TOLERANCE else "")
    )
