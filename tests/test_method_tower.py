"""Methods inside vision towers with given weights, or for training: hand-worked cases, the laws on tiny towers, option errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlprune
from tests.oracle import decoder_of, masked_run, snapshot, tower_columns
from tests.tiny import families
from tests.tiny_vit import DEPTH, TinyVit, vit_families
from vlprune.adapter import find_adapter
from vlprune.errors import NotFiniteError, OptionError, UnsupportedPointError
from vlprune.method import ModelFacts, Stage
from vlprune.methods.aclip import AttentionRecord, attentive_mask, ema_update
from vlprune.methods.dynamicvit import dynamicvit, untrained
from vlprune.methods.dyt import dyt
from vlprune.methods.patchdropout import FreshRandomScore, patchdropout
from vlprune.methods.skipvit import skipvit
from vlprune.points import LLMLayer, VisionLayer
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.reducers import Drop
from vlprune.scorers.constant import Constant
from vlprune.selectors import TopK
from vlprune.selectors.cell_topk import CellTopK
from vlprune.tokens import raster_grid

FACTS = ModelFacts(vision_layers=12, feature_layer=11, global_vision_layers=tuple(range(12)), has_cls=True)
TOWERS = ["vit", "clip_vision", "siglip_vision", "timm_token", "timm_registers", "open_clip_sequence_first"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def tower(name: str) -> TinyVit:
    family = vit_families()[name]
    if family.missing:
        pytest.skip(family.missing)
    return family


def run(family: TinyVit, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return family.run(model, pixels)


def run_masked(family: TinyVit, model: nn.Module, pixels: Tensor, gone: list[Tensor]) -> dict[str, Tensor]:
    with family.hidden_columns(model, gone):
        return run(family, model, pixels)


def numbered(num_tokens: int, num_keep: int, scores: Any = None, grid: Tensor | None = None) -> ScoreInputs:
    tokens = torch.zeros(1, num_tokens, 1) if scores is None else torch.as_tensor(scores)[None, :, None]
    return ScoreInputs(tokens=tokens, num_keep=num_keep, grid=None if grid is None else grid[None], num_original=num_tokens)


# DynamicViT


def weights(width: int, stages: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as a trained model has it, in an order that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    names = {"in.0": (width,), "in.1": (width, width), "out.0": (width // 2, width), "out.2": (width // 4, width // 2), "out.4": (2, width // 4)}
    found = {"blocks.0.norm1.weight": torch.ones(3), "blocks.0.norm1.bias": torch.ones(3)}
    for stage in reversed(range(stages)):
        for name, shape in reversed(names.items()):
            found[f"score_predictor.{stage}.{name}.weight"] = torch.randn(shape, generator=generator)
            found[f"score_predictor.{stage}.{name}.bias"] = torch.randn(shape[:1], generator=generator)
    return found


def test_the_predictor_equals_a_module_written_out() -> None:
    state, tokens = weights(8, 3), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    for number, stage in enumerate(dynamicvit(FACTS, predictor=state).stages):
        local = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        head = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 2), nn.LogSoftmax(dim=-1))
        local.load_state_dict({f"{k}.{p}": state[f"score_predictor.{number}.in.{k}.{p}"] for k in (0, 1) for p in ("weight", "bias")})
        head.load_state_dict({f"{k}.{p}": state[f"score_predictor.{number}.out.{k}.{p}"] for k in (0, 2, 4) for p in ("weight", "bias")})
        with torch.no_grad():
            z = local(tokens)
            wanted = head(torch.cat([z[..., :4], z[..., 4:].mean(1, keepdim=True).expand(-1, 5, -1)], dim=-1))[..., 0]
        torch.testing.assert_close(stage.scorer(ScoreInputs(tokens=tokens, num_keep=2)), wanted)


def test_dynamicvit_leaves_the_published_counts_at_the_published_places() -> None:
    method = dynamicvit(FACTS, predictor=untrained())
    assert [stage.point.label for stage in method.stages] == ["vision:3", "vision:6", "vision:9"]
    assert [stage.budget.num_keep(196) for stage in method.stages] == [137, 96, 67]
    for rho in (0.9, 0.8, 0.6, 0.5):
        counts = [stage.budget.num_keep(196) for stage in dynamicvit(FACTS, round(rho**3, 9), predictor=untrained()).stages]
        assert counts == [int(196 * rho), int(196 * round(rho**2, 9)), int(196 * round(rho**3, 9))]
    assert [stage.budget.num_keep(196) for stage in dynamicvit(FACTS, (150, 100, 50), predictor=untrained()).stages] == [150, 100, 50]
    assert all(stage.budget.is_everything for stage in dynamicvit(FACTS, 1.0, predictor=untrained()).stages)


def test_predictors_from_a_file_a_module_or_one_for_each_stage(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state, tokens = weights(8, 3), torch.randn(1, 6, 8)
    save_file(state, tmp_path / "w.safetensors")
    module = nn.Module()
    module.score_predictor = nn.ModuleList()
    for stage in range(3):
        part = nn.Module()
        part.a = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        part.b = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 2))
        for mine, name in ((part.a[0], "in.0"), (part.a[1], "in.1"), (part.b[0], "out.0"), (part.b[2], "out.2"), (part.b[4], "out.4")):
            mine.load_state_dict({p: state[f"score_predictor.{stage}.{name}.{p}"] for p in ("weight", "bias")})
        module.score_predictor.append(part)
    each = [{name: value for name, value in state.items() if f"predictor.{stage}." in name} for stage in range(3)]
    for source in (tmp_path / "w.safetensors", str(tmp_path / "w.safetensors"), module, each, list(module.score_predictor)):
        for one, two in zip(dynamicvit(FACTS, predictor=source).stages, dynamicvit(FACTS, predictor=state).stages, strict=True):
            inputs = ScoreInputs(tokens=tokens, num_keep=2)
            assert torch.equal(one.scorer(inputs), two.scorer(inputs))


def test_the_work_of_the_predictors_is_counted() -> None:
    family = tower("vit")
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, "dynamicvit", keep=0.3, predictor=weights(32, 1), layers=(2,)) as handle:
        run(family, model, pixels)
        assert handle.report().parts["scorer"] == 2 * 2 * 36 * (32 * 32 + 16 * 32 + 8 * 16 + 2 * 8)


# DyT


def routed(blocks: range, width: int = 32, narrow: int = 5, scale: float | None = None) -> dict[str, Tensor]:
    """A state dict with routers and adapters, among weights of a block."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {"head.weight": torch.ones(3, width), "patch_embed.proj.weight": torch.ones(width, 3, 4, 4)}
    for block in blocks:
        shapes = {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        for name, shape in {**shapes, "select.head": (1, width), "side.down": (narrow, width), "side.up": (width, narrow)}.items():
            found[f"blocks.{block}.{name}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            found[f"blocks.{block}.{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.1
        if scale is not None:
            found[f"blocks.{block}.side.scale"] = torch.tensor([scale])
    return found


@pytest.mark.parametrize("keep", [0.4, 9, "router"])
@pytest.mark.parametrize("name", [*TOWERS, "clip", "siglip_classifier", "timm_avg", "open_clip_custom_text", "open_clip_tokens"])
def test_skipped_mlps_equal_masked_ones(name: str, keep: Any) -> None:
    """Against the whole MLP with a factor of 0 or 1 for each patch, found by a loop over patches, plus the adapter."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(3)
    state = routed(range(DEPTH), scale=0.5)
    blocks, seen, runs = family.blocks(model), {}, [[] for _ in range(DEPTH)]

    def note(number: int) -> Any:
        return lambda module, args: seen.update({number: args[0].transpose(0, 1) if family.sequence_first else args[0]}) and None

    def masked_mlp(number: int) -> Any:
        def layer(x: Tensor, which: str) -> Tensor:
            return F.linear(x, state[f"blocks.{number}.{which}.weight"], state[f"blocks.{number}.{which}.bias"])

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            states = seen[number]
            factor = torch.ones(states.shape[:2])
            for row, tokens in enumerate(states):
                values = [layer(token, "select.head").item() for token in tokens[family.prefix :]]
                order = sorted(range(len(values)), key=lambda patch: -values[patch])
                count = len(values) if keep == "router" else keep if isinstance(keep, int) else round(keep * len(values))
                chosen = sorted(patch for patch in order[:count] if keep != "router" or torch.tensor(values[patch]).sigmoid() > 0.5)
                factor[row, family.prefix :] = 0
                factor[row, [family.prefix + patch for patch in chosen]] = 1
                runs[number].append(chosen)
            states = 0.5 * layer(layer(states, "side.down").relu(), "side.up")
            added = factor[..., None] * (output.transpose(0, 1) if family.sequence_first else output) + states
            return added.transpose(0, 1) if family.sequence_first else added

        return hook

    hooks = []
    for number, block in enumerate(blocks):
        norm = next(getattr(block, key) for key in ("norm2", "layernorm_after", "layer_norm2", "ln_2") if hasattr(block, key))
        hooks.append(norm.register_forward_pre_hook(note(number)))
        hooks.append(getattr(block, "ls2", getattr(block, "ls_2", block.mlp)).register_forward_hook(masked_mlp(number)))
    reference = run(family, model, pixels)
    for hook in hooks:
        hook.remove()
    before, snap = run(family, model, pixels), snapshot(model)
    with vlprune.apply(model, "dyt", keep=keep, weights=state) as handle:
        pruned = run(family, model, pixels)
        report = handle.report()
    expected = runs[-DEPTH:]                                             # a family may run its tower more than once
    assert [record.point for record in report.points] == [f"vision_mlp:{number}" for number in range(DEPTH)]
    assert [[kept.tolist() for kept in record.keep_indices] for record in report.points] == [entry[-3:] for entry in expected]
    assert {key: value.shape for key, value in pruned.items()} == {key: value.shape for key, value in before.items()}
    for key, value in pruned.items():
        torch.testing.assert_close(value, reference[key], **TOLERANCE)
        if key not in ("text", "tokens.0"):
            assert not torch.allclose(value, before[key], atol=1e-3)
    assert snapshot(model) == snap
    assert all(torch.equal(value, before[key]) for key, value in run(family, model, pixels).items())
    with vlprune.apply(model, "dyt", keep=1.0, weights=state):
        assert all(torch.equal(value, before[key]) for key, value in run(family, model, pixels).items())


def test_skipped_mlps_save_what_the_report_says() -> None:
    family = tower("vit")
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, "dyt", keep=9, weights=routed(range(DEPTH))) as handle:
        run(family, model, pixels)
        report = handle.report()
    assert report.flops_dense - report.parts["vision"] == DEPTH * 2 * (36 - 9) * 2 * 2 * 32 * 48
    assert report.parts["scorer"] == DEPTH * 2 * 2 * (36 * 32 + 37 * 2 * 5 * 32)


def test_dyt_finds_its_weights_by_block_and_shape() -> None:
    state = routed(range(2, 4), scale=0.25)
    assert [bypass.label for bypass in dyt(FACTS, weights=state).patch_bypasses] == ["vision_mlp:2", "vision_mlp:3"]
    adapter, tokens = dyt(FACTS, weights=state, activation="gelu", scale=2.0).patch_bypasses[0].always, torch.randn(1, 3, 32)
    assert adapter is not None
    down, up = ((state[f"blocks.2.side.{part}.weight"], state[f"blocks.2.side.{part}.bias"]) for part in ("down", "up"))
    torch.testing.assert_close(adapter(tokens), 2 * F.linear(F.gelu(F.linear(tokens, *down)), *up))
    assert adapter(tokens.to(torch.bfloat16)).dtype == torch.bfloat16
    alone = {name: value for name, value in state.items() if "side" not in name}
    assert [bypass.always for bypass in dyt(FACTS, weights=alone).patch_bypasses] == [None, None]
    router = nn.ModuleList(nn.Linear(32, 1) for _ in range(12))
    assert len(dyt(FACTS, weights=router).patch_bypasses) == 12


def test_a_tower_of_a_larger_model_skips_no_mlp() -> None:
    model = families()["llava"].build()
    with pytest.raises(UnsupportedPointError, match="skip the MLP"):
        vlprune.apply(model, "dyt", keep=0.5, weights=(lambda tokens: tokens[..., 0], None))


def test_a_block_without_a_norm_in_front_of_its_mlp_is_an_error() -> None:
    model = tower("timm_parallel").build()
    with pytest.raises(UnsupportedPointError, match="none of its blocks"):
        vlprune.apply(model, "dyt", keep=0.5, weights=(lambda tokens: tokens[..., 0], None))


def test_router_values_that_are_no_numbers_are_an_error() -> None:
    family = tower("vit")
    model, pixels = family.build(), family.pixels(1)
    with vlprune.apply(model, "dyt", weights=(lambda tokens: tokens[..., 0] * torch.nan, None)), pytest.raises(NotFiniteError, match="vision_mlp:0"):
        run(family, model, pixels)


def test_dropping_and_skipping_go_together() -> None:
    family = tower("vit")
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, ["dyt", "cls_attention"], dyt={"keep": 9, "weights": routed(range(DEPTH))}, cls_attention={"keep": 0.5, "layer": 2}) as handle:
        run(family, model, pixels)
        report = handle.report()
    assert [(record.point, record.visual_before, record.visual_kept) for record in report.points] == [
        ("vision_mlp:0", 72, 18), ("vision_mlp:1", 72, 18), ("vision:2", 72, 36), ("vision_mlp:2", 36, 18), ("vision_mlp:3", 36, 18),
    ]  # fmt: skip
    left = [set(indices.tolist()) for indices in report.points[2].keep_indices]
    assert all(set(indices.tolist()) <= left[row] for record in report.points[3:] for row, indices in enumerate(record.keep_indices))


# A-CLIP, PatchDropout


def test_cells_stay_or_leave_together_and_the_last_is_filled_up() -> None:
    scores = [1.0, 1, 0, 9, 0, 2, 0, 0, 5, 1, 2, 2, 1, 1, 3, 3]          # 4 x 4; means of the cells: 1, 2.25, 2, 2.5
    grid = raster_grid(1, 4, 4)
    for num_keep, kept in ((4, [10, 11, 14, 15]), (5, [3, 10, 11, 14, 15]), (8, [2, 3, 6, 7, 10, 11, 14, 15]), (9, [2, 3, 6, 7, 8, 10, 11, 14, 15])):
        assert CellTopK()(torch.tensor([scores]), numbered(16, num_keep, grid=grid)).keep_indices.tolist() == [kept]
    wide = torch.rand(3, 35, generator=torch.Generator().manual_seed(0))      # 5 x 7: cells at the border are smaller
    inputs = ScoreInputs(tokens=torch.zeros(3, 35, 1), num_keep=11, grid=raster_grid(1, 5, 7).expand(3, -1, -1))
    assert torch.equal(CellTopK(1)(wide, inputs).keep_indices, TopK()(wide, inputs).keep_indices)
    kept = CellTopK(2)(wide, inputs).keep_indices
    for row in range(3):
        cells = {}
        for token in range(35):
            cells.setdefault((token // 7 // 2, token % 7 // 2), []).append(token)
        order = sorted(cells.values(), key=lambda tokens: -sum(wide[row, t].item() for t in tokens) / len(tokens))
        wanted = [t for tokens in order for t in sorted(tokens, key=lambda t: -wide[row, t].item())][:11]
        assert kept[row].tolist() == sorted(wanted)


def test_the_published_share_of_aclip_is_25_cells_of_49() -> None:
    stage = attentive_mask(FACTS, source=lambda inputs: torch.rand(2, 196)).stages[0]
    inputs = ScoreInputs(tokens=torch.zeros(2, 196, 1), num_keep=stage.budget.num_keep(196), grid=raster_grid(1, 14, 14).expand(2, -1, -1))
    kept = stage.selector(stage.scorer(inputs), inputs).keep_indices
    assert kept.shape == (2, 100)
    for row in kept:
        cells = torch.bincount(row // 14 // 2 * 7 + row % 14 // 2, minlength=49)
        assert sorted(set(cells.tolist())) == [0, 4]


def test_a_model_that_is_its_own_teacher_reads_every_block_before_the_point() -> None:
    stage = attentive_mask(FACTS, layer=3).stages[0]
    assert stage.needs == (Tap("cls_row", 0), Tap("cls_row", 1), Tap("cls_row", 2))
    signals = {tap: torch.tensor([[0.1, 0.2 * number]]) for number, tap in enumerate(stage.needs)}
    torch.testing.assert_close(stage.scorer(ScoreInputs(tokens=torch.zeros(1, 2, 1), num_keep=1, signals=signals)), torch.tensor([[0.1, 0.2]]))
    assert attentive_mask(FACTS).stages[0].point == VisionLayer(4)
    assert attentive_mask(FACTS, source=lambda inputs: inputs.tokens[..., 0]).stages[0].point == VisionLayer(0)


@pytest.mark.parametrize("name", TOWERS)
def test_patches_leave_in_training_only(name: str) -> None:
    family = tower(name)
    model, pixels = family.build(), family.pixels(4)
    before = run(family, model, pixels)
    with vlprune.apply(model, "patchdropout", keep=0.25, seed=3) as handle:
        assert all(torch.equal(value, before[key]) for key, value in run(family, model, pixels).items())
        assert handle.report().points == []
        model.train()
        draws = []
        for _ in range(2):
            run(family, model, pixels)
            draws.append([indices.tolist() for indices in handle.report().points[0].keep_indices])
        model.eval()
        assert all(torch.equal(value, before[key]) for key, value in run(family, model, pixels).items())
    kept = [indices for draw in draws for indices in draw]
    assert all(len(indices) == int(0.25 * family.num_patches) and indices == sorted(set(indices)) for indices in kept)
    assert len({tuple(indices) for indices in kept}) == 8                # another draw for every picture and every step
    with vlprune.apply(model.train(), "patchdropout", keep=0.25, seed=3) as handle:
        run(family, model, pixels)
        assert [indices.tolist() for indices in handle.report().points[0].keep_indices] == draws[0]
    model.eval()


def test_every_patch_is_dropped_equally_often() -> None:
    scorer, inputs = FreshRandomScore(0), ScoreInputs(tokens=torch.zeros(1000, 16, 1), num_keep=4)
    counts = torch.bincount(TopK()(scorer(inputs), inputs).keep_indices.flatten(), minlength=16)
    assert ((counts - 250).abs() < 5 * (1000 * 0.25 * 0.75) ** 0.5).all()


def test_gradients_flow_to_what_stays() -> None:
    family = tower("vit")
    model, pixels = family.build().train(), family.pixels(2)
    with vlprune.apply(model, "patchdropout", keep=0.25) as handle:
        pixels.requires_grad_()
        family.run(model, pixels)["pooled"].square().sum().backward()
        kept = handle.report().points[0].keep_indices
    moved = F.max_pool2d(pixels.grad.abs().amax(dim=1), 4).flatten(1) > 0
    assert [row.nonzero().flatten().tolist() for row in moved] == [indices.tolist() for indices in kept]


@pytest.mark.parametrize("name", ["vit", "clip_vision", "timm_token"])
def test_a_teacher_says_what_stays(name: str) -> None:
    family = tower(name)
    model, pixels = family.build(eager=family.eager is not None), family.pixels(3)
    teacher, record = copy.deepcopy(model), AttentionRecord()
    with vlprune.apply(teacher, record.card), vlprune.apply(model.train(), "aclip", keep=0.5, side=1, source=record) as handle:
        with pytest.raises(OptionError, match="has not run"):
            run(family, model, pixels)
        run(family, teacher, pixels)
        scores = record.scores
        assert scores is not None
        with torch.no_grad():
            (model if name != "timm_token" else model.forward_features)(pixels)
        kept = handle.report().points[0]
        assert record.scores is None
        teacher_scores = scores.clone()
        record.scores = scores[:2]
        with pytest.raises(OptionError, match="score those"):
            run(family, model, pixels)
    assert kept.point == "vision:0"
    assert torch.equal(torch.stack(kept.keep_indices), teacher_scores.topk(kept.visual_kept // 3).indices.sort().values)
    if name != "timm_token":
        with torch.no_grad():
            maps = model.eval()(pixel_values=pixels, output_attentions=True).attentions
        wanted = torch.stack(maps[:-1]).mean(dim=(0, 2))[:, 0, 1:]
        torch.testing.assert_close(teacher_scores, wanted, rtol=1e-4, atol=1e-5)


def test_the_teacher_follows_slowly() -> None:
    student, teacher = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(5.0)
    ema_update(teacher, student, 0.75)
    assert teacher.weight.tolist() == [1.5, 1.5]
    assert teacher.running_mean.tolist() == [5.0, 5.0]


def test_a_stage_for_training_is_for_vision_points() -> None:
    with pytest.raises(OptionError, match="vision points"):
        Stage(LLMLayer(2), Constant(), TopK(), Drop(), vlprune.Budget(0.5), training=True)


# SkipViT


@pytest.mark.parametrize("name", TOWERS)
def test_skipping_equals_hiding_and_holding_still(name: str) -> None:
    """While they are away patches are no keys and keep their state; then they take part again."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, "skipvit", keep=0.4, layer=1, back=3) as handle:
        pruned = run(family, model, pixels)
        (record,) = handle.report().points
        assert handle.trace is not None
        full, short = family.prefix + family.num_patches, family.prefix + round(0.4 * family.num_patches)
        assert handle.trace.vision_tokens == [2 * full, 2 * short, 2 * short, 2 * full]
    assert record.visual_kept == 2 * round(0.4 * family.num_patches)
    away = torch.ones(2, full, dtype=torch.bool)
    away[:, : family.prefix] = False
    for row, kept in enumerate(record.keep_indices):
        away[row, kept + family.prefix] = False
    nobody, held = torch.zeros_like(away), {}
    blocks = family.blocks(model)

    def first(output: Any) -> Tensor:
        states = output[0] if isinstance(output, tuple) else output
        return states.transpose(0, 1) if family.sequence_first else states

    def keep_still(module: nn.Module, args: Any, output: Any) -> Any:
        states = torch.where(away[..., None], held["states"], first(output))
        states = states.transpose(0, 1) if family.sequence_first else states
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks = [blocks[0].register_forward_hook(lambda module, args, output: held.update(states=first(output)))]
    hooks += [block.register_forward_hook(keep_still, prepend=True) for block in blocks[1:3]]   # before transformers records the output
    reference = run_masked(family, model, pixels, [nobody, away, away, nobody])
    for hook in hooks:
        hook.remove()
    for key, value in pruned.items():
        if not key.startswith("tokens.map") and not key.startswith("tokens.list"):
            torch.testing.assert_close(value, reference[key], **TOLERANCE)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen3_vl"])
def test_skipping_in_the_tower_of_a_larger_model(name: str) -> None:
    """The same, with several pictures of different shapes, seen in the logits; nothing is missing in the LLM."""
    family = families()[name]
    model = family.build()
    inputs = family.prompt([[3, ("image", 0), 4], [2, ("image", family.shapes.get("image", 1) - 1), 3, ("image", 0), 5]])
    blocks = find_adapter(model).blocks
    with torch.no_grad(), vlprune.apply(model, "skipvit", keep=0.4, layer=1, back=3) as handle:
        pruned = model(**inputs).logits
        trace = handle.trace
        (record,) = [record for record in trace.points if record.point == "vision:1"]
    assert record.visual_kept < record.visual_before
    counts = trace.vision_tokens
    assert counts[0] == counts[3] > counts[1] == counts[2]
    columns = {block: gone for block, gone in tower_columns(trace, model).items() if block in (blocks[1], blocks[2])}
    held: dict[str, Tensor] = {}

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def keep_still(module: nn.Module, args: Any, output: Any) -> Any:
        gone, states = columns[module], first(output)
        away = torch.cat(gone) if isinstance(gone, list) else gone       # of tokens, in one sequence; or of patches, in a batch
        away = away.repeat_interleave(states.shape[0] // away.numel()) if states.dim() == 2 else away
        states = torch.where(away[..., None], held["states"], states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks = [blocks[0].register_forward_hook(lambda module, args, output: held.update(states=first(output)))]
    hooks += [block.register_forward_hook(keep_still, prepend=True) for block in blocks[1:3]]
    no_column = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    reference = masked_run(model, inputs, [no_column] * len(decoder_of(model).layers), tower=columns).logits
    for hook in hooks:
        hook.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(pruned[real], reference[real], rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        assert not torch.allclose(pruned[real], model(**inputs).logits[real], atol=1e-3)


# the laws


OPTIONS: dict[str, dict[str, Any]] = {name: dict(vlprune.get_method(name).test_options) for name in ("dynamicvit", "skipvit", "patchdropout", "aclip")}


@pytest.mark.parametrize("method", ["dynamicvit", "patchdropout", "aclip"])
def test_drop_equals_mask(method: str) -> None:
    family = tower("vit")
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, method, keep=0.4, **OPTIONS[method]) as handle:
        pruned = run(family, model, pixels)
        gone, now = [], torch.zeros(2, family.prefix + family.num_patches, dtype=torch.bool)
        for block in range(DEPTH):
            for record in handle.report().points:
                if record.point == f"vision:{block}":
                    for row, kept in enumerate(record.keep_indices):
                        now[row, family.prefix :] = True
                        now[row, kept + family.prefix] = False
            gone.append(now.clone())
    reference = run_masked(family, model, pixels, gone)
    torch.testing.assert_close(pruned["pooled"], reference["pooled"], **TOLERANCE)
    torch.testing.assert_close(pruned["tokens.last"][~now], reference["tokens.last"][~now], **TOLERANCE)


# options


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (dynamicvit, {}, "predictor= a state dict"),
        (dynamicvit, {"predictor": 3}, "a state dict"),
        (dynamicvit, {"predictor": "w.pth"}, "safetensors"),
        (dynamicvit, {"predictor": "nowhere.safetensors"}, "no such file"),
        (dynamicvit, {"predictor": {}}, "no weight"),
        (dynamicvit, {"predictor": {"predictor.0.weight": torch.ones(2)}}, "no bias"),
        (dynamicvit, {"predictor": weights(8, 2)}, "2 stages in it"),
        (dynamicvit, {"predictor": {"predictor.0.weight": torch.ones(2), "predictor.0.bias": torch.ones(2)}}, "shapes"),
        (dynamicvit, {"predictor": untrained(), "layers": (6, 3)}, "rising"),
        (dynamicvit, {"predictor": untrained(), "layers": (3, 12)}, "to 11"),
        (dynamicvit, {"predictor": untrained(), "keep": 20}, "3 stages"),
        (dynamicvit, {"predictor": untrained(), "keep": (0.5, 0.6, 0.1)}, "fall"),
        (dynamicvit, {"predictor": [untrained()] * 2}, "2 stages"),
        (dyt, {}, "weights= a state dict"),
        (dyt, {"weights": 3}, "a state dict"),
        (dyt, {"weights": routed(range(1)), "keep": "all"}, "'router'"),
        (dyt, {"weights": routed(range(1)), "keep": 0.0}, "share"),
        (dyt, {"weights": routed(range(1)), "activation": "tanh"}, "'gelu'"),
        (dyt, {"weights": routed(range(1)), "scale": "1"}, "scale='1'"),
        (dyt, {"weights": routed(range(13))}, "0 to 11"),
        (dyt, {"weights": {"head.weight": torch.ones(1, 4)}}, "no block"),
        (dyt, {"weights": [(len, None)] * 11}, "list of 12"),
        (dyt, {"weights": [len] * 12}, "list of 12"),
        (dyt, {"weights": {**routed(range(1)), "blocks.0.more.weight": torch.ones(1, 32)}}, "2 maps to one number"),
        (dyt, {"weights": {**routed(range(1)), "blocks.0.side.norm.weight": torch.ones(32)}}, "in a way not known"),
        (dyt, {"weights": {name: value for name, value in routed(range(1)).items() if name != "blocks.0.side.up.bias"}}, "no blocks.0.side.up.bias"),
        (skipvit, {"layer": 0}, "layer=0"),
        (skipvit, {"layer": 8, "back": 8}, "back=8"),
        (skipvit, {"back": 12}, "back=12"),
        (skipvit, {"layer": True}, "block number"),
        (patchdropout, {"seed": 1.5}, "int"),
        (patchdropout, {"when": "now"}, "'training'"),
        (patchdropout, {"keep": 0.0}, "share"),
        (attentive_mask, {"when": True}, "'training'"),
        (attentive_mask, {"layer": 0}, "with `source`"),
        (attentive_mask, {"layer": 12}, "to 11"),
        (attentive_mask, {"source": 3}, "function"),
        (attentive_mask, {"side": 0}, "side=0"),
    ],
)
def test_an_option_that_cannot_work_is_an_error(build: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        build(FACTS, **options)


@pytest.mark.parametrize("depth", [2, 3, 4, 24])
def test_defaults_fit_any_depth(depth: int) -> None:
    facts = ModelFacts(vision_layers=depth, feature_layer=depth - 1, has_cls=True)
    for name, options in OPTIONS.items():
        stages = vlprune.get_method(name).build(facts, **options).stages
        assert all(stage.point.layer < depth for stage in stages)
        assert all(tap.layer < stage.point.layer for stage in stages for tap in stage.needs)


def test_cells_without_a_grid_say_so() -> None:
    with pytest.raises(OptionError, match="no grid"):
        CellTopK()(torch.zeros(1, 4), numbered(4, 2))
    assert isinstance(CellTopK()(torch.zeros(1, 4), numbered(4, 2, grid=raster_grid(1, 2, 2))), Selection)
