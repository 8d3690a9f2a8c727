"""HoliTom before the LLM: the windows, what stays of moving and of still tokens, and the whole with the program's order."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ, grid_of
from torch import Tensor

from vlprune.kernels.windows import best_windows, extents, still_gains
from vlprune.method import ModelFacts, Stage
from vlprune.methods.holitom import holitom
from vlprune.protocols import ScoreInputs
from vlprune.selectors.still_and_moving import StillAndMoving

TOLERANCE = 1e-5
FACTS = ModelFacts(decoder_layers=28, vision_layers=27, feature_layer=26)


def check(case: Case) -> str:
    """Any of the four kinds."""
    if "in.feature_sim" in case:
        gains = still_gains((case["in.feature_sim"] > case.hyper["tau"])[None])
        return _windows(case, best_windows(gains, case.hyper["max_window_size"]), gains)
    if "in.frames" in case:
        return _whole(case)
    return _still(case) if "in.pos" in case else _moving(case)


def _windows(case: Case, starts: Tensor, gains: Tensor) -> str:
    first, last = extents(starts)
    windows = torch.stack([first[starts], last[starts]], dim=1)
    reduced = gains[0, windows[:, 0], windows[:, 1]].sum().float()
    return differ("out.windows", windows, case["out.windows"]) or apart("out.reduced", reduced, case["out.reduced"], 0.0)


def _run(stage: Stage, frames: Tensor, attention: Tensor, number: int, side: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Kept indices, roles, tokens of one video (T, n, D)."""
    inputs = ScoreInputs(
        frames.flatten(0, 1)[None], number, grid_of(frames.shape[0], *side), modality="video", signals={stage.needs[0]: attention.flatten()[None]}
    )
    selection = stage.selector(stage.scorer(inputs), inputs)
    merged = stage.reducer(inputs, selection).tokens
    assert selection.roles is not None
    assert merged is not None
    return selection.keep_indices[0], selection.roles[0], merged[0]


def _moving(case: Case) -> str:
    """Frames in which nothing stands still: every window is a single frame."""
    frames = case["in.features"]
    count, each, _ = frames.shape
    want = case["out.keep_indices"]
    stage = holitom(FACTS, want.numel(), threshold=1.0).stages[0]
    kept, _, tokens = _run(stage, frames, case["in.attention"], want.numel(), (1, each))
    problem = differ("out.keep_indices", kept.reshape(count, -1) - each * torch.arange(count)[:, None], want)
    return problem or _close("out.tokens", tokens.reshape(count, want.shape[1], -1), case["out.tokens"])


def _still(case: Case) -> str:
    """The same frame twice: one window in which everything stands still."""
    hyper, frame = case.hyper, case["in.features"]
    each, number = frame.shape[1], case["out.keep_indices"].numel()
    if number != round(each * hyper["retain_ratio"]):
        return f"{number} tokens, expected {round(each * hyper['retain_ratio'])}"
    stage = holitom(FACTS, number, beta=0.0 if hyper["NO_BETA"] else hyper["Beta"]).stages[0]
    assert isinstance(stage.selector, StillAndMoving)
    if stage.selector.neighbours != hyper["K"]:
        return f"{stage.selector.neighbours} neighbours, expected {hyper['K']}"
    kept, roles, tokens = _run(stage, frame.expand(2, -1, -1), torch.zeros(2, each), number, (1, each))
    if not bool(roles.all()):
        return "moving tokens where all stand still"
    problem = differ("out.keep_indices", kept[None], case["out.keep_indices"]) or differ("out.pos", case["in.pos"][0, kept][None], case["out.pos"])
    return problem or _close("out.tokens", tokens[None], case["out.tokens"])


def _whole(case: Case) -> str:
    hyper, frames = case.hyper, case["in.frames"]
    count, each, _ = frames.shape
    side = round(each**0.5)
    number = case["out.tokens"].shape[0]
    stage = holitom(FACTS, number, threshold=hyper["tau"], beta=hyper["Beta"]).stages[0]
    kept, roles, tokens = _run(stage, frames, case["in.attention"], number, (side, side))
    assert isinstance(stage.selector, StillAndMoving)
    starts, _ = stage.selector.cutting(frames[None], torch.ones(1, count, each, dtype=torch.bool))
    alike = torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1) > hyper["tau"]
    problem = _windows(case, starts, still_gains(alike[None]))
    window = starts[0].long().cumsum(dim=0)[kept // each] - 1
    per_window = torch.zeros_like(case["out.tokens_per_window"]).scatter_add(0, window, torch.ones_like(window))
    order = (window * 2 + (1 - roles)).argsort(stable=True)             # still ones of a window first
    return problem or differ("out.tokens_per_window", per_window, case["out.tokens_per_window"]) or _close("out.tokens", tokens[order], case["out.tokens"])


def _close(name: str, got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    return "" if torch.allclose(got, want, rtol=0.0, atol=TOLERANCE) else f"{name} differ by {float((got - want).abs().max()):.1e}"
