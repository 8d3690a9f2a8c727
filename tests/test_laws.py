"""The laws of the engine, over every registered method x every tiny family x padding x backend. Parametrised from the registries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from tests.oracle import decoder_of, hidden_columns, masked_run, snapshot, tower_columns
from tests.tiny import IMAGE, VIDEO, TinyFamily, families
from vlprune.errors import MissingSignalError, UnsupportedPointError

METHODS = vlprune.list_methods("visual")
FAMILIES = sorted(families())
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


def prompts(family: TinyFamily, modality: str) -> list[list[Any]]:
    """A batch with one item, two items of different shapes where the family has them, and a text-only row."""
    last = family.shapes.get(modality, 1) - 1
    return [[3, (modality, 0), 4], [2, (modality, last), 3, (modality, 0), 5], [6]]


def modality_of(card: vlprune.MethodCard, family: TinyFamily) -> str:
    """What to show a method, or skip with the declared reason."""
    if card.modality == "any":
        return family.modalities[0]
    if card.modality not in family.modalities:
        pytest.skip(f"{card.name} declares modality {card.modality!r}; {family.name} has {family.modalities}")
    return card.modality


def applied(model: torch.nn.Module, name: str, keep: Any = 0.4, **options: Any) -> vlprune.PruneHandle:
    """Apply, or skip where the family declares that it lacks a signal or a point."""
    card = vlprune.get_method(name)
    try:
        return vlprune.apply(model, name, keep=keep, **{**card.test_options, **options})
    except (MissingSignalError, UnsupportedPointError) as error:
        pytest.skip(f"declared: {error}")


def decoder_points(handle: vlprune.PruneHandle) -> list[Any]:
    """The records by row of the prompt; those of a tower are by picture, and what it dropped is in the first of these."""
    return [record for record in handle.report().points if not record.point.startswith("vision:")]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_drop_equals_mask(method: str, family: str, attention: str, padding: str) -> None:
    """Law 1 and 3: prefill and every decoded step equal one long masked run of the untouched model."""
    check_masked_run(method, families()[family], attention, padding, modality_of(vlprune.get_method(method), families()[family]))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "video" in families()[name].modalities])
@pytest.mark.parametrize("method", [name for name in METHODS if vlprune.get_method(name).modality == "any"])
def test_drop_equals_mask_on_videos(method: str, family: str) -> None:
    """The same for methods that take both, which the test above shows pictures."""
    check_masked_run(method, families()[family], "sdpa", "left", "video")


def check_masked_run(method: str, tiny: TinyFamily, attention: str, padding: str, modality: str) -> None:
    card = vlprune.get_method(method)
    if not card.exact:
        pytest.skip(f"{method} declares that it changes kept tokens")
    model = tiny.build(attention)
    rows = prompts(tiny, modality)
    inputs = tiny.prompt(rows[1:2] if padding == "none" else rows, padding="right" if padding == "right" else "left")
    prompt_length, steps = inputs["input_ids"].shape[1], 4
    with applied(model, method) as handle, torch.no_grad():
        if any(stage.restore is not None for stage in handle.method.stages):
            pytest.skip("its tokens come back: tests/test_method_tower.py holds them still as well as hidden")
        if padding == "right":
            pruned = model(**inputs).logits
            steps = 0
        else:
            options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO]}
            out = model.generate(**inputs, max_new_tokens=steps, **options)
            new_ids = out.sequences[:, prompt_length:]
        trace = handle.trace
    depth, tower = len(decoder_of(model).layers), tower_columns(trace, model)  # type: ignore[arg-type]
    if trace is None:
        assert method == "dense"
        hidden = [torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)] * depth
    else:
        hidden = hidden_columns(trace, depth)
        assert bool(hidden[-1].any()) or card.adaptive
    if padding == "right":
        reference = masked_run(model, inputs, hidden, tower=tower).logits
        seen = inputs["attention_mask"].bool() & ~hidden[-1]
        torch.testing.assert_close(pruned[seen], reference[seen], **TOLERANCE)
        return
    kwargs = {}
    if not handle.adapter.multimodal_rope:  # type: ignore[attr-defined]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new_ids[:, :-1])], dim=1)
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    reference = masked_run(model, inputs, hidden, new_ids[:, :-1], tiny.generated_type, tower, **kwargs).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, reference[:, prompt_length - 1 + step], **TOLERANCE)
    reference[..., [IMAGE, VIDEO]] = -torch.inf
    assert torch.equal(new_ids, reference[:, prompt_length - 1 :].argmax(dim=-1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_keep_one_is_the_untouched_model(method: str, family: str, attention: str) -> None:
    """Law 2, bit for bit; shapes never change; `remove` restores the model (law 5)."""
    tiny, card = families()[family], vlprune.get_method(method)
    modality = modality_of(card, tiny)
    model = tiny.build(attention)
    inputs = tiny.prompt(prompts(tiny, modality))
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)              # transformers installs hooks of its own on first use
        state = snapshot(model)
        with applied(model, method, keep=1.0):
            assert torch.equal(model(**inputs).logits, before.logits)
        with applied(model, method) as handle:
            out = model(**inputs, output_hidden_states=True)
            assert out.logits.shape == before.logits.shape
            assert [s.shape for s in out.hidden_states] == [s.shape for s in before.hidden_states]
            if method != "dense" and not card.adaptive:
                assert not torch.equal(out.logits, before.logits)
            report = handle.report()
        assert snapshot(model) == state
        assert torch.equal(model(**inputs).logits, before.logits)
    for record in report.points:
        assert len(record.keep_indices) == 3 or record.point.startswith("vision:")      # a tower's rows are pictures
        assert record.visual_kept == sum(len(indices) for indices in record.keep_indices)
        for indices in record.keep_indices:
            assert indices.dtype == torch.int64
            assert bool((indices.diff() > 0).all())
    if method != "dense" and not card.adaptive:
        stage = handle.method.stages[-1]
        record = [record for record in report.points if record.point == stage.point.label][-1]
        assert record.visual_kept == sum(stage.budget.num_keep(item.num_tokens, item.num_frames) for item in record.items)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_row_of_a_batch_equals_the_row_alone(method: str, family: str) -> None:
    """Law 4: logits of real tokens and kept tokens do not depend on the rest of the batch."""
    tiny, card = families()[family], vlprune.get_method(method)
    modality = modality_of(card, tiny)
    model = tiny.build()
    rows = prompts(tiny, modality)
    inputs = tiny.prompt(rows)
    with applied(model, method) as handle, torch.no_grad():
        ids = {} if handle.adapter.multimodal_rope else {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}  # type: ignore[attr-defined]
        together = model(**inputs, **ids).logits
        kept = [record.keep_indices for record in decoder_points(handle)]
        for number, row in enumerate(rows):
            alone = tiny.prompt([row], row_numbers=[number])
            length = alone["input_ids"].shape[1]
            logits = model(**alone, **({"position_ids": torch.arange(length)[None]} if ids else {})).logits
            torch.testing.assert_close(together[number, -length:], logits[0], **TOLERANCE)
            if any(not isinstance(part, int) for part in row):
                for point, record in zip(kept, decoder_points(handle), strict=True):
                    assert torch.equal(point[number], record.keep_indices[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_middle_leaves_nothing_behind(method: str, family: str) -> None:
    """Law 5, and the next call works."""
    tiny, card = families()[family], vlprune.get_method(method)
    modality = modality_of(card, tiny)
    model = tiny.build()
    inputs = tiny.prompt(prompts(tiny, modality)[:1])
    with torch.no_grad():
        before = model(**inputs).logits
        state = snapshot(model)
        handle = applied(model, method)
        pruned = model(**inputs).logits

        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        bomb = decoder_of(model).layers[2].mlp.register_forward_hook(fail)  # type: ignore[index, union-attr]
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs)
        bomb.remove()
        assert torch.equal(model(**inputs).logits, pruned)
        handle.remove()
        handle.remove()
        assert snapshot(model) == state
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_answer(method: str, family: str) -> None:
    """Law 6: a second call chooses the same tokens."""
    tiny, card = families()[family], vlprune.get_method(method)
    modality = modality_of(card, tiny)
    model = tiny.build()
    inputs = tiny.prompt(prompts(tiny, modality))
    with applied(model, method) as handle, torch.no_grad():
        first = model(**inputs).logits
        kept = handle.report().to_dict()["points"]
        assert torch.equal(model(**inputs).logits, first)
        assert handle.report().to_dict()["points"] == kept
