"""The delete gate: soft equals hard in two encoders, its gradient, its choices, its file and its control."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs
from vlprune.selectors import TopK
from vlprune.skipping.delete_gate import DeleteGate, DeletionControl, GateScores, HardChoice, cut, cut_bias, deletion_rate, gate_loss

WIDTH, LENGTH, LAYER = 32, 14, 1


def trained(norm: str = "layer") -> DeleteGate:
    """A gate that is not the same everywhere."""
    torch.manual_seed(3)
    gate = DeleteGate(WIDTH, norm=norm)
    torch.nn.init.normal_(gate.linear.weight, std=2.0)
    return gate


def bert(backend: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32)
    config._attn_implementation = backend
    return BertModel(config).eval()


def t5(backend: str) -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=4, num_heads=4, feed_forward_proj="gated-gelu")
    config._attn_implementation = backend
    return T5EncoderModel(config).eval()


def bert_layers(model: BertModel, hidden: Tensor, bias: Tensor | None, layers: range) -> Tensor:
    for place in layers:
        hidden = model.encoder.layer[place](hidden, bias)
    return hidden


def t5_layers(model: T5EncoderModel, hidden: Tensor, bias: Tensor | None, places: Tensor, layers: range) -> Tensor:
    for place in layers:
        hidden = model.encoder.block[place](hidden, attention_mask=bias, position_bias=places)[0]
    return hidden


def as_bias(valid: Tensor) -> Tensor:
    return torch.zeros(valid.shape).masked_fill(~valid, -1e30)[:, None, None]


def a_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, 10:] = 0
    return ids, mask


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_soft_without_end_equals_hard_in_bert(backend: str, norm: str) -> None:
    model, gate, (ids, mask) = bert(backend), trained(norm), a_batch()
    with torch.no_grad():
        before = bert_layers(model, model.embeddings(ids), as_bias(mask == 1), range(LAYER + 1))
        gates = gate(before, mask)
        choice = gate.choose(gates, mask)
        assert 1 < choice.keep_indices.shape[1] < LENGTH, "some stay and some leave"
        soft = bert_layers(model, before, as_bias(gate.keep_mask(gates, mask)), range(LAYER + 1, 4))
        hard = bert_layers(model, cut(before, choice), as_bias(choice.valid), range(LAYER + 1, 4))
    assert not choice.valid.all(), "rows differ in length"
    torch.testing.assert_close(hard[choice.valid], cut(soft, choice)[choice.valid], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_soft_without_end_equals_hard_in_t5(backend: str) -> None:
    model, gate, (ids, mask) = t5(backend), trained(), a_batch()
    with torch.no_grad():
        places = model.encoder.block[0].layer[0].SelfAttention.compute_bias(LENGTH, LENGTH)
        before = t5_layers(model, model.shared(ids), as_bias(mask == 1), places, range(LAYER + 1))
        gates = gate(before, mask)
        choice = gate.choose(gates, mask)
        assert 1 < choice.keep_indices.shape[1] < LENGTH
        soft = t5_layers(model, before, as_bias(gate.keep_mask(gates, mask)), places, range(LAYER + 1, 4))
        hard = t5_layers(model, cut(before, choice), as_bias(choice.valid), cut_bias(places, choice), range(LAYER + 1, 4))
        wrong = t5_layers(model, cut(before, choice), as_bias(choice.valid), places[..., : hard.shape[1], : hard.shape[1]], range(LAYER + 1, 4))
    torch.testing.assert_close(hard[choice.valid], cut(soft, choice)[choice.valid], atol=2e-5, rtol=1e-4)
    assert (wrong - hard).abs().max() > 1e-3, "the bias has to be gathered, or this test could not fail"


def test_the_loss_of_the_task_reaches_the_gate() -> None:
    model, gate, (ids, mask) = bert("sdpa"), trained(), a_batch()
    model.requires_grad_(False)
    before = bert_layers(model, model.embeddings(ids), as_bias(mask == 1), range(LAYER + 1))
    gates = gate(before, mask)
    after = bert_layers(model, before, gate.key_bias(gates), range(LAYER + 1, 4))
    after[:, 0].square().sum().backward()
    assert gate.linear.weight.grad is not None
    assert gate.linear.weight.grad.abs().max() > 0
    assert gate.linear.bias.grad is not None
    assert gate.linear.bias.grad.abs().item() > 0


def test_the_gate_by_hand() -> None:
    gate = DeleteGate(2, bias=1.0)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[3.0, 0.0]]))
    gates = gate(torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [5.0, 5.0]]]), torch.tensor([[1, 1, 0]]))
    one = -30 / (1 + math.exp(4.0))                                                      # normed to (1, -1): logit 3 + 1
    two = -30 / (1 + math.exp(-2.0))                                                     # normed to (-1, 1): logit -3 + 1
    torch.testing.assert_close(gates, torch.tensor([[one, two, -30.0]]), atol=1e-4, rtol=1e-4)
    assert gate.threshold == -15
    assert gate.keep_mask(gates).tolist() == [[True, False, False]]
    assert DeleteGate(2)(torch.randn(1, 4, 2)).unique().tolist() == pytest.approx([-30 / (1 + math.e)]), "it begins the same everywhere"


def test_choices() -> None:
    gate = DeleteGate(WIDTH)
    gates = torch.tensor([[-1.0, -29.0, -14.9, -20.0], [-29.0, -15.0, -28.0, -30.0], [-2.0, -30.0, -30.0, -30.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    choice = gate.choose(gates, mask)
    assert choice.keep_indices.tolist()[:2] == [[0, 2], [1, 2]], "-15 is at the threshold; a row that would be empty keeps its best"
    assert choice.valid.tolist() == [[True, True], [True, False], [True, False]]
    assert choice.keep_indices[2, 0] == 0
    assert gate.choose(gates[:2], num_keep=3).keep_indices.tolist() == [[0, 2, 3], [0, 1, 2]]
    assert torch.equal(gate.choose(gates[:2], num_keep=2).keep_indices, TopK()(gates[:2], ScoreInputs(torch.zeros(2, 4, 1), 2)).keep_indices)
    with pytest.raises(OptionError, match="from 1 to the 4"):
        gate.choose(gates, num_keep=5)


def test_it_is_a_scorer() -> None:
    gate = trained()
    tokens = torch.randn(2, 6, WIDTH)
    scores = GateScores(gate)(ScoreInputs(tokens, 3))
    order = torch.randperm(6)
    torch.testing.assert_close(GateScores(gate)(ScoreInputs(tokens[:, order], 3)), scores[:, order])
    assert scores.dtype == torch.float32


def test_loss_and_rate() -> None:
    gates = torch.tensor([[-10.0, -20.0, -30.0]])
    assert gate_loss(gates).item() == -20
    assert gate_loss(gates, torch.tensor([[1, 1, 0]])).item() == -15
    assert deletion_rate(gates, -15.0).item() == pytest.approx(2 / 3)
    assert deletion_rate(gates, -15.0, torch.tensor([[1, 1, 0]])).item() == 0.5


def test_the_control_reaches_its_target() -> None:
    """On a gate alone: only the regulariser acts, and a pull towards keeping."""
    torch.manual_seed(0)
    gate, states = trained(), torch.randn(8, 32, WIDTH)
    with torch.no_grad():
        gate.linear.weight.mul_(0.2)
        gate.linear.bias.fill_(6.0)
    control, adam = DeletionControl(0.5), torch.optim.Adam(gate.parameters(), lr=0.05)
    rates = []
    for _ in range(150):
        gates = gate(states)
        rates.append(float(deletion_rate(gates, gate.threshold)))
        loss = control.update(rates[-1]) * gate_loss(gates) - 0.02 * gates.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert rates[0] < 0.05
    assert sum(rates[-30:]) / 30 == pytest.approx(0.5, abs=0.1)
    assert DeletionControl(0.5).update(0.75) == 0, "never below 0"
    assert DeletionControl(0.5).update(0.25) == pytest.approx(0.5 * 0.25 + 1e-5 * 0.25)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_its_file(tmp_path: Path, norm: str) -> None:
    torch.manual_seed(0)
    gate = DeleteGate(WIDTH, scale=-10.0, norm=norm)
    torch.nn.init.normal_(gate.linear.weight)
    again = DeleteGate.load(gate.save(tmp_path / "deep" / "gate.safetensors"))
    states = torch.randn(2, 5, WIDTH)
    assert torch.equal(again(states), gate(states))
    assert (again.scale, again.kind, again.training) == (-10.0, norm, False)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for path, wanted in (("broken.safetensors", "cannot be read"), ("none.safetensors", "no such file"), ("gate.pt", "only .safetensors")):
        with pytest.raises(OptionError, match=wanted):
            DeleteGate.load(tmp_path / path)


def test_errors() -> None:
    for options, wanted in (({"width": 0}, "width=0"), ({"width": 4, "scale": 3.0}, "below 0"), ({"width": 4, "norm": "batch"}, "'layer' or 'rms'")):
        with pytest.raises(OptionError, match=wanted):
            DeleteGate(**options)
    with pytest.raises(OptionError, match="width 32, but these have 7"):
        DeleteGate(WIDTH)(torch.randn(1, 2, 7))
    with pytest.raises(OptionError, match="target=1"):
        DeletionControl(1.0)


def test_cut_bias_by_loops() -> None:
    bias, keep = torch.randn(1, 2, 5, 5), torch.tensor([[0, 3], [1, 4]])
    out = cut_bias(bias, HardChoice(keep, torch.ones(2, 2, dtype=torch.bool)))
    for row in range(2):
        for q in range(2):
            for k in range(2):
                assert torch.equal(out[row, :, q, k], bias[0, :, keep[row, q], keep[row, k]])
