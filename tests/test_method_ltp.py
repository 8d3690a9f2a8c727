"""LTP: the signal it reads against the eager map, the hard choice as the limit of the soft one, thresholds that are kept, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import hidden_columns, snapshot
from tests.test_text_laws import backend
from tests.tiny_text import text_families
from vlprune.budget import Budget
from vlprune.errors import OptionError
from vlprune.method import ModelFacts, PruningMethod, Stage
from vlprune.points import LLMLayer
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK
from vlprune.selectors.above import Above
from vlprune.skipping.soft_thresholds import SoftThresholds, load_thresholds, save_thresholds

THRESHOLDS = {"mean": 1.0, "max": 0.3, "absolute": 0.05}


@pytest.mark.parametrize("how", ["sum", "mean", "seen"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_signal_is_the_column_of_the_eager_map(family: str, how: str) -> None:
    """Padding neither asks nor is counted."""
    tiny = text_families()[family]
    model, inputs = tiny.build("eager"), tiny.prompt([[23], [14]])
    found: list[Tensor] = []

    class Look:
        needs = (Tap("received", 1, (how,)),)

        def __call__(self, given: ScoreInputs) -> Tensor:
            found.append(given.signal(self.needs[0]))
            return found[-1]

    with torch.no_grad(), vlprune.apply(model, PruningMethod("look", (Stage(LLMLayer(2), Look(), TopK(), Drop(), Budget(0.5), tokens="text"),))):
        model(**inputs)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1].mean(dim=1)
    for row, values in enumerate(found):
        real = inputs["attention_mask"][row].nonzero().flatten()
        expected, count = maps[row][real][:, real].sum(dim=0), real.numel()
        expected = expected / (count if how == "mean" else count - torch.arange(count) if how == "seen" else 1)
        torch.testing.assert_close(values[0], expected[1:-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per", ["seen", "all"])
@pytest.mark.parametrize("rule", sorted(THRESHOLDS))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_hard_choice_is_the_limit_of_the_soft_one(family: str, rule: str, per: str) -> None:
    """At a temperature near zero the kept rows agree, windows and padding among them; at a higher one every threshold but the last has a gradient."""
    tiny = text_families()[family]
    model, inputs = tiny.build(backend(tiny)), tiny.prompt([[23], [14]])
    state, threshold = snapshot(model), THRESHOLDS[rule]
    with torch.no_grad(), vlprune.apply(model, "ltp", keep=1, threshold=threshold, rule=rule, per=per) as handle:
        hard = model(**inputs, use_cache=False).logits
        gone = hidden_columns(handle.trace, 4)[-1]
    soft = SoftThresholds(4, threshold, rule, per, temperature=1e-7)
    with soft.on(model), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    stays = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[stays], hard[stays], rtol=1e-4, atol=2e-4)
    assert bool(gone.any()) or (family, rule, per) == ("mistral", "absolute", "seen"), "nothing left: the test shows nothing"
    warm = SoftThresholds(4, threshold, rule, per, temperature=0.5)
    with warm.on(model):
        (model(**inputs, use_cache=False).logits.square().mean() + warm.kept()).backward()
    assert warm.theta.grad is not None
    assert (warm.theta.grad != 0).tolist() == [True, True, True, False]
    model.zero_grad()
    assert snapshot(model) == state


def test_thresholds_rise_and_are_kept(tmp_path: Path) -> None:
    facts = ModelFacts(decoder_layers=12, token_sets=("text", "all"))
    stages = vlprune.get_method("ltp").build(facts, 0.3, threshold=0.12, rule="absolute").stages
    cuts = [stage.selector.threshold for stage in stages]                # type: ignore[attr-defined]
    assert cuts == pytest.approx([0.01 * number for number in range(1, 12)])
    assert [stage.needs[0].layer for stage in stages] == list(range(11)), "each looks at the layer below"
    tiny = vlprune.get_method("ltp").build(facts, 0.3, threshold=1e-9, rule="absolute").stages[0].selector
    assert tiny.threshold == 1e-5                                        # type: ignore[attr-defined]
    path = save_thresholds([0.5] * 12, tmp_path / "thresholds.safetensors")
    assert load_thresholds(path) == [0.5] * 12
    again = vlprune.get_method("ltp").build(facts, 0.3, thresholds=path, layers=[4, 8]).stages
    assert [(stage.point.layer, stage.selector.threshold) for stage in again] == [(4, 0.5), (8, 0.5)]  # type: ignore[attr-defined]


def test_the_report_says_how_many_stayed() -> None:
    """More than the floor where attention is spread, the floor where nothing reaches the threshold."""
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt([[40]])
    for threshold, expected in ((1e-3, 40), (100.0, 10)):
        with torch.no_grad(), vlprune.apply(model, "ltp", keep=10, threshold=threshold) as handle:
            model(**inputs)
            assert handle.report().points[-1].visual_kept == expected
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.2]])
    kept = Above(0.25)(scores, ScoreInputs(torch.zeros(1, 4, 2), 1)).keep_indices
    assert kept.tolist() == [[1, 2]]
    assert Above(0.9)(scores, ScoreInputs(torch.zeros(1, 4, 2), 3)).keep_indices.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "least"}, "rule='least'"), ({"per": "some"}, "per='some'"), ({"threshold": 0}, "above 0"), ({"thresholds": [0.1]}, "1 numbers"),
        ({"layers": [0]}, "from 1 to"), ({"thresholds": "no.safetensors"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        vlprune.get_method("ltp").build(ModelFacts(decoder_layers=4, token_sets=("text", "all")), 0.5, **options)


def test_soft_thresholds_say_what_is_wrong() -> None:
    with pytest.raises(OptionError, match="temperature=0"):
        SoftThresholds(4, temperature=0)
    with pytest.raises(OptionError, match="3 thresholds, and this model has 4"), SoftThresholds(3).on(text_families()["llama"].build()):
        pass
    with pytest.raises(OptionError, match="no prompt has run"):
        SoftThresholds(4).kept()
