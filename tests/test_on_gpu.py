"""On a CUDA device, over every method: the same choice as on the CPU, nothing read back between the layers, and a model that comes back bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import vlprune
from tests.oracle import decoder_of
from tests.tiny import families
from tests.tiny_text import text_families
from vlprune.errors import MissingSignalError, UnsupportedModelError, UnsupportedPointError
from vlprune.pruner import Session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VISUAL = [(method, family) for method in vlprune.list_methods("visual") if method != "dense" for family in ("llava", "qwen2_5_vl")]
TEXT = [(method, "llama") for method in [*vlprune.list_methods("text"), *vlprune.list_methods("all")] if method != "dense"]


def put_on(model: Any, method: str) -> Any:
    try:
        return vlprune.apply(model, method, keep=0.5, **vlprune.get_method(method).test_options)
    except (MissingSignalError, UnsupportedPointError, UnsupportedModelError) as error:
        pytest.skip(f"declared: {error}")


def example(method: str, family: str) -> tuple[Any, dict[str, Any]]:
    tiny = {**families(), **text_families()}[family]
    card = vlprune.get_method(method)
    modality = card.modality if card.modality != "any" else "image"
    if card.tokens == "visual" and modality not in tiny.modalities:
        pytest.skip(f"{method} declares modality {card.modality!r}")
    rows = [[3, modality, 4], [6, modality, 2]] if tiny.modalities else [[9], [12]]
    return tiny.build(), tiny.prompt(rows)


def before_the_first_layer(function: Any) -> Any:
    """What a tower dropped is read once as the decoder begins, which is said where it is done."""

    def quiet(*args: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return quiet


@pytest.mark.parametrize(("method", "family"), [*VISUAL, *TEXT])
def test_as_on_the_cpu(method: str, family: str) -> None:
    """Logits of the prompt and of a decoded token agree with the CPU's, so the same tokens stayed; behind ``remove`` the model is what it was."""
    model, prompt = example(method, family)
    asked = {"use_cache": True, "logits_to_keep": 1}
    there = {key: value.cuda() for key, value in prompt.items()}
    with torch.no_grad():
        with put_on(model, method):
            expected = model(**prompt, **asked).logits
        model.cuda()
        dense = model(**there, **asked).logits
        with put_on(model, method):
            out = model(**there, **asked)
            tokens = model.generate(**there, max_new_tokens=4, do_sample=False)
        again = model(**there, **asked).logits
    torch.testing.assert_close(out.logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert tokens.shape[1] == prompt["input_ids"].shape[1] + 4
    assert torch.equal(again, dense)


@pytest.mark.parametrize(("method", "family"), [pair for pair in [*VISUAL, *TEXT] if not vlprune.get_method(pair[0]).adaptive])
def test_nothing_waits_for_the_device(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself tells what would wait for it between the first and the last layer of a prompt; the second prompt counts, behind one-time set-up."""
    model, prompt = example(method, family)
    model.cuda()
    there = {key: value.cuda() for key, value in prompt.items()}
    layers = decoder_of(model).layers
    monkeypatch.setattr(Session, "_check_finite", lambda *args: None)    # reads behind the last layer
    monkeypatch.setattr(Session, "leave_tower", before_the_first_layer(Session.leave_tower))
    with put_on(model, method), torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        model(**there, use_cache=True)
        first = layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("warn"), prepend=True)
        last = layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
        try:
            warnings.simplefilter("always")
            seen.clear()
            model(**there, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            first.remove()
            last.remove()
    found = [f"{one.filename}:{one.lineno}" for one in seen if "called a synchronizing" in str(one.message)]
    assert not found, "\n".join(found)
