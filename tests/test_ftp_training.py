"""Training of FTP's router: the relaxed forward against the pruned one, the losses, and the script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import snapshot
from tests.test_text_laws import TOLERANCE
from tests.tiny_text import text_families
from vlprune.adapter import find_adapter
from vlprune.errors import OptionError
from vlprune.plan import Plan, fingerprint, save_plan
from vlprune.scorers.token_router import TokenRouter, load_router
from vlprune.skipping import router_training as losses

FAMILIES = sorted(name for name, family in text_families().items() if not family.modalities)
PROMPT, LENGTH = 14, 20


def texts(tiny: Any) -> Tensor:
    return tiny.prompt([[LENGTH], [LENGTH]])["input_ids"]  # type: ignore[no-any-return]


def drawn_logits(layers: tuple[int, ...], keep: int) -> dict[int, Tensor]:
    """1e6 for ``keep`` of the tokens between the first and the last, -1e6 for the others; other tokens in each layer and row."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for layer in layers:
        best = torch.rand(2, PROMPT - 2, generator=generator).topk(keep, dim=1).indices
        found[layer] = torch.full((2, PROMPT - 2), -1e6).scatter(1, best, 1e6)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_or_nothing_the_relaxed_forward_is_the_pruned_one(family: str, attention: str) -> None:
    """Shares of 0 and 1 only, so what is trained is what runs later; with nothing but ones it is the untouched model."""
    tiny = text_families()[family]
    if attention == "sdpa" and family == "gemma2":
        pytest.skip("transformers: Gemma 2 has no sdpa, for its soft cap")
    model = tiny.build(attention)
    ids, before = texts(tiny), snapshot(model)
    logits = drawn_logits((1, 2, 3), 5)
    asked = iter(logits.values())
    with torch.no_grad():
        relaxed = losses.relaxed_logits(model, ids, logits, PROMPT, 0.5)
        whole = losses.relaxed_logits(model, ids, {layer: one.abs() for layer, one in logits.items()}, PROMPT, 0.5)
        assert snapshot(model) == before
        torch.testing.assert_close(whole, model(input_ids=ids).logits, **TOLERANCE)  # type: ignore[operator]
        with vlprune.apply(model, "ftp", keep=7, start=1, ranking=lambda inputs: next(asked)):
            first = model(input_ids=ids[:, :PROMPT], use_cache=True)  # type: ignore[operator]
            rest = model(input_ids=ids[:, PROMPT:], past_key_values=first.past_key_values)  # type: ignore[operator]
    torch.testing.assert_close(relaxed[:, PROMPT - 1], first.logits[:, -1], **TOLERANCE)
    torch.testing.assert_close(relaxed[:, PROMPT:], rest.logits, **TOLERANCE)
    assert not torch.allclose(relaxed[:, PROMPT:], whole[:, PROMPT:], **TOLERANCE)


def test_features_are_those_at_work() -> None:
    """What the router meets in each block, with the model left as it was and the router unchanged."""
    tiny = text_families()["llama"]
    model, router = tiny.build(), TokenRouter()
    ids, before, weights = texts(tiny), snapshot(model), {name: value.clone() for name, value in router.state_dict().items()}
    features = losses.recorded(model, router, ids[:, :PROMPT], 7, None)
    budgets = losses.recorded(model, router, ids[:, :PROMPT], 0.5, [1.0, 0.5, 1.0, 0.25])
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in router.state_dict().items())
    assert list(features) == [1, 2, 3]
    assert list(budgets) == [1, 3]
    for given in features.values():
        assert given.shape == (2, PROMPT - 2, 4)
        torch.testing.assert_close(given[0, :, 0], torch.linspace(0, 1, PROMPT - 2))
        assert float(given[0, 0, 3]) == pytest.approx(1 - 5 / 12)
    assert float(budgets[3][0, 0, 3]) > float(budgets[1][0, 0, 3])


def test_losses_by_hand() -> None:
    """The mean of two masks, a share that is over or under the budget, and no distance from itself."""
    features = torch.zeros(1, 4, 4)
    features[0, :, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    features[0, :, 1] = torch.tensor([9.0, 1.0, 2.0, 8.0])
    features[..., 3] = 0.5
    assert losses.wanted(features, "static").tolist() == [[0, 0, 1, 1]]
    assert losses.wanted(features, "attention").tolist() == [[1, 0, 0, 1]]
    assert losses.wanted(features, "both").tolist() == [[0.5, 0, 0.5, 1]]
    given, over, under = {2: features}, {2: torch.full((1, 4), 2.0)}, {2: torch.full((1, 4), -2.0)}
    share = 1 / (1 + torch.tensor(-2.0).exp())
    assert float(losses.sparsity_loss(over, given)) == pytest.approx(float(share) - 0.5)
    assert float(losses.sparsity_loss(under, given)) == 0
    right = {2: torch.tensor([[-9.0, -9.0, 9.0, 9.0]])}
    assert float(losses.guide_loss(right, given, "static")) < 1e-3 < float(losses.guide_loss(over, given, "static"))
    logits = torch.randn(2, 3, 5)
    assert float(losses.distillation_loss(logits, logits)) == pytest.approx(0, abs=1e-6)
    two = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    assert float(losses.distillation_loss(two[0][None], two[1][None])) == pytest.approx(0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log())


def test_only_the_router_learns() -> None:
    """Gradients of each loss reach it, through the noise, and nothing else."""
    tiny = text_families()["llama"]
    model, router = tiny.build().requires_grad_(False), TokenRouter()
    ids = texts(tiny)
    features = losses.recorded(model, router, ids[:, :PROMPT], 7, None)
    dense = model(input_ids=ids).logits[:, PROMPT:]  # type: ignore[operator]
    for which in ("distillation", "sparsity", "guide"):
        router.zero_grad()
        logits = {layer: router(given) + 3.0 for layer, given in features.items()}  # above every budget
        if which == "distillation":
            relaxed = losses.relaxed_logits(model, ids, logits, PROMPT, 0.5, torch.Generator().manual_seed(0))
            losses.distillation_loss(dense, relaxed[:, PROMPT:]).backward()
        else:
            {"sparsity": losses.sparsity_loss, "guide": losses.guide_loss}[which](logits, features).backward()
        for name, weight in router.named_parameters():
            assert weight.grad is not None, (which, name)
            assert torch.isfinite(weight.grad).all(), (which, name)
            assert float(weight.grad.abs().sum()) > 0, (which, name)
    assert all(weight.grad is None for weight in model.parameters())


def test_attention_that_takes_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = text_families()["llama"]
    model = tiny.build()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(OptionError, match="'sdpa' or 'eager'"):
        losses.relaxed_logits(model, texts(tiny), {}, PROMPT, 0.5)


def test_the_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on the embedded model, stopped and gone on with; the loss falls and everything is written; then a model from a folder, and a plan."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    import train_ftp_router as script

    work = tmp_path / "recall"
    common = ["--work", str(work), "--length", "96", "--batch", "2", "--n", "2", "--every", "2"]
    monkeypatch.setattr(script.text_quality, "CONTEXT", 24)
    monkeypatch.setattr(script.text_quality, "PROMPT", 12)
    script.main([*common, "--steps", "4"])
    first = load_router(work / "router.safetensors")
    script.main([*common, "--steps", "20"])
    second = load_router(work / "router.safetensors")
    assert not torch.equal(first.net[0].weight, second.net[0].weight)
    written = json.loads((work / "results.json").read_text())
    assert [point["step"] for point in written["curve"]] == list(range(2, 21, 2))
    assert [row["what"] for row in written["rows"]] == ["dense", "random", "static", "attention", "router"]
    assert {row["kv share"] for row in written["rows"][1:]} == {0.5}
    model, texts = script.load(script.ASSETS), script.asked_texts(2, 96)
    features = losses.recorded(model, second, texts(50)[0][:, : texts(50)[1]], 0.5, None)
    with torch.no_grad():
        before, after = (float(losses.guide_loss({layer: router(one) for layer, one in features.items()}, features)) for router in (TokenRouter(), second))
    assert after < before

    tiny = text_families()["llama"]
    small = tiny.build()
    small.save_pretrained(tmp_path / "model")
    made_for = fingerprint(small, find_adapter(small).facts)
    plan = save_plan(Plan("ftp", 0.5, made_for, {"budgets": [1.0, 0.5, 0.25, 0.25]}), tmp_path / "plan.json")
    told = ["--model", str(tmp_path / "model"), "--work", str(tmp_path / "told"), "--steps", "1", "--n", "2", "--stories", "2", "--batch", "2"]
    script.main([*told, "--plan", str(plan)])
    rows = json.loads((tmp_path / "told" / "results.json").read_text())["rows"]
    assert rows[0]["agreement"] == 1.0
    with vlprune.apply(small, "ftp", keep=0.5, router=tmp_path / "told" / "router.safetensors"):
        small(**tiny.prompt([[20]]))  # type: ignore[operator]
    with pytest.raises(OptionError, match="made for another model"):
        script.main([*common, "--plan", str(plan)])
