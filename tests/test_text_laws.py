"""The laws of the engine for text: every registered method that reduces text, x every text-only decoder and two families with pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from tests.oracle import decoder_of, snapshot
from tests.test_no_sync import Watch, on_the_host
from tests.text_oracle import Notes, long_forward, what_ran
from tests.tiny import IMAGE, VIDEO, TinyFamily
from tests.tiny_text import text_families
from vlprune.adapter import find_adapter
from vlprune.api import build_method
from vlprune.errors import MissingSignalError, UnsupportedCallError, UnsupportedPointError
from vlprune.pruner import Session
from vlprune.tokens import TokenLayout

METHODS = [name for name in vlprune.list_methods() if vlprune.get_method(name).tokens != "visual"]
FAMILIES = sorted(text_families())
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
STEPS = 5


def prompts(family: TinyFamily) -> list[list[Any]]:
    """Rows of different lengths; with pictures where the family sees."""
    return [[3, "image", 9], [17]] if family.modalities else [[23], [14]]


def backend(family: TinyFamily) -> str:
    """Soft-capped logits need the eager backend."""
    return "eager" if family.name == "gemma2" else "sdpa"


def build(name: str, model: torch.nn.Module, keep: Any = 0.6, **options: Any) -> vlprune.PruningMethod:
    card = vlprune.get_method(name)
    return build_method(card, find_adapter(model).facts, keep, {**card.test_options, **options})[0]


def applied(model: torch.nn.Module, method: Any, **options: Any) -> vlprune.PruneHandle:
    """Apply, or skip where the family declares that it lacks a signal or a point."""
    try:
        return vlprune.apply(model, method, **options)
    except (MissingSignalError, UnsupportedPointError) as error:
        pytest.skip(f"declared: {error}")


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO]}
    with torch.no_grad():
        return model.generate(**inputs, **{**options, **kwargs})


def longer(family: TinyFamily, model: Any, inputs: dict[str, torch.Tensor], new: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The prompt and what was generated as one prompt, with positions as generation counts them."""
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], 1)}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    for types in ("mm_token_type_ids", "token_type_ids"):
        if types in whole:
            whole[types] = torch.cat([whole[types], torch.full_like(new, family.generated_type)], 1)
    adapter: Any = find_adapter(model)
    return whole, {} if adapter.multimodal_rope else {"position_ids": (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def check_one_long_forward(family: TinyFamily, model: Any, method: vlprune.PruningMethod, rows: list[list[Any]]) -> Any:
    inputs, notes, depth = family.prompt(rows), Notes(), len(decoder_of(model).layers)  # type: ignore[arg-type]
    with applied(model, notes.on(method)) as handle:
        out = generate(model, inputs)
        trace = handle.trace
        str(handle.report())
    start = inputs["input_ids"].shape[1]
    new = out.sequences[:, start:-1]
    whole, kwargs = longer(family, model, inputs, new)
    ran, hidden = what_ran(method, trace, notes, tuple(inputs["input_ids"].shape), new.shape[1], depth)
    copies = {part.layer for part in (*method.bypasses, *method.layer_skips) if part.kv == "copy_prev_layer"}
    expected = long_forward(model, whole, ran, hidden, copies, notes.heads, **kwargs)[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)
    plain = long_forward(model, whole, {key: torch.ones_like(runs) for key, runs in ran.items()}, [torch.zeros_like(h) for h in hidden], set(), **kwargs)
    assert not torch.allclose(expected, plain[:, start - 1 :], atol=1e-3), "nothing was skipped: the test shows nothing"
    return handle


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_prefill_and_decode_equal_one_long_forward(method: str, family: str, padding: str) -> None:
    """Laws 1 and 3, for what leaves, what passes by, and layers that are skipped."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    rows = prompts(tiny)
    check_one_long_forward(tiny, model, build(method, model), rows[:1] if padding == "none" else rows)


@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_all_is_the_untouched_model(method: str, family: str, keep: Any) -> None:
    """Law 2, bit for bit, while decoding too; and `remove` restores the model (law 5)."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    inputs = tiny.prompt(prompts(tiny))
    before = generate(model, inputs)
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)                       # transformers installs hooks of its own on first use
    state = snapshot(model)
    with applied(model, build(method, model, keep)):
        assert torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(before.logits))
    with applied(model, build(method, model)):
        out = generate(model, inputs)
        assert not torch.equal(torch.stack(out.logits), torch.stack(before.logits))
        with torch.no_grad():
            full = model(**inputs, output_hidden_states=True)
        assert full.logits.shape[:2] == inputs["input_ids"].shape
        assert {tuple(states.shape[:2]) for states in full.hidden_states} == {tuple(inputs["input_ids"].shape)}
    assert snapshot(model) == state
    assert torch.equal(torch.stack(generate(model, inputs).logits), torch.stack(before.logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_batch_equals_the_row_alone(method: str, family: str) -> None:
    """Law 4: padding and the other rows change nothing, in the prompt and while decoding."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    rows = prompts(tiny)
    with applied(model, build(method, model)):
        together = generate(model, tiny.prompt(rows))
        for number, row in enumerate(rows):
            alone = generate(model, tiny.prompt([row], row_numbers=[number]))
            torch.testing.assert_close(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_leaves_nothing_behind(method: str, family: str) -> None:
    """Law 5, and the next call works; the same call gives the same answer (law 6)."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    inputs = tiny.prompt(prompts(tiny))
    generate(model, inputs)
    state = snapshot(model)
    handle = applied(model, build(method, model))
    first = torch.stack(generate(model, inputs).logits)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    bomb = decoder_of(model).layers[3].mlp.register_forward_hook(fail)  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(model, inputs)
    bomb.remove()
    assert torch.equal(torch.stack(generate(model, inputs).logits), first)
    handle.remove()
    assert snapshot(model) == state


@pytest.mark.parametrize("family", ["llama", "mistral", "llava"])
@pytest.mark.parametrize("method", METHODS)
def test_beams_on_a_batch_equal_beams_on_each_row(method: str, family: str) -> None:
    tiny = text_families()[family]
    model = tiny.build()
    rows = prompts(tiny)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    with applied(model, build(method, model)):
        both = generate(model, tiny.prompt(rows), **options).sequences
        for number, row in enumerate(rows):
            alone = generate(model, tiny.prompt([row], row_numbers=[number]), **options).sequences
            assert torch.equal(both[2 * number : 2 * number + 2, -STEPS:], alone[:, -STEPS:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_turn_is_right_or_refused(method: str, family: str) -> None:
    """After decoding, more text on the same cache: refused where keys are missing, else the same as before from an equal cache."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    inputs = tiny.prompt(prompts(tiny)[:1])
    built = build(method, model)
    more = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with applied(model, built), torch.no_grad():
        out = generate(model, inputs)
        if any(skip.kv == "active_only" for skip in built.layer_skips):
            with pytest.raises(UnsupportedCallError, match=r"second turn|copy_prev_layer"):
                model(input_ids=more, past_key_values=out.past_key_values)
            return
        logits = model(input_ids=more, past_key_values=out.past_key_values).logits
        again = generate(model, inputs)
        assert torch.equal(model(input_ids=more, past_key_values=again.past_key_values).logits, logits)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("kv", ["project_only", "copy_prev_layer"])
@pytest.mark.parametrize("method", ["skipdecode", "unified_layer_skip"])
def test_a_second_turn_after_skipped_layers_equals_one_long_forward(method: str, kv: str) -> None:
    """Layers that wrote keys for what skipped them may run again: in prompt, decoding, and a second turn the long forward agrees."""
    tiny = text_families()["qwen3"]
    model = tiny.build()
    inputs, more = tiny.prompt([[19]]), torch.tensor([[5, 6, 7, 8, 9, 10]])
    built, start = build(method, model, 0.5, kv=kv), 19
    with vlprune.apply(model, built), torch.no_grad():
        out = generate(model, inputs)
        second = model(input_ids=more, past_key_values=out.past_key_values).logits
    new = out.sequences[:, start:-1]                                     # the last token was never given to the model
    whole = torch.cat([inputs["input_ids"], new, more], 1)
    ran, hidden = what_ran(built, None, Notes(), (1, start), whole.shape[1] - start, 4)
    for runs in ran.values():
        runs[:, start + new.shape[1] :] = True                           # the second turn runs everything
    copies = {skip.layer for skip in built.layer_skips if kv == "copy_prev_layer"}
    expected = long_forward(model, {"input_ids": whole, "attention_mask": torch.ones_like(whole)}, ran, hidden, copies)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, start - 1 : start - 1 + STEPS], **TOLERANCE)
    torch.testing.assert_close(second, expected[:, start + new.shape[1] :], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llava"])
@pytest.mark.parametrize("method", [name for name in METHODS if not vlprune.get_method(name).adaptive])
def test_no_reads_between_the_layers(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read back from the device in a prompt or a decoding step."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    inputs = tiny.prompt(prompts(tiny))
    watch = Watch()
    for name in ("text_after", "last_token", "last_tokens", "valid_mask", "visual_mask", "set_mask", "token_rows"):
        monkeypatch.setattr(TokenLayout, name, on_the_host(watch, getattr(TokenLayout, name)))
    monkeypatch.setattr("vlprune.adapters._decoder.DecoderEngine._whole_after", staticmethod(on_the_host(watch, lambda session: session.layout.length)))
    monkeypatch.setattr(Session, "_check_finite", lambda *args: None)
    layers = decoder_of(model).layers
    with applied(model, build(method, model)), torch.no_grad():
        first = layers[0].register_forward_pre_hook(lambda *_: watch.__enter__() and None, prepend=True)  # type: ignore[index, union-attr]
        last = layers[-1].register_forward_hook(lambda *_: watch.__exit__(None, None, None))  # type: ignore[index, union-attr]
        out = model(**inputs, use_cache=True)
        ones = torch.cat([inputs["attention_mask"], torch.ones_like(inputs["attention_mask"][:, :1])], dim=1)
        model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=ones, past_key_values=out.past_key_values)
        first.remove()
        last.remove()
    assert watch.found == []
