"""Selecting keys while decoding equals a dense model in which, at each step and from the layer on, the other visual keys are hidden."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vlprune
from tests.oracle import decoder_of, snapshot
from tests.test_no_sync import Watch
from tests.tiny import IMAGE, PAD, VIDEO, families
from vlprune.adapter import find_adapter
from vlprune.adapters._decode_select import DecodeSelects
from vlprune.budget import Budget
from vlprune.errors import UnsupportedCallError, UnsupportedPointError
from vlprune.method import DecodeSelect, LayerSkip, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import BeforeLLM, LLMLayer
from vlprune.pruner import Pruner
from vlprune.reducers import Drop
from vlprune.selectors import TopK

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}
ROWS = [[3, "image", 4], [2, "image", 3, ("image", -1), 5], [6]]
#: Between the cosines that these models give from step to step: some choices are reused, some are not.
REUSE = {"llava": 0.8, "qwen2_5_vl": 0.96}
SELECT = DecodeSelect(2, Budget(0.3, "floor"), reads=1, reuse=0.8)
STEPS = 6


def rows_for(family: Any) -> list[list[Any]]:
    last = family.shapes.get("image", 1) - 1
    return [[part if not isinstance(part, tuple) else ("image", last) for part in row] for row in ROWS]


def method(select: DecodeSelect = SELECT, drop: float | None = None, at: Any = None) -> PruningMethod:
    stages = () if drop is None else (Stage(at or BeforeLLM(), RandomScore(0), TopK(), Drop(), Budget(drop)),)
    return PruningMethod("select", stages, decode_selects=(select,))


def dense(model: nn.Module, inputs: dict[str, Any], hidden: list[Tensor], **kwargs: Any) -> Any:
    """The untouched model; in layer i the columns ``hidden[i]`` (B, L, L) are hidden, query by query."""
    real, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]

    def make(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            mask = call.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 4:             # the model's own: sliding windows, pictures that see themselves
                allowed = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
            else:
                allowed = torch.ones(length, length).tril().bool()[None] & real[:, None, :]
            allowed = allowed & ~hidden[layer]
            states = args[0] if args else call["hidden_states"]
            bias = torch.zeros(allowed.shape, dtype=states.dtype).masked_fill(~allowed, torch.finfo(states.dtype).min)
            return args, {**call, "attention_mask": bias[:, None]}

        return hook

    handles = [module.register_forward_pre_hook(make(layer), with_kwargs=True) for layer, module in enumerate(decoder_of(model).layers)]
    try:
        with torch.no_grad():
            return model(**inputs, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def expected_logits(
    family: Any, prompt: dict[str, Tensor], sequences: Tensor, select: DecodeSelect, trace: Any, num_items: list[list[int]]
) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits of every generated token, token by token chosen in plain loops, and the choices of every row and step."""
    model, start = family.build("eager"), prompt["input_ids"].shape[1]
    new = sequences[:, start:-1]
    inputs = {**prompt, "input_ids": sequences[:, :-1], "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(new)], 1)}
    for types in ("mm_token_type_ids", "token_type_ids"):
        if types in inputs:
            inputs[types] = torch.cat([prompt[types], torch.full_like(new, family.generated_type)], 1)
    kwargs: dict[str, Any] = {}
    if not find_adapter(model).multimodal_rope:
        kwargs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch, length = inputs["input_ids"].shape
    depth = len(decoder_of(model).layers)
    gone = torch.zeros(depth, batch, length, dtype=torch.bool)
    for record in trace.points if trace is not None else []:
        first = 0 if record.point == "before_llm" else int(record.point.partition(":")[2])
        for item, kept in zip(record.items, record.kept, strict=True):
            stays = torch.zeros(item.num_tokens, dtype=torch.bool)
            stays[kept] = True
            gone[first:, item.row, item.positions[~stays]] = True
    hidden = [gone[layer][:, None].expand(batch, length, length).clone() for layer in range(depth)]
    maps = dense(model, inputs, hidden, output_attentions=True, **kwargs).attentions[select.reads]
    choices: list[list[list[int]]] = []
    for row in range(batch):
        visual = [place for place in range(start) if int(sequences[row, place]) in (IMAGE, VIDEO) and not gone[select.layer, row, place]]
        stay = sum(select.budget.num_keep(number) for number in num_items[row])
        previous, chosen, taken = None, [], []
        for query in range(start, length):
            row_attention = maps[row, :, query, visual].mean(0) if visual else torch.zeros(0)
            alike = 0.0 if previous is None or not visual else float(functional.cosine_similarity(row_attention, previous, dim=0))
            if select.reuse is None or alike < select.reuse:
                chosen = sorted(visual[i] for i in row_attention.argsort(descending=True)[:stay].tolist())
            previous = row_attention
            taken.append(chosen)
            for layer in range(select.layer, depth):
                hidden[layer][row, query, [place for place in visual if place not in chosen]] = True
        choices.append(taken)
    return dense(model, inputs, hidden, **kwargs).logits[:, start - 1 :], choices


def generate(model: Any, prompt: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO], **options}
    return model.generate(**prompt, max_new_tokens=steps, **options)


def items_of(handle: vlprune.PruneHandle, prompt: dict[str, Tensor], drop: float | None) -> list[list[int]]:
    """Visual keys of each item of each row after the drop."""
    counts: list[list[int]] = [[] for _ in range(prompt["input_ids"].shape[0])]
    for item in handle.trace.layout.items:
        counts[item.row].append(item.num_tokens if drop is None else Budget(drop).num_keep(item.num_tokens))
    return counts


@pytest.mark.parametrize("drop", [None, 0.6], ids=["alone", "after a drop"])
@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("copies", [False, True], ids=["hidden", "copied"])
def test_equals_a_masked_dense_decode(
    name: str, attention: str, reuses: bool, drop: float | None, batch: int, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeSelects, "copies", lambda *args: copies)
    family = families()[name]
    model, prompt = family.build(attention), family.prompt(rows_for(family)[:batch])
    select = DecodeSelect(2, Budget(0.3, "floor"), reads=1, reuse=REUSE[name] if reuses else None)
    with torch.no_grad(), vlprune.apply(model, method(select, drop)) as handle:
        out = generate(model, prompt)
        expected, choices = expected_logits(family, prompt, out.sequences, select, handle.trace, items_of(handle, prompt, drop))
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)
    alike = [before == after for row in choices if row[0] for before, after in pairwise(row)]
    assert not all(alike), "the choice never changes: the test shows nothing"
    assert any(alike) == reuses, "the choice is reused where it should be, and the test shows it"
    lengths = {layer.stored_keys().shape[2] for layer in out.past_key_values.layers}
    assert len(lengths) == 1, "every layer keeps all keys"


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family(name: str) -> None:
    """Whether choices change from step to step is not looked at here."""
    family = families()[name]
    if "image" not in family.modalities:
        pytest.skip(f"{name} has {family.modalities}")
    model, prompt = family.build(), family.prompt(rows_for(family))
    select = DecodeSelect(2, Budget(0.3, "floor"), reads=1)
    with torch.no_grad(), vlprune.apply(model, method(select, 0.6)) as handle:
        out = generate(model, prompt, steps=4)
        expected, _ = expected_logits(family, prompt, out.sequences, select, handle.trace, items_of(handle, prompt, 0.6))
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("copies", [False, True], ids=["hidden", "copied"])
def test_a_decoding_step_reads_nothing_back(copies: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeSelects, "copies", lambda *args: copies)
    family = families()["llava"]
    model, prompt = family.build(), family.prompt(rows_for(family)[:rows])
    layers = decoder_of(model).layers
    with torch.no_grad(), vlprune.apply(model, method(drop=0.6)):
        out = model(**prompt, use_cache=True)
        cache, mask, watch = out.past_key_values, prompt["attention_mask"], Watch()
        first = layers[0].register_forward_pre_hook(lambda *_: watch.__enter__() and None, prepend=True)
        last = layers[-1].register_forward_hook(lambda *_: watch.__exit__(None, None, None))
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            out = model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=mask, past_key_values=cache)
        first.remove()
        last.remove()
        assert cache.layers[2].selection.chosen is not None
    assert watch.found == []


def test_copying_pays() -> None:
    """Copied entries are moved three times; with grouped keys (this model's), or for flash attention, they are always copied."""
    backend = ["sdpa"]
    layers = list(decoder_of(families()["llava"].build()).layers)
    selects = DecodeSelects(layers, Pruner(method(), positions="preserve"), lambda: backend[0])
    assert selects.grouped
    assert [selects.copies(selected, 90) for selected in (10, 31, 90)] == [True, True, True]
    selects.grouped = False
    assert [selects.copies(selected, 90) for selected in (10, 30, 31, 90)] == [True, True, False, False]
    backend[0] = "flash_attention_2"
    assert selects.copies(90, 90)


def test_it_matters_and_everything_is_the_dense_model() -> None:
    family = families()["llava"]
    model, prompt = family.build(), family.prompt(rows_for(family))
    with torch.no_grad():
        plain = torch.stack(generate(model, prompt).logits)
        state = snapshot(model)
        with vlprune.apply(model, method()):
            selected = torch.stack(generate(model, prompt).logits)
        assert snapshot(model) == state
        with vlprune.apply(model, method(DecodeSelect(2, Budget(1.0), reads=1))):
            assert torch.equal(torch.stack(generate(model, prompt).logits), plain)
        everything = DecodeSelect(2, Budget(0.999999), reads=1)
        with vlprune.apply(model, method(everything)):
            torch.testing.assert_close(torch.stack(generate(model, prompt).logits), plain, **TOLERANCE)
    assert torch.equal(selected[0], plain[0]), "the prefill is not changed"
    assert not torch.allclose(selected[1, :2], plain[1, :2], atol=1e-3)
    torch.testing.assert_close(selected[1, 2], plain[1, 2], **TOLERANCE)     # a row without pictures


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams_take_their_selection_along(name: str) -> None:
    """The score of the best beam is that of its own tokens, whichever rows it lived in."""
    family = families()[name]
    model, prompt = family.build(), family.prompt(rows_for(family))
    start = prompt["input_ids"].shape[1]
    with torch.no_grad(), vlprune.apply(model, method()) as handle:
        out = generate(model, prompt, num_beams=4, output_scores=True, length_penalty=0.0)
        layout = handle.trace.layout
        counts: list[list[int]] = [[] for _ in range(layout.num_rows)]
        for item in layout.items:
            counts[item.row].append(item.num_tokens)
        expected, _ = expected_logits(family, prompt, out.sequences, SELECT, None, counts[::4])
    assert bool((out.beam_indices[:, 1:STEPS] != out.beam_indices[:, :1]).any()), "no beam moved: the test shows nothing"
    scores = expected.log_softmax(-1)
    total = scores.gather(2, out.sequences[:, start:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, total, **TOLERANCE)


def test_a_row_of_a_batch_equals_the_row_alone() -> None:
    family = families()["llava"]
    model = family.build()
    rows = rows_for(family)
    with torch.no_grad(), vlprune.apply(model, method(drop=0.5, at=LLMLayer(1))):
        together = generate(model, family.prompt(rows))
        for number, row in enumerate(rows):
            alone = generate(model, family.prompt([row], row_numbers=[number]))
            torch.testing.assert_close(torch.stack(together.logits)[:, number], torch.stack(alone.logits)[:, 0], **TOLERANCE)


def test_a_static_cache_a_second_turn_and_a_plug_in_choice() -> None:
    family = families()["llava"]
    model, prompt = family.build(), family.prompt(rows_for(family)[:1])
    with torch.no_grad():
        with vlprune.apply(model, method()):
            growing = torch.stack(generate(model, prompt).logits)
            static = torch.stack(generate(model, prompt, cache_implementation="static", disable_compile=True).logits)
            torch.testing.assert_close(static, growing, **TOLERANCE)
            cache = generate(model, prompt, steps=2).past_key_values
            told = prompt["input_ids"].shape[1] + 1
            more = torch.tensor([[5, 6, 7]])
            long = model(input_ids=more, attention_mask=torch.ones(1, told + 3), past_key_values=cache)
            assert bool(torch.isfinite(long.logits).all())
            with pytest.raises(UnsupportedCallError, match="cannot be edited"):
                cache.layers[3].edit(torch.arange(4)[None])
            cache.layers[1].edit(torch.arange(told)[None])
            with pytest.raises(UnsupportedCallError, match="changed by hand"):
                model(input_ids=more[:, :1], attention_mask=torch.ones(1, told + 4), past_key_values=cache)
        seen = []

        def smallest(attention: Tensor, most: int) -> Tensor:
            seen.append((attention.shape, most))
            return attention.argsort(dim=1)[:, :most]

        with vlprune.apply(model, method(DecodeSelect(2, Budget(5), reads=0, choose=smallest))):
            other = torch.stack(generate(model, prompt, steps=3).logits)
        assert seen == [(torch.Size([1, 36]), 5)] * 2
        assert not torch.equal(other[1], growing[1])


def test_a_second_turn_with_another_picture() -> None:
    """What was selected from grows; decoding then equals a method that saw one long prompt."""
    family = families()["llava"]
    model = family.build()
    first, second = family.prompt([[3, "image", 4]]), family.prompt([[2, "image", 3]], seed=1)
    length = first["input_ids"].shape[1]
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pictures = torch.cat([first["pixel_values"], second["pixel_values"]])
    with torch.no_grad(), vlprune.apply(model, method()):
        one = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures})
        cache = model(**first, use_cache=True).past_key_values
        ones = torch.ones_like(ids)
        out = model(input_ids=second["input_ids"], attention_mask=ones, pixel_values=second["pixel_values"], past_key_values=cache)
        for step in range(STEPS):
            torch.testing.assert_close(out.logits[:, -1], one.logits[step], **TOLERANCE)
            ones = torch.cat([ones, ones[:, :1]], dim=1)
            token = one.sequences[:, ids.shape[1] + step][:, None]
            out = model(input_ids=token, attention_mask=ones, past_key_values=cache)
    assert length + second["input_ids"].shape[1] == ids.shape[1]
    assert PAD not in ids


def test_what_does_not_fit_is_an_error() -> None:
    model = families()["llava"].build()
    for select, words in ((DecodeSelect(2, Budget(0.5), reads=2), "earlier layer"), (DecodeSelect(9, Budget(0.5), reads=2), "layers 0 to 3")):
        with pytest.raises(UnsupportedPointError, match=words):
            vlprune.apply(model, method(select))
    with pytest.raises(UnsupportedPointError, match="leave at llm:1 or earlier"):
        vlprune.apply(model, method(drop=0.5, at=LLMLayer(2)))
    skips = replace(method(), layer_skips=(LayerSkip(3, lambda *at: True),))
    with pytest.raises(UnsupportedPointError, match="layer 3 is skipped"):
        vlprune.apply(model, skips)
    prompt = families()["llava"].prompt([[3, "image", 4, 5]])
    with torch.no_grad(), vlprune.apply(model, method()):
        cache = model(**prompt, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, prompt["input_ids"].shape[1] + 1), past_key_values=cache)
        cache.crop(-1)                                                  # what was generated may be taken back
        with pytest.raises(UnsupportedCallError, match="rolled back"):
            cache.crop(-1)
