"""STTS: the trained scorer, its key bias, the packing of frames, and the road of the gradient. The laws run over it, too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from tests.oracle import decoder_of, hidden_columns, masked_run, tower_columns
from tests.tiny import families
from vlprune.adapters._packed_tower import halved, strided
from vlprune.errors import MissingSignalError, NotFiniteError, OptionError, UnsupportedModelError, UnsupportedPointError
from vlprune.kernels.packing import first_fit, pack_pictures
from vlprune.method import ModelFacts
from vlprune.methods.stts import Untrained, stts
from vlprune.protocols import ScoreInputs
from vlprune.scorers.soft_key_bias import SoftKeyBias
from vlprune.scorers.spatio_temporal import SpatioTemporal, SpatioTemporalNet, temporal_loss
from vlprune.tokens import raster_grid

FACTS = ModelFacts(decoder_layers=28, vision_layers=27, feature_layer=26)
VIDEO_FAMILIES = ["llava_next_video", "llava_onevision"]
ROWS: list[list[Any]] = [[3, "video", 4], [2, "video", 3, "video", 5]]


class Same(nn.Module):
    """Gives every token the same score."""

    def forward(self, patches: Tensor, previous: Tensor, found: Tensor) -> Tensor:
        return torch.ones(patches.shape[:2])


def net(width: int = 32, layer: int | None = None, seed: int = 0) -> SpatioTemporalNet:
    torch.manual_seed(seed)
    return SpatioTemporalNet(width, 4, 48, layer)


def video(frames: int, side: int, members: int = 4, width: int = 8, items: int = 2, seed: int = 0) -> ScoreInputs:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(items, frames * side * side, members, width, generator=generator)
    tap = SpatioTemporal(nn.Identity(), 0).needs[0]
    grid = raster_grid(frames, side, side).expand(items, -1, -1)
    return ScoreInputs(patches.mean(dim=2), 3, grid, modality="video", num_original=grid.shape[1], signals={tap: patches})


# packing


def test_first_fit_puts_the_largest_first() -> None:
    assert first_fit([2, 0, 8, 5, 4, 3], 10) == ([0, -1, 0, 1, 1, 2], [8, 0, 0, 0, 5, 0])


@pytest.mark.parametrize("refill", [False, True])
def test_packed_and_back(refill: bool) -> None:
    """Every kept token is in one place, beside tokens of its own frame in their order; the round trip gives it back and leaves the others alone."""
    draw = random.Random(0)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        frames, length = draw.randint(1, 9), draw.randint(2, 20)
        kept = torch.rand(frames, length, generator=generator) < torch.rand(frames, 1, generator=generator)
        if not kept.any():
            continue
        tokens, others = torch.randn(frames, length, 3, generator=generator), torch.randn(frames, length, 3, generator=generator)
        packing = pack_pictures(kept, kept.sum(dim=1).tolist(), refill=refill)
        packed = packing.pack(tokens)
        assert packed.shape[0] <= int((kept.sum(dim=1) > 0).sum())
        for frame in range(frames):
            rows, places = (packing.segments == frame).nonzero(as_tuple=True)
            assert len(set(rows.tolist())) <= 1
            alone = bool(rows.numel()) and set(packing.segments[rows[0]].tolist()) <= {frame, -1}
            expected = tokens[frame] if alone and refill else tokens[frame][kept[frame]]
            assert torch.equal(packed[rows, places], expected)
        assert bool((packed[packing.segments < 0] == 0).all())
        seen = packing.mask[:, 0]
        same = packing.segments[:, :, None] == packing.segments[:, None, :]
        assert torch.equal(seen, same)
        assert torch.equal(packing.unpack(packed, others), torch.where(kept[..., None], tokens, others))


def test_packing_has_gradients() -> None:
    kept = torch.tensor([[True, False, True], [False, True, False]])
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    packing = pack_pictures(kept, [2, 1])
    assert packing.segments.shape == (1, 3)
    (packing.unpack(2 * packing.pack(tokens), tokens).sum()).backward()
    assert torch.equal(tokens.grad, torch.where(kept[..., None], 2.0, 1.0).expand(-1, -1, 4))


@pytest.mark.parametrize(("cells", "side", "sizes"), [(strided(6, 2), 3, {4}), (strided(5, 2), 2, {4, 6, 9}), (halved(27), 14, {1, 2, 4}), (halved(6), 3, {4})])
def test_every_patch_belongs_to_one_token(cells: Any, side: int, sizes: set[int]) -> None:
    assert cells.side == side
    count = cells.token_of.numel()
    members = cells.members
    assert sorted(members[members < count].tolist()) == list(range(count))
    assert {int((row < count).sum()) for row in members} == sizes
    for token, row in enumerate(members):
        assert cells.token_of[row[row < count]].tolist() == [token] * int((row < count).sum())


def test_the_nearest_token_is_the_one_that_reads_the_patch_most() -> None:
    """Bilinear pooling of 27 to 14, as a matrix: the largest weight in each column."""
    weights = torch.nn.functional.interpolate(torch.eye(27)[None, :, None, :], size=(1, 14), mode="bilinear")[0, :, 0]       # (patches, tokens)
    best = weights.argmax(dim=1)
    differ = [row for row in range(27) if halved(27).axis[row] != int(best[row])]
    assert differ in ([], [13])                                          # the middle one is read by two alike


# bias and scores


def test_bias_by_hand() -> None:
    """The best of a frame has none, the worst -2, the first frame none at all; in rows the same within each row."""
    inputs = video(2, 2, items=1)
    scores = torch.tensor([[1.9, 1.2, 1.3, 1.4, 0.2, 0.4, 0.6, 0.3]])
    stretched = torch.tensor([0.0, 0.5, 1.0, 0.25]) * (1 - torch.e**-2) + torch.e**-2
    torch.testing.assert_close(SoftKeyBias()(scores, inputs), torch.cat([torch.zeros(4), stretched.log()])[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(SoftKeyBias("row")(scores, inputs)[0, 4:], torch.tensor([-2.0, 0.0, 0.0, -2.0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(SoftKeyBias()(torch.ones(1, 8), inputs), torch.zeros(1, 8))
    with pytest.raises(OptionError, match="per="):
        SoftKeyBias("video")


def test_scores_see_the_frame_before_and_videos_do_not_mix() -> None:
    inputs, scorer = video(3, 2), SpatioTemporal(net(8), 0)
    tap = scorer.needs[0]
    with torch.no_grad():
        scores = scorer(inputs)
        changed = inputs.signals[tap].clone()
        changed[0, 5] += 1                                               # second frame, second token
        moved = (scorer(ScoreInputs(inputs.tokens, 3, inputs.grid, modality="video", signals={tap: changed})) - scores).abs() > 1e-6
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        shuffled = ScoreInputs(inputs.tokens[:, order], 3, inputs.grid[:, order], modality="video", signals={tap: inputs.signals[tap][:, order]})
        torch.testing.assert_close(scorer(shuffled), scores[:, order])
    assert moved.nonzero().tolist() == [[0, 5], [0, 9]]
    assert bool((scores[:, :4] > 1).all())
    assert bool((scores[:, 4:] < 1).all())


def test_temporal_loss_by_hand() -> None:
    """Two frames of one token: the cosine is 0.6, so the score should be 0.4."""
    patches = torch.tensor([[[[1.0, 0.0]], [[0.6, 0.8]]]])               # (1, 2, 1, 2)
    previous, found = torch.tensor([[0, 0]]), torch.tensor([[False, True]])
    assert float(temporal_loss(torch.tensor([[0.9, 0.7]]), patches, previous, found)) == pytest.approx(0.5 * 0.3**2)


# the whole model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_equal_scores_and_nothing_dropped_is_dense(family: str, attention: str) -> None:
    """The bias of score 1 is zero, and packing whole frames changes nothing."""
    tiny = families()[family]
    model, inputs = tiny.build(attention), tiny.prompt(ROWS[:1])
    with torch.no_grad():
        before = model(**inputs).logits
        with vlprune.apply(model, "stts", keep=27, weights=Same()) as handle:
            out = model(**inputs).logits
            assert handle.report().points[0].visual_kept == 27
        torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-5)
        with vlprune.apply(model, "stts", keep=27, weights=Untrained()):
            assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)         # unequal scores do change it


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_dropped_is_hidden(family: str, variant: str) -> None:
    """Also with the released program's frames that see again what they lost."""
    tiny = families()[family]
    model, inputs = tiny.build(), tiny.prompt(ROWS[1:])
    keep = 17 if variant == "paper" else 24                              # of 27: two frames that hardly share a row
    with torch.no_grad(), vlprune.apply(model, "stts", keep=keep, weights=Untrained(3), variant=variant) as handle:
        pruned = model(**inputs).logits
        trace = handle.trace
    tower = trace.points[0]
    assert [record.point for record in trace.points] == [handle.method.stages[0].point.label, "before_llm"]
    assert [kept.numel() for kept in tower.kept] == [keep, keep]
    assert all(set(range(9)) <= set(kept.tolist()) for kept in tower.kept)               # the first frame is whole
    for before, behind in zip(tower.kept, trace.points[1].kept, strict=True):
        assert before.tolist() == behind[:keep].tolist()
    visible = int(tower.columns.sum())
    own = 2 * keep * 4 + (6 if family == "llava_next_video" else 0)                        # a CLS token a frame
    assert visible == own if variant == "paper" else visible > own
    depth = len(decoder_of(model).layers)
    hidden = hidden_columns(trace, depth)
    reference = masked_run(model, inputs, hidden, tower=tower_columns(trace, model)).logits
    torch.testing.assert_close(pruned[~hidden[-1]], reference[~hidden[-1]], rtol=1e-4, atol=2e-4)
    report = handle.report()
    assert trace.vision_tokens[0] == trace.vision_dense
    assert variant == "code" or trace.vision_tokens[3] < trace.vision_tokens[0]
    assert report.parts["scorer"] > 0 or isinstance(handle.method.stages[0].scorer.net, Untrained)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_the_loss_of_the_task_reaches_the_scores(family: str, attention: str) -> None:
    """Every weight of the scorer gets a gradient, and it is the slope of the loss."""
    tiny = families()[family]
    model, inputs = tiny.build(attention), tiny.prompt(ROWS[:1])
    model.requires_grad_(False)
    scorer = net().train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    with vlprune.apply(model, "stts", keep=17, weights=scorer) as handle:
        loss = model(**inputs, labels=labels).loss
        loss.backward(retain_graph=True)
        kept = handle.trace.points[0].kept[0].tolist()
        gradients = {name: parameter.grad.clone() for name, parameter in scorer.named_parameters()}
        # softmax does not see a shift of all keys
        assert all(grad is not None and bool((grad != 0).any()) for name, grad in gradients.items() if not name.endswith("wk.bias"))
        assert float(scorer.temporal_loss.detach()) > 0
        scorer.temporal_loss.backward()                                  # the other loss is there to be added
        assert bool((scorer.mlp.w3.bias.grad != gradients["mlp.w3.bias"]).any())
        step, size = 2e-3, sum(float((grad**2).sum()) for grad in gradients.values()) ** 0.5
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                for name, parameter in scorer.named_parameters():
                    parameter.add_(gradients[name] * (sign * step / size))
                losses.append(float(model(**inputs, labels=labels).loss))
                assert handle.trace.points[0].kept[0].tolist() == kept                   # the choice itself has no slope
                for name, parameter in scorer.named_parameters():
                    parameter.sub_(gradients[name] * (sign * step / size))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(size, rel=0.05)


def test_the_tower_trains_along() -> None:
    """Blocks in front of the drop and behind it get gradients through the packing."""
    tiny = families()["llava_next_video"]
    model, inputs = tiny.build().train(), tiny.prompt(ROWS)
    with vlprune.apply(model, "stts", keep=0.5, weights=net().train()):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)).loss.backward()
    blocks = next(block for name, block in model.named_modules() if "vision_tower" in name and name.endswith("layers"))
    for block in blocks[:3]:                                             # the last one is behind the features
        assert bool((block.mlp.fc1.weight.grad != 0).any())


def test_together_with_a_method_in_the_decoder() -> None:
    tiny = families()["llava_onevision"]
    model, inputs = tiny.build(), tiny.prompt(ROWS)
    with torch.no_grad(), vlprune.apply(model, ["stts", "fastv"], keep=0.4, stts={"weights": Untrained()}) as handle:
        out = model(**inputs)
        labels = [record.point for record in handle.report().points]
    assert labels[:2] == ["vision:3", "before_llm"]
    assert labels[-1].startswith("llm:")
    assert out.logits.shape[1] == inputs["input_ids"].shape[1]


# weights and options


def test_saved_and_loaded(tmp_path: Path) -> None:
    first = net(layer=0, seed=5)
    path = first.save(tmp_path / "folder" / "scorer.safetensors")
    second = SpatioTemporalNet.load(path)
    assert (second.width, second.heads, second.hidden, second.layer, second.training) == (32, 4, 48, 0, False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    tiny = families()["llava_next_video"]
    model, inputs = tiny.build(), tiny.prompt(ROWS)
    with torch.no_grad():
        with vlprune.apply(model, "stts", keep=0.5, weights=first.eval()):
            wanted = model(**inputs).logits
        with vlprune.apply(model, "stts", keep=0.5, weights=str(path)) as handle:
            assert torch.equal(model(**inputs).logits, wanted)
            assert handle.report().parts["scorer"] > 0
    with pytest.raises(OptionError, match="trained on the output of vision block 0"):
        stts(FACTS, weights=path, layer=3)


def test_files_that_will_not_do(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(OptionError, match="no such file"):
        stts(FACTS, weights=tmp_path / "gone.safetensors")
    with pytest.raises(OptionError, match=r"only \.safetensors"):
        stts(FACTS, weights="scorer.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(OptionError, match="cannot be read"):
        stts(FACTS, weights=tmp_path / "broken.safetensors")
    save_file(net().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match=r"SpatioTemporalNet\.save"):
        stts(FACTS, weights=tmp_path / "other.safetensors")
    state = net().state_dict()
    state.pop("mlp.w2.bias")
    save_file(state, tmp_path / "part.safetensors", metadata={"format": "vlprune.stts", "heads": "4"})
    with pytest.raises(OptionError, match=r"mlp\.w2\.bias"):
        stts(FACTS, weights=tmp_path / "part.safetensors")


def test_options() -> None:
    with pytest.raises(OptionError, match=r"examples/train_stts\.py"):
        stts(FACTS)
    with pytest.raises(OptionError, match="weights=int"):
        stts(FACTS, weights=3)
    with pytest.raises(OptionError, match="variant"):
        stts(FACTS, weights=Same(), variant="fast")
    with pytest.raises(OptionError, match="from 0 to 24"):
        stts(FACTS, weights=Same(), layer=25)
    with pytest.raises(OptionError, match="three vision blocks"):
        stts(ModelFacts(vision_layers=2, feature_layer=1), weights=Same())
    with pytest.raises(OptionError, match="heads must divide"):
        SpatioTemporalNet(30, 4, 8)
    stage = stts(FACTS, weights=Same()).stages[0]
    assert (stage.point.label, stage.needs[0].layer) == ("vision:5", 3)
    assert stage.budget.num_keep(90, 10) == 45
    assert stts(FACTS, 0.05, weights=Same()).stages[0].budget.num_keep(90, 10) == 9      # a frame's worth
    assert stts(FACTS, 5, weights=Same()).stages[0].budget.num_keep(90, 10) == 5


def test_what_cannot_be_served_is_said() -> None:
    tiny = families()["llava_next_video"]
    model = tiny.build()
    options: dict[str, Any] = {"keep": 0.5, "weights": Untrained()}
    with vlprune.apply(model, "stts", **options), torch.no_grad():
        with pytest.raises(OptionError, match="works on videos only"):
            model(**tiny.prompt([[2, "image", 3]]))
        assert model(**tiny.prompt([[4]])).logits.shape[1] == 4
        model(**tiny.prompt(ROWS))                                       # and afterwards it works
    with vlprune.apply(model, "stts", keep=0.5, weights=net(width=16)), pytest.raises(OptionError, match="width 16"):
        model(**tiny.prompt(ROWS))
    broken = net().eval()
    with torch.no_grad():
        broken.mlp.w3.bias.fill_(torch.nan)
    with vlprune.apply(model, "stts", keep=0.5, weights=broken), pytest.raises(NotFiniteError, match="vision:2"):
        model(**tiny.prompt(ROWS))
    with pytest.raises(MissingSignalError, match="column_mean"):
        vlprune.apply(model, ["stts", "hiprune"], keep=0.5, stts={"weights": Untrained()})
    with pytest.raises((UnsupportedPointError, MissingSignalError)):
        vlprune.apply(families()["llava"].build(), "stts", **options)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="vision_config"):
        vlprune.apply(model, "stts", **options)
    model.model.vision_tower.config._attn_implementation = "sdpa"
