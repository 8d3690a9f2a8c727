"""VideoLLM-MoD: the best tokens of every frame, the weight of what a block adds, routers as files, and their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import decoder_of
from tests.test_text_laws import FAMILIES, build, check_one_long_forward, prompts
from tests.tiny import families
from tests.tiny_text import text_families
from vlprune.budget import Budget
from vlprune.embedded_video import ASSETS
from vlprune.errors import OptionError
from vlprune.method import Bypass, ModelFacts
from vlprune.methods.videollm_mod import Untrained, routed_layers, videollm_mod
from vlprune.protocols import ScoreInputs
from vlprune.scorers.layer_routers import LayerRouters, LayerRouterScore
from vlprune.selectors import TopK
from vlprune.selectors.frame_topk import FrameTopK
from vlprune.tokens import raster_grid

ROWS: list[list[Any]] = [[3, ("video", 0), 9], [17]]


def inputs_of(grid: Tensor | None, keep: int, modality: str = "video") -> ScoreInputs:
    count = 12 if grid is None else grid.shape[1]
    return ScoreInputs(torch.zeros(1 if grid is None else grid.shape[0], count, 4), keep, grid=grid, modality=modality)


@pytest.mark.parametrize("keep", [1, 4, 6, 7, 11, 24])
def test_every_frame_keeps_its_best(keep: int) -> None:
    """As many as the others, and the rest to the best of those left: against a loop."""
    torch.manual_seed(keep)
    grid, scores = raster_grid(4, 2, 3).expand(3, -1, -1), torch.rand(3, 24)
    found = FrameTopK()(scores, inputs_of(grid, keep)).keep_indices
    for row in range(3):
        best = [sorted(range(6 * frame, 6 * frame + 6), key=lambda place: -float(scores[row, place])) for frame in range(4)]
        taken = [place for frame in best for place in frame[: keep // 4]]
        left = sorted((frame[keep // 4] for frame in best if keep // 4 < 6), key=lambda place: -float(scores[row, place]))
        assert found[row].tolist() == sorted(taken + left[: keep % 4])


def test_frames_of_different_sizes_and_no_frames() -> None:
    """Frames that have fewer tokens left give what they have; without frames, and for pictures, the best of all stay."""
    grid, scores = torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 0, 3]]]), torch.tensor([[0.1, 0.9, 0.8, 0.7, 0.6]])
    assert FrameTopK()(scores, inputs_of(grid, 4)).keep_indices.tolist() == [[0, 1, 2, 3]]
    for where, modality in ((None, "video"), (raster_grid(3, 2, 2)[None], "image")):
        values = torch.rand(1, 12)
        given = inputs_of(where, 5, modality)
        assert torch.equal(FrameTopK()(values, given).keep_indices, TopK()(values, given).keep_indices)


def test_each_frame_of_a_video_runs_its_share() -> None:
    """In layers with a router, and only there; all text runs."""
    tiny = families()["qwen3_vl"]
    model, inputs = tiny.build(), tiny.prompt(ROWS)
    with torch.no_grad(), vlprune.apply(model, "videollm_mod", keep=1 / 3, router=Untrained()) as handle:
        model(**inputs)
        report, trace = handle.report(), handle.trace
    assert trace is not None
    assert [record.point for record in report.bypasses] == ["llm:1.block", "llm:3.block"]
    assert trace.layout is not None
    (item,) = trace.layout.items
    for layer in (1, 3):
        ran = trace.ran[layer, "attn"]
        assert item.grid is not None
        frames = item.grid[:, 0]
        assert [int(ran[0, item.positions[frames == frame]].sum()) for frame in range(3)] == [2, 2, 2]
        text = ~trace.layout.visual_mask() & trace.layout.valid_mask()
        assert bool(ran[text].all())
        assert torch.equal(ran, trace.ran[layer, "mlp"])
    assert set(trace.ran) == {(layer, part) for layer in (1, 3) for part in ("attn", "mlp")}
    with torch.no_grad(), vlprune.apply(model, "videollm_mod", keep=1 / 3, router=Untrained()) as handle:
        model(**tiny.prompt(ROWS[:1]))                                   # in a batch, a row without pictures has its padding for keys
        report, length = handle.report(), handle.trace.layout.length  # type: ignore[union-attr]
    assert report.kv_bytes_pruned / report.kv_bytes_dense == pytest.approx((2 * length + 2 * (length - 12)) / (4 * length))
    assert report.flops_pruned < report.flops_dense


@pytest.mark.parametrize("options", [{"router": "random", "seed": 3}, {"kv": "project_only"}, {"layers": "deep", "weigh": "none"}, {"tokens": "all"}])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_options_obey_the_law(family: str, options: dict[str, Any]) -> None:
    assert family in FAMILIES
    tiny = text_families()[family]
    model = tiny.build()
    check_one_long_forward(tiny, model, build("videollm_mod", model, 0.5, **options), prompts(tiny))


def test_the_score_weighs_what_a_block_adds() -> None:
    """With ``weigh="sigmoid"``, by hand, in one layer: x + sigmoid(score) (block(x) - x) for visual tokens that run, block(x) for text."""
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[3, "image", 9]])
    router = LayerRouters(32, (1,), seed=5)
    seen: dict[str, Tensor] = {}
    layer: Any = decoder_of(model).layers[1]  # type: ignore[index]
    with torch.no_grad():
        outs = {}
        for weigh in ("none", "sigmoid", "through"):
            with vlprune.apply(model, "videollm_mod", keep=0.5, router=router, weigh=weigh, layers=[1]) as handle:
                hook = layer.register_forward_hook(lambda m, a, k, o: seen.update(x=a[0] if a else k["hidden_states"], out=o), with_kwargs=True)
                model(**inputs)
                hook.remove()
            outs[weigh] = seen["out"][0] if isinstance(seen["out"], tuple) and seen["out"][0].dim() == 3 else seen["out"]
            trace: Any = handle.trace
    factor = torch.sigmoid(router(seen["x"], 1))[..., None]
    chosen = (trace.ran[1, "attn"] & trace.layout.visual_mask())[..., None]
    expected = torch.where(chosen, seen["x"] + factor * (outs["none"] - seen["x"]), outs["none"])
    torch.testing.assert_close(outs["sigmoid"], expected)
    torch.testing.assert_close(outs["through"], outs["none"])
    assert not torch.allclose(outs["sigmoid"], outs["none"], atol=1e-2)


def test_the_weight_carries_the_gradient(tmp_path: Path) -> None:
    """To the routers of the layers that have one; and a file gives the same choice."""
    tiny = families()["qwen2_5_vl"]
    model, inputs = tiny.build(), tiny.prompt(ROWS[:1])
    model.requires_grad_(False)
    router = LayerRouters(32, (1, 3))
    with vlprune.apply(model, "videollm_mod", keep=0.5, router=router):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert router.weight.grad is not None
    assert bool((router.weight.grad.abs().sum(dim=1) > 0).all())
    file = router.save(tmp_path / "deep" / "routers.safetensors", keep=0.5)
    with torch.no_grad():
        with vlprune.apply(model, "videollm_mod", keep=0.5, router=router):
            own = model(**inputs).logits
        with vlprune.apply(model, "videollm_mod", keep=0.5, router=file):
            assert torch.equal(model(**inputs).logits, own)


def test_noise_only_while_training() -> None:
    router, given = LayerRouters(4, (0,)), ScoreInputs(torch.randn(1, 6, 4), 2)
    router.noise = 1.0
    score = LayerRouterScore(router, 0)
    assert not torch.equal(score(given), score(given))
    router.eval()
    assert torch.equal(score(given), score(given))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    facts, router = ModelFacts(decoder_layers=8), LayerRouters(32, (1, 3))
    assert routed_layers(8, "interleaved") == (1, 3, 5, 7)
    assert routed_layers(8, "all") == tuple(range(1, 8))
    for match, options in {
        "needs trained routers": {},
        "cannot be read": {"router": tmp_path / "none.safetensors"},
        "router=dict": {"router": {}},
        "there is none for 5, 7": {"router": router, "layers": "interleaved"},
        "layers='odd'": {"router": router, "layers": "odd"},
        "each once": {"router": "random", "layers": [1, 1]},
        "weigh='softmax'": {"router": "random", "weigh": "softmax"},
    }.items():
        with pytest.raises(OptionError, match=match):
            videollm_mod(facts, 0.2, **options)  # type: ignore[arg-type]
    assert [bypass.layer for bypass in videollm_mod(facts, 0.2, router=router).bypasses] == [1, 3]
    with pytest.raises(OptionError, match="whole block"):
        Bypass(1, "mlp", budget=Budget(0.5), scorer=LayerRouterScore(router, 1), weigh=lambda states: states[..., 0])
    tiny = families()["llava"]
    with pytest.raises(OptionError, match="made for states of width 64"), vlprune.apply(tiny.build(), "videollm_mod", router=LayerRouters(64, (1,))) as handle:
        handle.model(**tiny.prompt([[3, "image", 9]]))


@pytest.mark.skipif(not (ASSETS / "model.safetensors").exists(), reason="the video model has not been exported")
def test_the_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps, stopped and gone on with, with the model and its rival; routers move and everything is written."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    import train_videollm_mod as script

    common = ["--work", str(tmp_path), "--batch", "2", "--n", "2", "--seeds", "1", "--minutes", "5", "--model-lr", "1e-4"]
    script.main([*common, "--stage", "routers", "--steps", "1"])
    first = LayerRouters.load(tmp_path / "routers.safetensors")
    script.main([*common, "--steps", "2"])
    second = LayerRouters.load(tmp_path / "routers.safetensors")
    for stage in ("guide", "routers"):
        assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["step"] == 2
    assert not torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, LayerRouters(second.width, second.layers).weight)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["model"], row["choice"]) for row in rows][:5] == [
        ("untouched", "dense"), ("untouched", "random, seed 0"), ("untouched", "untrained routers"), ("untouched", "guided routers"),
        ("untouched", "trained routers"),
    ]  # fmt: skip
    assert {row["model"] for row in rows} == {"untouched", "trained along", "rival"}
    assert all(row["kv"] < 1 for row in rows if row["keep"] < 1)
    assert "trained routers" in (tmp_path / "results.md").read_text()


@pytest.mark.skipif(not (ASSETS / "model.safetensors").exists(), reason="the video model has not been exported")
def test_what_the_routers_are_guided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivatives by what a block adds to a token, and by its weight as a key, against differences."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    import train_videollm_mod as script

    loaded = script.load_embedded_video()
    given = script.batch_of(loaded, range(1))
    states, sizes, visual = script.dependence(loaded, given, (3,))
    assert int(visual.sum()) == script.base.TOKENS
    assert states[3].shape[:2] == sizes[3].shape == given["input_ids"].shape
    layer, answer = decoder_of(loaded.model).layers[3], int(given["labels"][0, -2])  # type: ignore[index]
    places = [int((sizes[3] * visual).argmax()), int(visual[0].nonzero()[40])]
    inputs = {name: value for name, value in given.items() if name != "labels"}
    length = given["input_ids"].shape[1]

    def odds(place: int, added: float, looked: float) -> float:
        bias = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -1e30)
        bias[..., place] += looked
        factor = torch.ones(1, length, 1)
        factor[:, place] += added
        seen: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]) or (a, {**k, "attention_mask": bias}), with_kwargs=True),
            layer.register_forward_hook(lambda m, a, o: seen[0] + factor * (o - seen[0])),
        ]
        with torch.no_grad():
            chance = loaded.model(**inputs, use_cache=False).logits[0, -3].double().softmax(-1)[answer]
        for handle in handles:
            handle.remove()
        return float((chance / (1 - chance)).log())

    for place in places:
        slopes = [(odds(place, *([0.02, 0.0] if one else [0.0, 0.02])) - odds(place, *([-0.02, 0.0] if one else [0.0, -0.02]))) / 0.04 for one in (True, False)]
        assert float(sizes[3][0, place]) == pytest.approx(sum(map(abs, slopes)), rel=0.05, abs=2e-3)
