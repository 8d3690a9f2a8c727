"""Qwen-VL: signals of the packed tower, DeepStack behind dropped rows, items, positions in decoding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from tests.families.qwen_vl import FAMILIES, GRIDS, MOE, TinyQwen
from tests.tiny import IMAGE, VIDEO
from vlprune.adapter import find_adapter
from vlprune.adapters.qwen_vl import QwenVLAdapter
from vlprune.budget import Budget
from vlprune.errors import UnsupportedModelError
from vlprune.method import PruningMethod, Stage
from vlprune.points import BeforeLLM, LLMLayer
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

EVERY = [pytest.param(family, id=family.name) for family in (*FAMILIES, MOE)]
DENSE = EVERY[:3]
MIXED = [[3, "image", 4, ("image", 1), 2], [5, "video", 3, ("image", 2), 4], [9]]


@dataclass
class Spy:
    """Scores by one signal and keeps what it was shown."""

    tap: Tap
    also: Tap
    seen: dict[tuple[str, int], ScoreInputs] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[Tap, ...]:
        return self.tap, self.also

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        self.seen[inputs.modality, inputs.num_original] = inputs
        return inputs.signal(self.tap)


def spying(layer: int, point: Any = None, keep: float = 0.4) -> tuple[Spy, PruningMethod]:
    """A method that keeps the most attended tokens of a vision block."""
    spy = Spy(Tap("column_mean", layer), Tap("vision_keys", layer))
    return spy, PruningMethod("spy", (Stage(point or BeforeLLM(), spy, TopK(), Drop(), Budget(keep)),))


def sizes(modality: str, shape: int) -> tuple[int, int, int]:
    """Frames, rows and columns of visual tokens."""
    frames, height, width = GRIDS[modality][shape]
    return frames, height // 2, width // 2


def packed_order(family: TinyQwen, modality: str, shapes: list[int]) -> Tensor:
    """Which visual token each merge unit of the tower is, by the definition of the windows."""
    if family.name != "qwen2_5_vl":
        return torch.arange(sum(torch.tensor(sizes(modality, shape)).prod().item() for shape in shapes))
    order: list[int] = []
    for shape in shapes:
        frames, rows, columns = sizes(modality, shape)
        cells = [(t, r // 2, c // 2, r, c) for t in range(frames) for r in range(rows) for c in range(columns)]
        start = len(order)
        order.extend(start + (t * rows + r) * columns + c for t, _, _, r, c in sorted(cells))
    return torch.tensor(order)


@torch.no_grad()
def attention_received(family: TinyQwen, inputs: dict[str, Tensor], layer: int, modality: str, shapes: list[int]) -> list[Tensor]:
    """Column means of the maps that the eager tower really computes, one tensor an item."""
    model = family.build("eager")
    attention = model.model.visual.blocks[layer].attn
    module = sys.modules[type(attention).__module__]
    plain, found = module.eager_attention_forward, []

    def recording(caller: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = plain(caller, *args, **kwargs)
        if caller is attention:
            found.append(weights[0].mean(dim=0).mean(dim=0))
        return output, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", recording)
        if modality == "image":
            model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        else:
            model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    units = torch.cat(found).unflatten(0, (-1, 4)).mean(dim=1)
    tokens = torch.empty_like(units)
    tokens[packed_order(family, modality, shapes)] = units
    return list(tokens.split([int(torch.tensor(sizes(modality, shape)).prod()) for shape in shapes]))


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("family", DENSE)
def test_column_means_are_those_of_the_eager_maps(family: TinyQwen, layer: int) -> None:
    inputs = family.prompt([["image", 3, ("image", 1)], [2, ("image", 2), 2], [("video", 0), 4, ("video", 1)]])
    spy, method = spying(layer)
    model = family.build()
    with vlprune.apply(model, method), torch.no_grad():
        model(**inputs)
    for modality, shapes in (("image", [0, 1, 2]), ("video", [0, 1])):
        for shape, expected in zip(shapes, attention_received(family, inputs, layer, modality, shapes), strict=True):
            got = spy.seen[modality, expected.numel()]
            torch.testing.assert_close(got.signal(spy.tap)[0], expected)
            assert got.signal(spy.also).shape == (1, expected.numel(), 8)
            frames, rows, columns = sizes(modality, shape)
            assert got.grid is not None
            assert got.grid[0].tolist() == [[t, r, c] for t in range(frames) for r in range(rows) for c in range(columns)]


def test_windows_change_what_a_token_receives() -> None:
    """The tiny Qwen2.5-VL has windows smaller than its pictures, and the permutation is not trivial."""
    family = FAMILIES[1]
    order = packed_order(family, "image", [1])
    assert order.tolist() != sorted(order.tolist())
    facts = find_adapter(family.build()).facts
    assert (facts.global_vision_layers, facts.feature_layer, facts.has_cls) == ((1, 3), 3, False)
    assert find_adapter(FAMILIES[0].build()).facts.global_vision_layers == (0, 1, 2, 3)


@contextmanager
def hidden_columns(model: Any, dropped: Tensor, valid: Tensor, first: int) -> Iterator[None]:
    """The full model in which nobody sees the dropped (B, L) columns from decoder layer ``first`` on, nor padding anywhere."""

    def mask_from(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            length = (args[0] if args else kwargs["hidden_states"]).shape[1]
            seen = torch.ones(valid.shape[0], length, dtype=torch.bool)  # generated tokens are seen
            seen[:, : valid.shape[1]] = valid & ~dropped if number >= first else valid
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            allowed = (causal & seen[:, None]) | torch.eye(length, dtype=torch.bool)
            return args, {**kwargs, "attention_mask": allowed[:, None]}

        return hook

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(mask_from(number), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped_places(trace: Any) -> Tensor:
    """(B, L) bool: visual tokens that did not stay."""
    gone = trace.layout.visual_mask()
    for item, kept in zip(trace.points[-1].items, trace.points[-1].kept, strict=True):
        gone[item.row, item.positions[kept]] = False
    return gone


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("family", EVERY)
def test_dropping_equals_masking(family: TinyQwen, first: int, padding: str) -> None:
    """Also where DeepStack adds features behind layers 0 and 1 to rows of which some have left."""
    model, inputs = family.build(), family.prompt(MIXED, padding=padding)
    _, method = spying(1, LLMLayer(first) if first else BeforeLLM())
    with vlprune.apply(model, method) as handle:
        pruned = model(**inputs).logits
        gone = dropped_places(handle.trace)
    valid = inputs["attention_mask"].bool()
    with hidden_columns(model, gone, valid, first):
        masked = model(**inputs).logits
    text = valid & ~handle.trace.layout.visual_mask()
    assert 0 < gone.sum() < handle.trace.layout.visual_mask().sum()
    torch.testing.assert_close(pruned[text], masked[text], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pruned[valid & ~gone], masked[valid & ~gone], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("family", DENSE)
def test_generate_equals_long_forwards_with_hidden_columns(family: TinyQwen, first: int) -> None:
    """Positions of generated tokens continue from the unpruned prompt, row by row."""
    model, inputs = family.build(), family.prompt(MIXED)
    _, method = spying(3, LLMLayer(first) if first else BeforeLLM())
    with vlprune.apply(model, method) as handle:
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, suppress_tokens=[IMAGE, VIDEO]
        )  # fmt: skip
        gone = dropped_places(handle.trace)
    valid, long = inputs["attention_mask"].bool(), dict(inputs)
    with hidden_columns(model, gone, valid, first):
        for step, logits in enumerate(out.logits):
            model.model.rope_deltas = None
            expected = model(**long).logits[:, -1]
            torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
            token = out.sequences[:, inputs["input_ids"].shape[1] + step, None]
            expected[:, [IMAGE, VIDEO]] = float("-inf")
            assert torch.equal(token, expected.argmax(dim=-1, keepdim=True))
            long["input_ids"] = torch.cat([long["input_ids"], token], dim=1)
            long["attention_mask"] = torch.cat([long["attention_mask"], torch.ones_like(token)], dim=1)
            long["mm_token_type_ids"] = torch.cat([long["mm_token_type_ids"], torch.zeros_like(token, dtype=torch.int32)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE)
def test_generate_equals_a_manual_loop(family: TinyQwen) -> None:
    """A loop that a user writes: one token a call on the same cache."""
    model = family.build()
    prompts = [family.prompt([[3, "image", 4]]), family.prompt([[5, "video", 2, ("image", 1), 3]], seed=1)]
    with vlprune.apply(model, "hiprune", 0.3):
        expected = [model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist() for inputs in prompts]
        got: list[list[int]] = []
        for inputs in prompts:
            out = model(**inputs, use_cache=True)
            tokens: list[int] = []
            while len(tokens) < 4:  # without a mask: transformers takes it for all positions
                token = out.logits[:, -1:].argmax(dim=-1)
                tokens.append(int(token))
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            got.append(tokens)
    assert got == expected


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY)
def test_images_and_videos_of_one_prompt_select_as_each_alone(family: TinyQwen) -> None:
    model = family.build()
    parts: list[Any] = ["image", ("video", 1), ("image", 1), "video", ("image", 2)]
    with vlprune.apply(model, "hiprune", 0.3) as handle:
        model(**family.prompt([[2, *parts[:3], 3], [*parts[3:], 1]]))
        record, layout = handle.trace.points[0], handle.trace.layout
        assert [(item.modality, item.row) for item in record.items] == [("image", 0), ("video", 0), ("image", 0), ("video", 1), ("image", 1)]
        for number, part in enumerate(parts):
            row, place = (0, 1 + number) if number < 3 else (1, number - 3)
            alone: list[Any] = [1] * place  # same place, so the same pixels
            model(**family.prompt([[*alone, part]], row_numbers=[row]))
            single = handle.trace.points[0]
            assert torch.equal(record.kept[number], single.kept[0])
            assert record.kept[number].numel() == round(0.3 * record.items[number].num_tokens)
    video = layout.items[1]
    assert video.num_tokens == 4 * 3 * 2
    contiguous = int(video.positions[-1] - video.positions[0]) + 1 == video.num_tokens
    assert contiguous is not family.stamps  # timestamps stand between the frames


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE)
def test_beams_know_their_items(family: TinyQwen) -> None:
    model, inputs = family.build(), family.prompt(MIXED)
    with vlprune.apply(model, "hiprune", 0.3) as handle:
        model(**inputs)
        once = handle.trace.points[0].keep_indices
        model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        twice = handle.trace.points[0].keep_indices
    assert (len(once), len(twice)) == (3, 6)
    assert all(torch.equal(twice[row], once[row // 2]) for row in range(6))


@torch.no_grad()
def attention(shape: Any) -> float:
    """One query on one key."""
    return 4.0 * shape.heads * shape.head_dim


@pytest.mark.parametrize("family", DENSE)
def test_towers_are_counted_in_patches(family: TinyQwen) -> None:
    model = family.build()
    with vlprune.apply(model, "hiprune", 0.3) as handle:
        model(**family.prompt([["image", 2, "video"]]))
        trace, report = handle.trace, handle.report()
    assert trace.vision_tokens == [64 + 72] * 4
    assert trace.vision_sequences == 1 + 3
    shapes = QwenVLAdapter(model).dimensions()
    assert (shapes["vision"].width, shapes["vision"].gated, shapes["decoder"].vocabulary) == (32, family.name == "qwen2_5_vl", 128)
    matrices = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.dim() > 1)
    assert (shapes["decoder"].layer_flops(1) - attention(shapes["decoder"])) * 4 == 2 * matrices
    matrices = sum(p.numel() for p in model.model.visual.blocks.parameters() if p.dim() > 1)
    assert (shapes["vision"].layer_flops(1) - attention(shapes["vision"])) * 4 == 2 * matrices
    assert 0 < report.parts["decoder"] < report.parts["decoder_dense"]
    assert report.flops_pruned == report.parts["vision"] + report.parts["scorer"] + report.parts["decoder"]
    assert 0 < report.parts["scorer"] < report.parts["vision"]


def test_renumbering_is_refused() -> None:
    model = FAMILIES[0].build()
    with pytest.raises(UnsupportedModelError, match="RoPE"):
        vlprune.apply(model, "hiprune", 0.5, positions="renumber")
    assert "_deepstack_process" not in vars(model.model.language_model)


@torch.no_grad()
def test_deepstack_behind_the_last_layer_meets_full_rows() -> None:
    """A decoder as deep as DeepStack: the last addition comes after the dropped rows are back."""
    family = FAMILIES[2]
    model, inputs = family.build(), family.prompt([[3, "image", 4], [30]])
    decoder = model.model.language_model
    decoder.layers = decoder.layers[:2]
    _, method = spying(1)
    with vlprune.apply(model, method) as handle:
        pruned = model(**inputs).logits
        gone = dropped_places(handle.trace)
    valid = inputs["attention_mask"].bool()
    with hidden_columns(model, gone, valid, 0):
        masked = model(**inputs).logits
    torch.testing.assert_close(pruned[valid & ~gone], masked[valid & ~gone], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_that_skip_a_layer_get_what_deepstack_adds_behind_it() -> None:
    family = FAMILIES[2]
    model, inputs = family.build(), family.prompt(MIXED)
    _, method = spying(1, LLMLayer(1))
    method = replace(method, stages=(replace(method.stages[0], restore=2),))
    with vlprune.apply(model, method) as handle:
        skipped = model(**inputs).logits
        gone = dropped_places(handle.trace)
    valid = inputs["attention_mask"].bool()

    def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        allowed = torch.ones(gone.shape[1], gone.shape[1], dtype=torch.bool).tril() & (valid & ~gone)[:, None] | torch.eye(gone.shape[1], dtype=torch.bool)
        return args, {**kwargs, "attention_mask": allowed[:, None]}

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return torch.where(gone[..., None], args[0] if args else kwargs["hidden_states"], output)

    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(mask, with_kwargs=True)
    layer.register_forward_hook(leave, with_kwargs=True)
    torch.testing.assert_close(skipped[valid], model(**inputs).logits[valid], atol=2e-5, rtol=1e-4)
