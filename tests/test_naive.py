"""Methods that change kept tokens, against plain loops over tokens: where "drop equals mask" does not hold, this takes its place.

``tests/naive/NAME.py`` (named as the method's file) has ``reference(stage, inputs, number)`` for one item. Parametrised from the registry: a
merging method without one fails.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from vlprune.method import ModelFacts
from vlprune.protocols import DECODER_KINDS, VISION_KINDS, ScoreInputs, Tap
from vlprune.tokens import raster_grid

METHODS = [name for name in vlprune.list_methods("visual") if not vlprune.get_method(name).exact]
FACTS = ModelFacts(
    decoder_layers=12, vision_layers=8, feature_layer=6, global_vision_layers=tuple(range(8)), has_cls=True, signals=frozenset((*VISION_KINDS, *DECODER_KINDS))
)
ITEMS, TEXT, WIDTH, TOWER = 3, 7, 24, 20
GRIDS = {"image": [(1, 6, 6), (1, 5, 8)], "video": [(6, 4, 4), (4, 3, 5)]}


def signal_for(tap: Tap, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a kind's shape; shares of attention are positive and sum to one."""
    rows, count = tokens.shape[:2]
    if tap.kind.startswith("text_") and tap.kind not in ("text_rows", "text_mass", "text_max"):
        shape = (rows, TEXT) if tap.kind == "text_key_l1" else (rows, TEXT, WIDTH)
        values = torch.randn(shape, generator=generator)
        return values.abs() if tap.kind == "text_key_l1" else values
    width = {"vision_keys": 12, "vision_keys_all": 16, "vision_states": TOWER, "cls_state": TOWER, "pixels": 48, "normed": WIDTH}.get(tap.kind)
    if tap.kind == "transition":
        return torch.rand(rows, count, 6, generator=generator) + 0.1
    if width is None:
        return torch.rand(rows, count, generator=generator).softmax(dim=-1)
    values = torch.randn(rows, count, width, generator=generator)
    return values[:, :1].expand(-1, count, -1).contiguous() if tap.kind == "cls_state" else values


def inputs_for(stage: Any, shape: tuple[int, int, int], modality: str, count: int, seed: int, num_keep: int | None = None) -> ScoreInputs:
    """Random items of one shape with every signal that the stage asks for; groups of tokens are alike, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    grid = raster_grid(*shape)
    total = grid.shape[0]
    scenes = torch.randn(ITEMS, 4, WIDTH, generator=generator)
    which = torch.randint(4, (ITEMS, total), generator=generator)
    tokens = torch.gather(scenes, 1, which[..., None].expand(-1, -1, WIDTH)) + 0.4 * torch.randn(ITEMS, total, WIDTH, generator=generator)
    original = torch.stack([torch.randperm(total, generator=generator)[:count].sort().values for _ in range(ITEMS)])
    tokens = torch.gather(tokens, 1, original[..., None].expand(-1, -1, WIDTH))
    projector = torch.randn(TOWER, WIDTH, generator=generator)
    frames = shape[0] if modality == "video" else 1
    return ScoreInputs(
        tokens=tokens,
        num_keep=min(count, stage.budget.num_keep(total, frames)) if num_keep is None else num_keep,
        grid=grid[original],
        original=original,
        num_original=total,
        modality=modality,
        signals={tap: signal_for(tap, tokens, generator) for tap in stage.needs},
        text_valid=torch.arange(TEXT)[None] < torch.tensor([[TEXT], [TEXT - 2], [3]]),
        project=lambda features: torch.tanh(features @ projector.to(features)),
    )


def one(inputs: ScoreInputs, row: int) -> ScoreInputs:
    """A single item of a batch."""

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row : row + 1]

    return replace(
        inputs,
        tokens=inputs.tokens[row : row + 1],
        grid=pick(inputs.grid),
        original=pick(inputs.original),
        text_valid=pick(inputs.text_valid),
        sizes=pick(inputs.sizes),
        signals={tap: value[row : row + 1] for tap, value in inputs.signals.items()},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_merging_equals_loops_over_tokens(method: str, seed: int) -> None:
    card = vlprune.get_method(method)
    options = dict(card.test_options)
    built = card.build(FACTS, 0.4, **options)
    if built.patch_bypasses and not built.stages:
        pytest.skip("drops and merges nothing; tests/test_method_tower.py compares its blocks with loops")
    stem = card.build.__module__.rpartition(".")[2]
    naive = importlib.import_module(f"tests.naive.{stem}")
    modality = "video" if card.modality == "video" else "image"
    checked = 0
    for shape in GRIDS[modality]:
        total, count = raster_grid(*shape).shape[0], raster_grid(*shape).shape[0]
        for number, stage in enumerate(built.stages):
            if stage.reducer.exact:
                count = min(count, stage.budget.num_keep(total, shape[0] if modality == "video" else 1))
                continue
            inputs = inputs_for(stage, shape, modality, count, 100 * seed + number)
            selection = stage.selector(stage.scorer(inputs).float(), inputs)
            reduced = stage.reducer(inputs, selection)
            assert reduced.tokens is not None
            for row in range(ITEMS):
                kept, tokens = naive.reference(stage, one(inputs, row), number)
                assert selection.keep_indices[row].tolist() == list(kept)
                torch.testing.assert_close(reduced.tokens[row].float(), tokens.float(), rtol=1e-4, atol=1e-4)
            count = selection.keep_indices.shape[1]
            checked += 1
    assert checked
