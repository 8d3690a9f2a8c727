"""Stages inside the vision tower of a vision-language model: what the tower dropped does not enter the LLM. The laws run over these methods, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from tests.oracle import hidden_columns, masked_run, snapshot, tower_columns
from tests.tiny import IMAGE, VIDEO, families
from vlprune.budget import Budget
from vlprune.errors import MissingSignalError, UnsupportedPointError
from vlprune.method import PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import VisionLayer
from vlprune.reducers import Drop
from vlprune.selectors import TopK

ROWS: list[list[Any]] = [[3, ("image", 0), 4], [2, ("image", 1), 3, ("image", 0), 5]]
LOGITS: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO]}


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_tokens_that_the_tower_dropped_are_gone(name: str) -> None:
    """Every point is reported, in the order passed; blocks behind a stage run on the survivors."""
    family = families()[name]
    model = family.build()
    inputs = family.prompt(ROWS)
    with torch.no_grad(), vlprune.apply(model, "cls_attention", keep=0.5, layers=(1,)) as handle:
        model(**inputs)
        report, trace = handle.report(), handle.trace
    assert [record.point for record in report.points] == ["vision:1", "before_llm"]
    assert trace is not None
    tower, decoder = trace.points
    assert tower.visual_kept == 18 * len(tower.kept)
    pictures = len(tower.kept)
    assert trace.vision_tokens[0] == pictures * 37
    assert trace.vision_tokens[1:] == [pictures * 19] * (len(trace.vision_tokens) - 1)
    if name == "llava":
        assert [kept.tolist() for kept in decoder.kept] == [kept.tolist() for kept in tower.kept]
    else:                                                                # newlines stay, cropped patches were no tokens to begin with
        for item, kept in zip(decoder.items, decoder.kept, strict=True):
            newlines = (item.grid[:, 1] < 0).nonzero().flatten()
            assert set(newlines.tolist()) <= set(kept.tolist())
            assert kept.numel() < item.num_tokens
    assert report.parts["vision"] < report.parts["vision_dense"]


@pytest.mark.parametrize("methods", [["cls_attention", "fastv"], ["cls_attention", "hiprune"], ["cls_attention", "hiprune", "fastv"]])
def test_together_with_what_comes_behind(methods: list[str]) -> None:
    """In the tower, before the LLM and in it: equal to the model in which all of these columns are hidden."""
    family = families()["llava"]
    model = family.build()
    inputs = family.prompt(ROWS)
    with torch.no_grad():
        before = model(**inputs).logits                                  # transformers installs hooks of its own on first use
    state = snapshot(model)
    with torch.no_grad(), vlprune.apply(model, methods, keep=0.3, cls_attention={"layers": (1,)}) as handle:
        out = model.generate(**inputs, max_new_tokens=4, **LOGITS)
        trace = handle.trace
        labels = [record.point for record in trace.points]
    assert snapshot(model) == state
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert labels[:2] == ["vision:1", "before_llm"]
    counts = [record.visual_kept for record in trace.points[1:]]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 3 * round(0.3 * 36)
    length, new = inputs["input_ids"].shape[1], out.sequences[:, inputs["input_ids"].shape[1] : -1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    reference = masked_run(model, inputs, hidden_columns(trace, 4), new, tower=tower_columns(trace, model), position_ids=places).logits
    if "hiprune" in methods:                                             # its signal was read in the shorter tower: the masked tower gives the same
        assert len(trace.points) >= 3
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, reference[:, length - 1 + step], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_positions_can_be_renumbered(name: str) -> None:
    """The LLM's gaps close; the tower's positions are in its embeddings."""
    family = families()[name]
    model = family.build()
    inputs = family.prompt(ROWS[:1])
    with torch.no_grad(), vlprune.apply(model, "cls_attention", keep=0.5, layers=(1,), positions="renumber") as handle:
        logits = model(**inputs).logits
        trace = handle.trace
    stays = ~hidden_columns(trace, 4)[-1]
    places = (stays.long().cumsum(1) - 1).clamp(min=0)
    reference = masked_run(model, inputs, hidden_columns(trace, 4), tower=tower_columns(trace, model), position_ids=places).logits
    torch.testing.assert_close(logits[stays], reference[stays], rtol=1e-4, atol=2e-4)


def test_gradients_reach_the_tower() -> None:
    """Through the survivors, not through what was dropped."""
    family = families()["llava"]
    model = family.build()
    inputs = family.prompt(ROWS[:1])
    inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_(True)
    with vlprune.apply(model, "random", keep=0.25, point="vision:0") as handle:
        model(**inputs).logits[:, -1].square().mean().backward()
        (kept,) = handle.trace.points[0].kept
    side = 4
    strength = inputs["pixel_values"].grad.abs().sum(dim=(0, 1)).unflatten(1, (-1, side)).unflatten(0, (-1, side)).sum(dim=(1, 3)).flatten()
    assert strength[kept].min() > 0
    dropped = torch.ones(36, dtype=torch.bool)
    dropped[kept] = False
    assert strength[dropped].max() == 0


def test_towers_whose_features_are_mixed_afterwards() -> None:
    """Pooled frames would mix dropped patches in: the points are not offered."""
    model = families()["llava_onevision"].build()
    with pytest.raises((UnsupportedPointError, MissingSignalError), match="vision:1"):
        vlprune.apply(model, "cls_attention", keep=0.5, layers=(1,))


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_packed_towers(name: str, layer: int, modality: str) -> None:
    """Qwen-VL: pictures of different sizes and whole videos, windows, DeepStack; equal to the tower with the same columns hidden."""
    family = families()[name]
    model = family.build()
    inputs = family.prompt([[3, (modality, 0), 4], [2, (modality, 1), 3, (modality, 0), 5], [6]])
    with torch.no_grad():
        before = model(**inputs).logits
        with vlprune.apply(model, ["random", "fastv"], random={"point": f"vision:{layer}", "keep": 0.5}, fastv={"layer": 3, "keep": 0.25}) as handle:
            out = model.generate(**inputs, max_new_tokens=3, **LOGITS)
            trace = handle.trace
        assert torch.equal(model(**inputs).logits, before)
    assert trace is not None
    tower, entrance, inside = trace.points
    assert [record.point for record in trace.points] == [f"vision:{layer}", "before_llm", "llm:3"]
    for picture, kept, later in zip(tower.items, tower.kept, entrance.kept, strict=True):
        assert kept.numel() == round(0.5 * picture.num_tokens)
        assert torch.equal(kept, later)
    patches = 4 * sum(item.num_tokens for item in tower.items)
    assert trace.vision_tokens == [patches] * layer + [4 * tower.visual_kept] * (4 - layer)
    new, length = out.sequences[:, inputs["input_ids"].shape[1] :], inputs["input_ids"].shape[1]
    reference = masked_run(model, inputs, hidden_columns(trace, 4), new[:, :-1], family.generated_type, tower_columns(trace, model)).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, reference[:, length - 1 + step], rtol=1e-4, atol=2e-4)
    assert inside.visual_kept < entrance.visual_kept


def test_packed_towers_with_everything_at_once() -> None:
    """Images and a video in one prompt: two calls of the tower, each with its own record; recorded states keep their length; skips come back."""
    family = families()["qwen3_vl"]
    model = family.build()
    inputs = family.prompt([[3, ("image", 0), ("video", 0), 4, ("image", 1), 5]])
    stage = Stage(VisionLayer(1), RandomScore(), TopK(), Drop(), Budget(0.5), restore=3)
    with torch.no_grad():
        before = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], output_hidden_states=True)
        with vlprune.apply(model, "random", keep=0.4, point="vision:1") as handle:
            model(**inputs)
            assert [record.point for record in handle.report().points] == ["vision:1", "vision:1", "before_llm"]
            kept = [item.modality for record in handle.trace.points[:2] for item in record.items]
            assert sorted(kept) == ["image", "image", "video"]
            after = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], output_hidden_states=True)
        assert [state.shape for state in after.hidden_states] == [state.shape for state in before.hidden_states]
        assert torch.equal(after.hidden_states[1], before.hidden_states[1])
        with vlprune.apply(model, PruningMethod("skip", (stage,))) as handle:
            model(**inputs)
            assert [record.point for record in handle.report().points] == ["vision:1", "vision:1"]       # nothing is missing behind the tower
            patches = inputs["pixel_values"].shape[0] + inputs["pixel_values_videos"].shape[0]
            assert handle.trace.vision_tokens[0] == handle.trace.vision_tokens[3] == patches
            assert handle.trace.vision_tokens[1] < patches
