"""PruMerge and PruMerge+: queries, keys and states of the last two blocks in; kept patches and merged tokens out."""

from __future__ import annotations

import torch
from golden_case import Case, differ
from torch import Tensor

from vlprune.method import ModelFacts, Stage
from vlprune.methods.prumerge import prumerge
from vlprune.methods.prumerge_plus import prumerge_plus
from vlprune.protocols import ScoreInputs, Selection, Tap

TOLERANCE = 2e-4
FACTS = ModelFacts(vision_layers=24, feature_layer=22, has_cls=True)


def check(case: Case) -> str:
    """The method's own stage, item by item where the data say how many; ours is in reading order with the summary in a place of its own."""
    queries, keys, states = case["in.q"], case["in.k"], case["in.hidden_states"]
    row = (queries[:, :1] @ keys.mT * queries.shape[-1] ** -0.5).softmax(dim=-1)[:, 0, 1:]
    if not torch.allclose(row, case["out.cls_attention"], atol=1e-6):
        return "out.cls_attention differs"
    method = prumerge_plus if case.hyper["function"].endswith("plus") else prumerge
    adaptive = case.hyper["if_adaptive"]
    (stage,) = method(FACTS, "auto" if adaptive else case["out.tokens"].shape[1]).stages
    for item in range(states.shape[0]):
        one = slice(item, item + 1)
        signals = {Tap("cls_row_wide", 23): row[one], Tap("vision_keys_all", 23): keys[one, 1:], Tap("vision_states", 22): states[one, 1:]}
        inputs = ScoreInputs(
            tokens=states[one, 1:] * torch.nan, num_keep=case["out.tokens"].shape[1], num_original=row.shape[1], signals=signals, project=lambda x: x
        )
        problem = _check_item(case, stage, inputs, item)
        if problem:
            return problem
    return ""


def method_of(case: Case) -> str:
    """The folder holds cases of both methods."""
    return "prumerge+" if case.hyper["function"].endswith("plus") else "prumerge"


def _check_item(case: Case, stage: Stage, inputs: ScoreInputs, item: int) -> str:
    selection = stage.selector(stage.scorer(inputs).float(), inputs)
    tokens = stage.reducer(inputs, selection).tokens
    assert tokens is not None
    kept, summary, merged = _apart(selection, tokens)
    want = case["out.tokens"][item]
    order = case["out.order_indices"][item].argsort()
    error = max(float((merged - want[:-1][order]).abs().max()), float((summary - want[-1]).abs().max()))
    return differ("out.keep_indices", kept, case["out.keep_indices"][item]) or (f"out.tokens differ by {error:.2e}" if not error <= TOLERANCE else "")


def _apart(selection: Selection, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept indices, the summary's features, the kept tokens' features of one item."""
    assert selection.roles is not None
    is_summary = selection.roles[0] == 2
    return selection.keep_indices[0][~is_summary], tokens[0][is_summary][0], tokens[0][~is_summary]
