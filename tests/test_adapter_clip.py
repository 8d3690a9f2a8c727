"""Pruning inside vision towers: the laws over every tiny tower of transformers, timm and open_clip, and what is special about each."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from tests.oracle import snapshot
from tests.tiny_vit import DEPTH, PATCH, TinyVit, vit_families
from vlprune.errors import MissingSignalError, NotFiniteError, OptionError, UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

FAMILIES = sorted(vit_families())
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"point": "vision:2"}),
    "uniform_first": ("uniform", {"point": "vision:0"}),
    "uniform_last": ("uniform", {"point": f"vision:{DEPTH - 1}"}),
    "cls": ("cls_attention", {}),
    "cls_twice": ("cls_attention", {"layers": (1, 3)}),
    "middle": ("random", {"point": "vision:1.mid"}),
    "middle_first": ("uniform", {"point": "vision:0.mid"}),
    "middle_last": ("random", {"point": f"vision:{DEPTH - 1}.mid"}),
}


def tower(name: str, case: str = "random") -> TinyVit:
    """The family, or skip with the reason."""
    family = vit_families()[name]
    if family.missing:
        pytest.skip(family.missing)
    if case.startswith("middle") and name == "timm_parallel":
        pytest.skip("attention and MLP side by side: there is no middle")
    if not family.taps and case.startswith("cls"):
        pytest.skip(f"{name} declares that its attention cannot be read")
    return family


def is_tokens(name: str) -> bool:
    """Outputs with a state for every token or patch."""
    return name.startswith("tokens.")


def run(family: TinyVit, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Without gradients."""
    with torch.no_grad():
        return family.run(model, pixels)


def gone_by_block(handle: vlprune.PruneHandle, family: TinyVit, rows: int) -> list[Tensor]:
    """(B, L) bool for every block, columns that left before its attention; and those that left at all."""
    assert handle.trace is not None
    gone = torch.zeros(rows, family.prefix + family.num_patches, dtype=torch.bool)
    result = []
    for block in range(DEPTH + 1):
        for record in handle.trace.points:
            if record.point in (f"vision:{block}", f"vision:{block - 1}.mid"):
                for row, kept in enumerate(record.kept):
                    stays = torch.zeros(family.num_patches, dtype=torch.bool)
                    stays[kept] = True
                    gone[row, family.prefix :] |= ~stays
        result.append(gone.clone())
    return result


def masked(family: TinyVit, model: nn.Module, pixels: Tensor, gone: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the untouched model with hidden columns, and what its last block returned."""
    seen = []
    handle = family.blocks(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output))
    try:
        with family.hidden_columns(model, gone):
            outputs = run(family, model, pixels)
    finally:
        handle.remove()
    return outputs, seen[0].transpose(0, 1) if family.sequence_first else seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_drop_equals_mask(name: str, case: str, attention: str) -> None:
    """Survivors at every block, and every pooled output, equal a full run that hides the dropped columns."""
    family = tower(name, case)
    if attention == "eager" and family.eager is None:
        pytest.skip("one attention implementation only")
    method, options = CASES[case]
    model, pixels = family.build(eager=attention == "eager"), family.pixels(3)
    with vlprune.apply(model, method, keep=0.4, **options) as handle:
        pruned = run(family, model, pixels)
        gone = gone_by_block(handle, family, 3)
    assert int((~gone[-1]).sum()) == 3 * (family.prefix + round(0.4 * family.num_patches))
    reference, last = masked(family, model, pixels, gone)
    stays = ~gone[-1]
    survivors = last[stays].unflatten(0, (3, -1))
    with torch.no_grad():
        pooled = family.pool(model, survivors) if family.pool is not None else reference
    compared = not any(not is_tokens(key) for key in pruned)
    for key, value in pruned.items():
        if is_tokens(key):
            where = stays if value.shape[1] == stays.shape[1] else stays[:, family.prefix :]
            torch.testing.assert_close(value[where], reference[key][where], **TOLERANCE)
        elif key in pooled:
            torch.testing.assert_close(value, pooled[key], **TOLERANCE)
            compared = True
    assert compared


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_keep_one_and_remove(name: str, case: str) -> None:
    """Shapes never change; ``keep=1.0`` and everything after ``remove`` are the untouched model, bit for bit."""
    family = tower(name, case)
    method, options = CASES[case]
    model, pixels = family.build(), family.pixels(2)
    before = run(family, model, pixels)                                  # transformers installs hooks of its own on first use
    state = snapshot(model)
    with vlprune.apply(model, method, keep=1.0, **options):
        untouched = run(family, model, pixels)
        assert all(torch.equal(untouched[key], before[key]) for key in before)
    if "layers" not in options:
        with vlprune.apply(model, method, keep=family.num_patches, **options):
            untouched = run(family, model, pixels)
            assert all(torch.equal(untouched[key], before[key]) for key in before)
    with vlprune.apply(model, method, keep=0.3, **options) as handle:
        pruned = run(family, model, pixels)
        report = handle.report()
    assert {key: value.shape for key, value in pruned.items()} == {key: value.shape for key, value in before.items()}
    assert any(not torch.allclose(pruned[key], before[key], atol=1e-3) for key in before)
    assert snapshot(model) == state
    after = run(family, model, pixels)
    assert all(torch.equal(after[key], before[key]) for key in before)
    if "text" in before:
        assert torch.equal(pruned["text"], before["text"])
    assert report.points[-1].visual_kept == 2 * round(0.3 * family.num_patches)
    assert report.points[0].visual_before == 2 * family.num_patches
    for record in report.points:
        assert record.point in handle.adapter.points()
        for indices in record.keep_indices:
            assert indices.dtype == torch.int64
            assert bool((indices.diff() > 0).all())
    assert "vision:" in str(report)


@pytest.mark.parametrize("case", ["random", "cls_twice"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_each_image_alone(name: str, case: str) -> None:
    """Also over several calls of different batch size on one handle."""
    family = tower(name, case)
    method, options = CASES[case]
    model, pixels = family.build(), family.pixels(3)
    with vlprune.apply(model, method, keep=0.4, **options) as handle:
        together = run(family, model, pixels)
        kept = [indices.tolist() for indices in handle.report().points[-1].keep_indices]
        for row in range(3):
            alone = run(family, model, pixels[row : row + 1])
            assert handle.report().points[-1].keep_indices[0].tolist() == kept[row]
            for key, value in alone.items():
                if key not in ("text", "logits") or family.prefix == 0 or value.shape[0] == 1:
                    torch.testing.assert_close(value[:1], together[key][row : row + 1] if key != "text" else together[key][:1], **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dropped_token_carries_the_state_it_left_with(name: str) -> None:
    """In every later recorded state."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    before = run(family, model, pixels)
    with vlprune.apply(model, "random", keep=0.4, point="vision:2") as handle:
        pruned = run(family, model, pixels)
        gone = gone_by_block(handle, family, 2)[-1]
    # states by number: entry i of hidden_states is the input of block i, map i the output of block i
    for left, later in (("tokens.2", "tokens.4"), ("tokens.map.1", "tokens.map.3"), ("tokens.list.1", "tokens.list.2")):
        if left in before and later in before:
            where = gone if before[left].shape[1] == gone.shape[1] else gone[:, family.prefix :]
            assert torch.equal(pruned[later][where], before[left][where])
            assert torch.equal(pruned[left], before[left])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exception_inside_leaves_nothing(name: str) -> None:
    """The next call is right, and ``remove`` restores the model."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    before = run(family, model, pixels)
    state = snapshot(model)
    with vlprune.apply(model, "random", keep=0.4, point="vision:1") as handle:
        right = run(family, model, pixels)
        trace = handle.trace

        def broken(module: nn.Module, args: Any) -> None:
            raise RuntimeError("broken block")

        hook = family.blocks(model)[2].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken block"):
            run(family, model, pixels)
        hook.remove()
        assert handle.trace is trace
        again = run(family, model, pixels)
        assert all(torch.equal(again[key], right[key]) for key in right)
    assert snapshot(model) == state
    after = run(family, model, pixels)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_threads_on_one_model(name: str) -> None:
    """Calls of different batch size at the same time do not see each other."""
    family = tower(name)
    model = family.build()
    batches = [family.pixels(2, seed=1), family.pixels(3, seed=2)]
    with vlprune.apply(model, "random", keep=0.4, point="vision:2"):
        alone = [run(family, model, pixels) for pixels in batches]
        failed: list[Any] = []

        def work(number: int) -> None:
            try:
                for _ in range(5):
                    out = run(family, model, batches[number])
                    assert all(torch.equal(out[key], alone[number][key]) for key in out)
            except Exception as error:  # a thread must report, not print
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.parametrize("name", ["clip_vision", "siglip_classifier", "open_clip_avg"])
def test_a_copy_of_a_pruned_model_prunes_too(name: str) -> None:
    """The hooks travel with the copy, and the two do not disturb each other."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    with vlprune.apply(model, "random", keep=0.4, point="vision:2"):
        pruned = run(family, model, pixels)
        copied = run(family, copy.deepcopy(model), pixels)
    assert all(torch.equal(copied[key], pruned[key]) for key in pruned)


@pytest.mark.parametrize("name", FAMILIES)
def test_default_method(name: str) -> None:
    """``vlprune.apply(model)`` does something sensible, or says what is missing."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    if not family.taps:
        with pytest.raises(MissingSignalError):
            vlprune.apply(model)
        return
    with vlprune.apply(model) as handle:
        run(family, model, pixels)
        report = handle.report()
    assert [record.point for record in report.points] == ["vision:1"]      # a third of four blocks
    assert report.points[0].visual_kept == 2 * round(0.7 * family.num_patches)
    assert 0 < report.flops_pruned < report.flops_dense
    vision = handle.adapter.dimensions()["vision"]
    full, short = family.prefix + family.num_patches, family.prefix + round(0.7 * family.num_patches)
    assert report.flops_dense == DEPTH * 2 * vision.layer_flops(full)
    assert report.parts["vision"] == 2 * (vision.layer_flops(full) + 3 * vision.layer_flops(short))
    assert handle.trace is not None
    assert handle.trace.vision_tokens == [2 * full, 2 * short, 2 * short, 2 * short]
    assert handle.trace.vision_sequences == 2


# training


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name: str) -> None:
    """Training forward: the gradient equals that of the run with hidden columns."""
    family = tower(name)
    if family.pool is not None:
        pytest.skip("its heads are compared in test_drop_equals_mask; gradients of CLS towers here")
    model, pixels = family.build(), family.pixels(2)
    model.train()
    key = "tokens.last" if "timm_unpooled" in name else next(k for k in ("logits", "embeds", "pooled", "features") if k in run(family, model, pixels))

    def gradient() -> list[Tensor]:
        model.zero_grad()
        out = family.run(model, pixels)[key]
        (out[:, 0] if out.dim() == 3 else out).square().sum().backward()
        return [parameter.grad.clone() for parameter in family.blocks(model)[0].parameters() if parameter.grad is not None]

    with vlprune.apply(model, "random", keep=0.4, point="vision:2") as handle:
        pruned = gradient()
        gone = gone_by_block(handle, family, 2)
    with family.hidden_columns(model, gone):
        reference = gradient()
    assert pruned
    for mine, theirs in zip(pruned, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "vit"])
def test_gradient_checkpointing_of_transformers(name: str) -> None:
    """The recomputation stays inside the hooks."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the name before transformers 5.2x
            enable()
        with vlprune.apply(model, "cls_attention", keep=0.4, layers=(1, 3)):
            model.zero_grad()
            if checkpointing and transformers_replays_hooks():
                with pytest.raises(UnsupportedCallError, match="Update transformers"):
                    model(pixel_values=pixels)
                return
            model(pixel_values=pixels).pooler_output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def transformers_replays_hooks() -> bool:
    """Before checkpointing moved inside the hooks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@pytest.mark.parametrize("name", ["timm_token", "open_clip_clip", "open_clip_timm"])
def test_gradient_checkpointing_elsewhere_is_refused(name: str) -> None:
    """Their checkpoints would run the hooks again; without gradients nothing is recomputed."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    visual = getattr(model, "visual", model)
    visual.set_grad_checkpointing(True)
    with vlprune.apply(model, "random", keep=0.4, point="vision:2"):
        with pytest.raises(UnsupportedCallError, match="checkpointing"):
            visual(pixels)
        with torch.no_grad():
            visual(pixels)


# signals


@dataclass(frozen=True)
class Probe:
    """Ranks by a signal and keeps what it was given."""

    needs: tuple[Tap, ...]
    seen: list[ScoreInputs] = field(default_factory=list, compare=False)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        self.seen.append(inputs)
        return inputs.signal(self.needs[0]) if self.needs else torch.arange(inputs.tokens.shape[1]).float().expand(inputs.tokens.shape[:2])


def probing(layer: int, *taps: Tap) -> tuple[vlprune.Stage, Probe]:
    """A stage before block ``layer``."""
    probe = Probe(taps)
    return vlprune.Stage(vlprune.VisionLayer(layer), probe, TopK(), Drop(), vlprune.Budget(0.6 if layer == 1 else 0.3)), probe


@pytest.mark.parametrize("name", ["clip_vision", "siglip_vision", "vit"])
def test_signals_are_those_of_the_model(name: str) -> None:
    """Against transformers' own attention maps, before and after a drop."""
    family = tower(name)
    has_cls = family.prefix == 1
    model, pixels = family.build(eager=True), family.pixels(2)
    kinds = ("column_mean", "cls_row") if has_cls else ("column_mean",)
    first, early = probing(1, *(Tap(kind, 0) for kind in kinds))
    second, late = probing(3, *(Tap(kind, layer) for layer in (2, 0) for kind in kinds), Tap("vision_keys", 2))
    with vlprune.apply(model, vlprune.PruningMethod("probe", (first, second))) as handle:
        run(family, model, pixels)
        gone = gone_by_block(handle, family, 2)
    with family.hidden_columns(model, gone), torch.no_grad():
        maps = model(pixel_values=pixels, output_attentions=True).attentions
    for probe, layer, source in ((early, 0, 0), (late, 2, 2), (late, 2, 0)):
        inputs = probe.seen[0]
        for kind in kinds:
            full = maps[source].mean(dim=1)                              # (B, L, L)
            rows = (~gone[source]).float()
            wanted = (full * rows[:, :, None]).sum(dim=1) / rows.sum(dim=1, keepdim=True) if kind == "column_mean" else full[:, 0]
            wanted = wanted[:, family.prefix :].gather(1, inputs.original)
            torch.testing.assert_close(inputs.signal(Tap(kind, source)), wanted, rtol=1e-4, atol=1e-5)
        assert bool((inputs.original.diff(dim=1) > 0).all())
        assert inputs.num_original == family.num_patches
        assert layer < 3
    keys = late.seen[0].signal(Tap("vision_keys", 2))
    assert keys.shape == (*late.seen[0].original.shape, 8)


READABLE = ("timm_token", "timm_registers", "timm_map", "open_clip_clip", "open_clip_sequence_first", "open_clip_qk_norm", "open_clip_timm")


@pytest.mark.parametrize("name", READABLE)
def test_signals_elsewhere(name: str) -> None:
    """Against attention computed the long way, from what the block's first norm returned."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    stage, probe = probing(3, Tap("column_mean", 2), Tap("vision_keys", 2))
    block: Any = family.blocks(model)[2]
    norm = block.ln_1 if hasattr(block, "ln_1") else block.norm1
    seen: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output.transpose(0, 1) if family.sequence_first else output))
    with vlprune.apply(model, vlprune.PruningMethod("probe", (stage,))):
        run(family, model, pixels)
    hook.remove()
    attn, states = block.attn, seen[0]
    with torch.no_grad():
        if isinstance(attn, nn.MultiheadAttention):
            given = states.transpose(0, 1) if family.sequence_first else states
            probabilities = attn(given, given, given, need_weights=True)[1]
        else:
            weight, bias = (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (attn.in_proj_weight, attn.in_proj_bias)
            queries, keys = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in nn.functional.linear(states, weight, bias).chunk(3, dim=-1)[:2])
            norms = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else (attn.ln_q, attn.ln_k)
            probabilities = (norms[0](queries) @ norms[1](keys).mT * 8**-0.5).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(probe.seen[0].signal(Tap("column_mean", 2)), probabilities.mean(dim=1)[:, family.prefix :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip_wide", "timm_wide"])
def test_grid_of_a_picture_that_is_not_square(name: str) -> None:
    """Rows and columns come from the patch embedding."""
    family = tower(name)
    model = family.build()
    stage, probe = probing(1)
    with vlprune.apply(model, vlprune.PruningMethod("probe", (stage,))) as handle:
        run(family, model, family.pixels(2))
        record = handle.report().points[0]
    grid = probe.seen[0].grid
    assert grid is not None
    assert grid.shape == (2, 48, 3)
    assert grid[0].amax(dim=0).tolist() == [0, family.size[0] // PATCH - 1, family.size[1] // PATCH - 1]
    assert record.items[0].grid is not None
    assert torch.equal(record.items[1].grid, grid[1])


# what cannot be


def test_what_a_tower_cannot_do_is_an_error() -> None:
    """Each names the remedy; nothing is half applied."""
    family = tower("clip_vision")
    model: Any = family.build()
    state = snapshot(model)
    with pytest.raises(UnsupportedPointError, match="vision:0"):
        vlprune.apply(model, "fastv")
    with pytest.raises(UnsupportedPointError, match="vision:3"):
        vlprune.apply(model, "random", point="vision:4")
    with pytest.raises(UnsupportedModelError, match="preserve"):
        vlprune.apply(model, "random", point="vision:1", positions="renumber")
    stage, _ = probing(1, Tap("column_mean", 1))
    with pytest.raises(MissingSignalError, match="column_mean@vision:1"):
        vlprune.apply(model, vlprune.PruningMethod("late", (stage,)))
    stage, _ = probing(1)
    gated = vlprune.Stage(stage.point, stage.scorer, stage.selector, stage.reducer, stage.budget, gate=lambda inputs: torch.ones(2, dtype=torch.bool))
    with pytest.raises(UnsupportedPointError, match="image by image"):
        vlprune.apply(model, vlprune.PruningMethod("adaptive", (gated,)))
    with pytest.raises(OptionError, match="layer="):
        vlprune.apply(model, "cls_attention", layer=0)
    with pytest.raises(OptionError, match="share"):
        vlprune.apply(model, "cls_attention", keep=9, layers=(1, 2))
    with pytest.raises(OptionError, match="one of them"):
        vlprune.apply(model, "cls_attention", layer=1, layers=(1, 2))
    assert snapshot(model) == state
    with vlprune.apply(model, "random", keep=0.5, point="vision:1"), pytest.raises(UnsupportedCallError, match="output_attentions"):
        model(pixel_values=family.pixels(1), output_attentions=True)
    with vlprune.apply(model, "random", keep=40, point="vision:1"), pytest.raises(OptionError, match="only 36"):
        model(pixel_values=family.pixels(1))


@pytest.mark.parametrize("name", ["clip_vision", "siglip", "timm_token", "open_clip_clip"])
def test_not_a_number(name: str) -> None:
    """Scores that are NaN are an error, not a choice."""
    family = tower(name)
    model, pixels = family.build(), family.pixels(2)
    pixels[1, 0, 0, 0] = float("nan")
    with vlprune.apply(model, "cls_attention"), pytest.raises(NotFiniteError, match="vision:1"):
        run(family, model, pixels)


def test_return_dict_false_has_full_length_states() -> None:
    """Plain tuples are put back too."""
    family = tower("siglip_vision")
    model: Any = family.build()
    with torch.no_grad(), vlprune.apply(model, "uniform", keep=0.4, point="vision:0"):
        named = model(pixel_values=family.pixels(2), output_hidden_states=True)
        plain = model(pixel_values=family.pixels(2), output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.last_hidden_state)
    assert torch.equal(plain[1], named.pooler_output)
    assert len(plain[2]) == DEPTH + 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain[2], named.hidden_states, strict=True))


def test_masks_given_to_the_tower_are_cut() -> None:
    """ViT takes padding, timm a map; a method that reads attention refuses them."""
    family = tower("vit")
    for eager in (False, True):
        model: Any = family.build(eager=eager)
        pixels, padding = family.pixels(2), torch.ones(2, 37, dtype=torch.long)
        padding[1, 20:] = 0
        with torch.no_grad(), vlprune.apply(model, "random", keep=0.4, point="vision:2") as handle:
            pruned = model(pixel_values=pixels, attention_mask=padding).pooler_output
            gone = gone_by_block(handle, family, 2)
        with torch.no_grad(), family.hidden_columns(model, [columns | (padding == 0) for columns in gone]):
            torch.testing.assert_close(pruned, model(pixel_values=pixels).pooler_output, **TOLERANCE)
    with vlprune.apply(model, "cls_attention"), pytest.raises(UnsupportedCallError, match="mask"):
        model(pixel_values=pixels, attention_mask=padding)


def test_timm_masks_and_patch_dropout() -> None:
    """Maps are cut in every form that timm takes; dropped patches nobody knows of are refused."""
    family = tower("timm_token")
    model: Any = family.build()
    pixels = family.pixels(2)
    allowed = torch.rand(37, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    allowed.fill_diagonal_(True)
    with torch.no_grad(), vlprune.apply(model, "random", keep=0.4, point="vision:2") as handle:
        pruned = [model(pixels, attn_mask=mask) for mask in (allowed, allowed.expand(2, 1, -1, -1))]
        causal = model(pixels, is_causal=True)
        gone = gone_by_block(handle, family, 2)
    biases = [torch.zeros(2, 1, 37, 37).masked_fill(~allowed | columns[:, None, None, :], -1e9) for columns in gone[:DEPTH]]
    hooks = [
        block.register_forward_pre_hook(lambda m, a, k, b=bias: (a, {"attn_mask": b}), with_kwargs=True)
        for block, bias in zip(model.blocks, biases, strict=True)
    ]
    with torch.no_grad():
        reference = model(pixels)
    for hook in hooks:
        hook.remove()
    for logits in pruned:
        torch.testing.assert_close(logits, reference, **TOLERANCE)
    assert torch.isfinite(causal).all()

    from timm.layers import PatchDropout

    model.patch_drop = PatchDropout(0.5)
    model.train()
    with vlprune.apply(model, "random", keep=0.4, point="vision:2"), pytest.raises(UnsupportedCallError, match="patch dropout"):
        model(pixels)
    model.eval()
    with vlprune.apply(model, "random", keep=0.4, point="vision:2"):
        model(pixels)


def test_timm_head_on_features_of_an_earlier_call() -> None:
    """Survivors belong to the features, not to the latest call; detached features keep them."""
    family = tower("timm_avg")
    model: Any = family.build()
    one, two = family.pixels(2, seed=1), family.pixels(2, seed=2)
    with vlprune.apply(model, "cls_attention", keep=0.4):
        wanted = [model(one), model(two)]
        features = [model.forward_features(one), model.forward_features(two)]
        for given, logits in zip(features, wanted, strict=True):
            assert torch.equal(model.forward_head(given), logits)
            assert torch.equal(model.forward_head(given.detach()), logits)
        foreign = torch.randn(2, 37, 32)
        with torch.no_grad():
            inside = model.forward_head(foreign)
    with torch.no_grad():
        assert torch.equal(model.forward_head(foreign), inside)


def test_methods_need_no_pixels_of_text_models() -> None:
    """A model without a vision tower is nobody's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99))
    with pytest.raises(UnsupportedModelError):
        vlprune.apply(text, "random", point="vision:1")


def test_cls_attention_keeps_what_cls_looks_at() -> None:
    """The choice itself, by hand."""
    family = tower("clip_vision")
    model: Any = family.build(eager=True)
    pixels = family.pixels(2)
    with torch.no_grad():
        maps = model(pixel_values=pixels, output_attentions=True).attentions
    with vlprune.apply(model, "cls_attention", keep=10, layer=3) as handle:
        run(family, model, pixels)
        kept = handle.report().points[0].keep_indices
    for row in range(2):
        assert kept[row].tolist() == sorted(maps[2][row, :, 0, 1:].mean(dim=0).topk(10).indices.tolist())


@dataclass(frozen=True)
class First:
    """Keeps the first K; with a `Stage.restore` the others come back."""

    needs: tuple[Tap, ...] = ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        return Selection(torch.arange(inputs.num_keep).expand(scores.shape[0], -1))


def test_skip_brings_tokens_back() -> None:
    """Tokens that sit out blocks 1 and 2 are back, unchanged, at block 3."""
    family = tower("clip_vision")
    model, pixels = family.build(), family.pixels(2)
    stage = vlprune.Stage(vlprune.VisionLayer(1), Probe(()), First(), Drop(), vlprune.Budget(0.5), restore=3)
    before = run(family, model, pixels)
    with vlprune.apply(model, vlprune.PruningMethod("skip", (stage,))) as handle:
        skipped = run(family, model, pixels)
        assert handle.trace is not None
        assert handle.trace.vision_tokens == [2 * 37, 2 * 19, 2 * 19, 2 * 37]
    assert {key: value.shape for key, value in skipped.items()} == {key: value.shape for key, value in before.items()}
    assert torch.equal(skipped["tokens.3"][:, 19:], before["tokens.1"][:, 19:])
    assert not torch.allclose(skipped["tokens.4"][:, 19:], before["tokens.1"][:, 19:])


# real weights

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pictures() -> tuple[Tensor, list[str]]:
    """A few photographs as the real ViT-tiny wants them."""
    from PIL import Image

    tensors, names = [], []
    for path in sorted((SHARED / "images").glob("*.*"))[:6]:
        picture = Image.open(path).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(224, 224, 3).permute(2, 0, 1)
        tensors.append(values.float() / 127.5 - 1)
        names.append(path.stem)
    return torch.stack(tensors), names


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder with real weights and pictures is not here")
@pytest.mark.parametrize("host", ["transformers", "timm"])
def test_real_vit_tiny(host: str) -> None:
    """Real weights on real photographs: nothing changes at ``keep=1``, and seven tenths of the patches are enough for most of them."""
    weights = SHARED / "weights"
    if host == "transformers":
        from transformers import ViTForImageClassification

        model: Any = ViTForImageClassification.from_pretrained(weights / "vit_tiny_patch16_224_hf", dtype=torch.float32)
    else:
        tower("timm_token")
        import timm
        from safetensors.torch import load_file

        model = timm.create_model("vit_tiny_patch16_224")
        model.load_state_dict({name: value.float() for name, value in load_file(weights / "vit_tiny_patch16_224.fp16.safetensors").items()})
    model.eval()
    pixels, _ = pictures()

    def logits() -> Tensor:
        with torch.no_grad():
            out = model(pixels)
        return out.logits if host == "transformers" else out

    before = logits()
    with vlprune.apply(model, keep=1.0):
        assert torch.equal(logits(), before)
    with vlprune.apply(model, keep=0.7) as handle:
        pruned = logits()
        report = handle.report()
    with vlprune.apply(model, "random", keep=0.7, point="vision:4"):
        baseline = logits()
    assert report.points[0].visual_kept == 6 * 137
    assert report.flops_pruned < 0.85 * report.flops_dense
    assert (pruned.argmax(dim=-1) == before.argmax(dim=-1)).float().mean() >= 0.8

    def distance(other: Tensor) -> float:
        return float((other.softmax(dim=-1) - before.softmax(dim=-1)).abs().sum())

    assert distance(pruned) < distance(baseline)
