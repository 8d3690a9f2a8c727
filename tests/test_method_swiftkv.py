"""SwiftKV: keys of an earlier layer's state against a plain forward with the same keys; shared caches; weights as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlprune
from tests.oracle import decoder_of, snapshot
from tests.test_text_laws import TOLERANCE, backend, generate, longer, prompts
from tests.tiny_text import text_families
from vlprune.adapter import find_adapter
from vlprune.errors import OptionError, UnsupportedPointError
from vlprune.flops import TowerShape
from vlprune.methods.swiftkv import swiftkv
from vlprune.skipping.early_keys import EarlyKeys
from vlprune.skipping.layers import decoder_layers

FAMILIES = sorted(text_families())


def weights_for(model: nn.Module, start: int = 2, group: int = 1, noise: float = 0.3) -> EarlyKeys:
    """The model's own, moved a little, so that they are nobody else's."""
    net = EarlyKeys.of(decoder_layers(model), start, group)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return net.eval()


def plain_forward(model: Any, net: EarlyKeys, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Logits of the model with the projections put in by hand, everything computed, no cache."""
    seen: list[Tensor] = []
    layers: Any = decoder_of(model).layers
    handles = [layers[net.start].register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)]

    def made(weight: Tensor, bias: Tensor | None) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = seen[-1]
            normed = x / (x.pow(2).mean(-1, keepdim=True) + net.eps).sqrt() * net.norm
            return F.linear(normed, weight, bias)

        return hook

    for number in range(net.start, net.depth):
        attn, group = layers[number].self_attn, (number - net.start) // net.group
        handles.append(attn.k_proj.register_forward_hook(made(net.k[group], None if net.k_bias is None else net.k_bias[group])))
        handles.append(attn.v_proj.register_forward_hook(made(net.v[group], None if net.v_bias is None else net.v_bias[group])))
        row, bias = number - net.start, net.q_bias
        queries = (net.q[row], None if bias is None else bias[row])
        handles.append(attn.q_proj.register_forward_hook(lambda m, a, o, own=queries: F.linear(a[0], *own)))
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decoding_equal_a_plain_forward(family: str, group: int) -> None:
    """Padding included; where a group's layers rotate their keys differently, sharing is refused."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    inputs, net = tiny.prompt(prompts(tiny)), weights_for(model, group=group)
    model(**inputs)
    state = snapshot(model)
    if group == 2 and family == "gemma3_text":
        with pytest.raises(UnsupportedPointError, match="rotates them differently"):
            vlprune.apply(model, "swiftkv", weights=net)
        assert snapshot(model) == state
        return
    with vlprune.apply(model, "swiftkv", weights=net):
        out = generate(model, inputs)
    with vlprune.apply(model, "swiftkv", weights=net, everywhere=True), torch.no_grad():
        every = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True)
    assert snapshot(model) == state
    start, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    whole, kwargs = longer(tiny, model, inputs, out.sequences[:, start:-1])
    expected = plain_forward(model, net, whole, **kwargs)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, start - 1 :], **TOLERANCE)
    here = plain_forward(model, net, inputs)
    torch.testing.assert_close(every[real], here[real], **TOLERANCE)
    torch.testing.assert_close(cached.logits[real], here[real], **TOLERANCE)
    assert not torch.allclose(here[:, -1], model(**inputs).logits[:, -1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_untrained_weights_are_the_models_own(family: str) -> None:
    """`EarlyKeys.of` gives the prompt the keys that the policy without weights does; as the paper starts, it does where norms agree."""
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    layers = decoder_layers(model)
    with torch.no_grad():
        for layer in layers:
            layer.input_layernorm.weight.add_(0.3 * torch.randn_like(layer.input_layernorm.weight))  # type: ignore[union-attr, operator, arg-type]
    inputs = tiny.prompt([[23]])
    found = []
    for options in ({}, {"weights": EarlyKeys.of(layers, 2)}, {"weights": EarlyKeys.of(layers, 2, own_norms=False)}):
        with vlprune.apply(model, "swiftkv", **options), torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        found.append(torch.stack([cache.layers[layer].keys[:, :, :-1] for layer in (2, 3)]))
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)
    torch.testing.assert_close(found[0][0], found[2][0], **TOLERANCE)
    assert not torch.allclose(found[0][1], found[2][1], atol=1e-2)


def test_a_group_shares_one_cache() -> None:
    """The same tensors, in a prompt and after decoding and with beams; the report counts one layer."""
    tiny = text_families()["qwen3"]
    model = tiny.build()
    inputs, net = tiny.prompt(prompts(tiny)), weights_for(model, group=2)
    with vlprune.apply(model, "swiftkv", weights=net) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.layers[3].keys is cache.layers[2].keys
        assert cache.layers[3].values is cache.layers[2].values
        report = handle.report()
        assert report.kv_bytes_pruned * 4 == report.kv_bytes_dense * 3
        grown = generate(model, inputs).past_key_values
        assert grown.layers[3].keys is grown.layers[2].keys
        assert grown.layers[3].keys.shape[2] == grown.get_seq_length() == inputs["input_ids"].shape[1] + 4
        both = generate(model, inputs, num_beams=3, num_return_sequences=2, output_logits=False).sequences
        for number, row in enumerate(prompts(tiny)):
            alone = generate(model, tiny.prompt([row], row_numbers=[number]), num_beams=3, num_return_sequences=2, output_logits=False).sequences
            assert torch.equal(both[2 * number : 2 * number + 2, -5:], alone[:, -5:])


@pytest.mark.parametrize("group", [1, 2])
def test_static_caches(group: int) -> None:
    """Buffers are not shared, and the answers are the same."""
    tiny = text_families()["llama"]
    model = tiny.build()
    inputs, net = tiny.prompt(prompts(tiny)), weights_for(model, group=group)
    with vlprune.apply(model, "swiftkv", weights=net):
        grown, static = (generate(model, inputs, cache_implementation=name, disable_compile=True) for name in ("dynamic", "static"))
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(grown.logits), **TOLERANCE)
    assert static.past_key_values.layers[3].keys is not static.past_key_values.layers[2].keys


@pytest.mark.parametrize("group", [1, 2])
def test_a_second_turn_equals_a_plain_forward(group: int) -> None:
    tiny = text_families()["llama"]
    model = tiny.build()
    inputs, more, net = tiny.prompt([[19]]), torch.tensor([[5, 6, 7, 8, 9, 10]]), weights_for(model, group=group)
    with vlprune.apply(model, "swiftkv", weights=net), torch.no_grad():
        out = generate(model, inputs)
        second = model(input_ids=more, past_key_values=out.past_key_values).logits
    whole = torch.cat([inputs["input_ids"], out.sequences[:, 19:-1], more], 1)
    expected = plain_forward(model, net, {"input_ids": whole})
    torch.testing.assert_close(second[:, -1], expected[:, -1], **TOLERANCE)


@pytest.mark.parametrize("weights", [False, True])
def test_flops_are_counted(weights: bool) -> None:
    """By hand: two layers as ever, two with keys for all and everything else for one token."""
    tiny = text_families()["llama"]
    model = tiny.build()
    options = {"weights": weights_for(model, group=2)} if weights else {}
    with vlprune.apply(model, "swiftkv", **options) as handle, torch.no_grad():
        model(**tiny.prompt([[31]]))
        report = handle.report()
    config: Any = model.config
    n, width, inner, kv = 31, config.hidden_size, config.hidden_size, config.num_key_value_heads * config.head_dim
    head = 2 * width * config.vocab_size
    dense = TowerShape(4, width, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size).layer_flops(n, causal=True)
    last = 2 * 2 * width * inner + 3 * 2 * width * config.intermediate_size + 4 * inner * (n + 1) / 2    # pairs: as if the one stood anywhere
    keys = 2 * 2 * n * width * kv
    assert report.parts["decoder_dense"] == pytest.approx(4 * dense + head)
    assert report.parts["decoder"] == pytest.approx(2 * dense + 2 * last + (1 if weights else 2) * keys + head)


def test_weights_train_and_are_saved(tmp_path: Path) -> None:
    """Gradients reach all of them and nothing else; a file gives the same answers."""
    tiny = text_families()["qwen2"]
    model = tiny.build()
    model.requires_grad_(False)
    inputs, net = tiny.prompt([[12]]), weights_for(model)
    with vlprune.apply(model, "swiftkv", weights=net, everywhere=True):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None, name
        assert float(weight.grad.abs().sum()) > 0, name
    file = net.save(tmp_path / "deep" / "weights.safetensors", steps=3)
    with torch.no_grad():
        with vlprune.apply(model, "swiftkv", weights=net):
            own = model(**inputs).logits
        with vlprune.apply(model, "swiftkv", weights=file):
            assert torch.equal(model(**inputs).logits, own)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiny = text_families()["llama"]
    model = tiny.build()
    net, facts = weights_for(model), find_adapter(model).facts
    with pytest.raises(OptionError, match="give keep=2"):
        swiftkv(facts, 0.75, weights=net)
    with pytest.raises(OptionError, match="trains the projections"):
        swiftkv(facts, 0.5, everywhere=True)
    with pytest.raises(OptionError, match="cannot be read"):
        swiftkv(facts, 0.5, weights=tmp_path / "none.safetensors")
    with pytest.raises(OptionError, match=r"weights=dict"):
        swiftkv(facts, 0.5, weights={})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="made for 4 layers, and this decoder has 6"):
        swiftkv(vlprune.method.ModelFacts(decoder_layers=6), 0.5, weights=net)
    with pytest.raises(OptionError, match="start at one from 1 to 3"):
        EarlyKeys.of(decoder_layers(model), 4)
    with pytest.raises(UnsupportedPointError, match="tokens leave or return between the two"):
        vlprune.apply(model, ["swiftkv", "random_text"], swiftkv={"weights": net}, random_text={"keep": 0.5, "point": "llm:3"})
    with pytest.raises(UnsupportedPointError, match="in no other way"):
        vlprune.apply(model, ["swiftkv", "unified_layer_skip"], swiftkv={"weights": net}, unified_layer_skip={"keep": 0.5})
    assert not hasattr(model, "vlprune")


def test_tokens_may_leave_before_the_prompt_stops() -> None:
    """Together with a method that drops text at layer 1: drop and keys go by the same tokens."""
    tiny = text_families()["llama"]
    model = tiny.build()
    net, inputs = weights_for(model), tiny.prompt([[23], [14]])
    with vlprune.apply(model, ["random_text", "swiftkv"], swiftkv={"weights": net}, random_text={"keep": 0.5, "point": "llm:1"}), torch.no_grad():
        out = generate(model, inputs)
        for number, row in enumerate(([23], [14])):
            alone = generate(model, tiny.prompt([row], row_numbers=[number]))
            torch.testing.assert_close(torch.stack(out.logits)[:, number], torch.stack(alone.logits)[:, 0], **TOLERANCE)


def test_the_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on the embedded model, stopped and gone on with, then on a model from a folder; the loss falls and everything is written."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    import train_swiftkv as script

    common = ["--work", str(tmp_path / "recall"), "--start", "1", "--length", "128", "--batch", "2", "--n", "2", "--minutes", "5"]
    script.main([*common, "--steps", "2"])
    first = EarlyKeys.load(tmp_path / "recall" / "weights.safetensors")
    script.main([*common, "--steps", "4"])
    second = EarlyKeys.load(tmp_path / "recall" / "weights.safetensors")
    assert (first.start, first.depth) == (1, 6)
    assert not torch.equal(first.k, second.k)
    model = script.load(script.train_tiny_recall.ASSETS)
    untrained, texts = EarlyKeys.of(decoder_layers(model), 1), script.recall_texts(2, 128)(0)
    before, after = (sum(part.item() for part in script.losses(model, net, texts)) for net in (untrained, second))
    assert after < before
    rows = json.loads((tmp_path / "recall" / "results.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["dense", "own projections", "untrained", "distilled"]
    assert rows[1]["flops"] == rows[3]["flops"] < 0.5

    tiny = text_families()["llama"]
    tiny.build().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(script.text_quality, "CONTEXT", 24)
    monkeypatch.setattr(script.text_quality, "PROMPT", 12)
    told = ["--model", str(tmp_path / "model"), "--work", str(tmp_path / "told"), "--batch", "2", "--n", "2", "--stories", "2"]
    script.main([*told, "--steps", "1", "--group", "2"])
    rows = json.loads((tmp_path / "told" / "results.json").read_text())["rows"]
    assert rows[0]["agreement"] == 1.0
    assert rows[3]["kv"] == 0.75
