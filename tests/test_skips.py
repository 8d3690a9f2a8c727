"""The primitives beyond dropping: rows that come back, rows and layers that are skipped, entries edited out."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.oracle import masked_run
from tests.tiny import IMAGE, families
from vlprune.method import Attend, Bypass, LayerSkip, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.reducers import Drop, Merge, Recycle
from vlprune.selectors import TopK

EVERYTHING, NOTHING = (lambda visual: torch.ones_like(visual)), (lambda visual: torch.zeros_like(visual))
TEXT_ONLY = lambda visual: ~visual


@pytest.mark.parametrize("kv", ["full", "project_only", "active_only"])
@pytest.mark.parametrize("part", ["attn", "mlp", "block"])
def test_bypass_of_nothing_is_dense_and_of_everything_is_identity(part: str, kv: str) -> None:
    """Law 2 for bypass."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4]])
    with torch.no_grad():
        dense = model(**prompt, output_hidden_states=True)
        with vlprune.apply(model, PruningMethod("b", bypasses=(Bypass(2, part, EVERYTHING, kv),))):
            torch.testing.assert_close(model(**prompt).logits, dense.logits, rtol=1e-5, atol=1e-5)
        with vlprune.apply(model, PruningMethod("b", bypasses=(Bypass(2, part, NOTHING, kv),))):
            out = model(**prompt, output_hidden_states=True)
    if part == "block":
        assert torch.equal(out.hidden_states[3], dense.hidden_states[2])
    else:
        layer = model.model.language_model.layers[2]
        with torch.no_grad():
            before, after = dense.hidden_states[2], dense.hidden_states[3]
            if part == "attn":
                expected = before + layer.mlp(layer.post_attention_layernorm(before))
            else:
                expected = after - layer.mlp(layer.post_attention_layernorm(middle(model, prompt, before)))
        torch.testing.assert_close(out.hidden_states[3], expected, rtol=1e-4, atol=1e-5)


def middle(model: torch.nn.Module, prompt: dict[str, torch.Tensor], before: torch.Tensor) -> torch.Tensor:
    """States between attention and MLP of layer 2."""
    seen = {}
    hook = model.model.language_model.layers[2].self_attn.register_forward_hook(lambda m, a, o: seen.update(out=o[0]))
    model(**prompt)
    hook.remove()
    return before + seen["out"]


@pytest.mark.parametrize("part", ["attn", "block"])
def test_bypassed_rows_without_keys_equal_hidden_columns(part: str) -> None:
    """``active_only``: the others see in that layer only the rows that ran; also while decoding."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4], [5, "image", 2]])
    method = PruningMethod("b", bypasses=(Bypass(1, part, TEXT_ONLY, "active_only"),))
    with torch.no_grad(), vlprune.apply(model, method):
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        length = prompt["input_ids"].shape[1]
        ids = out.sequences[:, :-1]
        extended = {**prompt, "input_ids": ids, "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)}
        positions = (extended["attention_mask"].cumsum(1) - 1).clamp(min=0)
        whole = model(**extended, position_ids=positions).logits
    for step in range(3):
        torch.testing.assert_close(out.logits[step], whole[:, length - 1 + step], rtol=1e-4, atol=1e-4)


def test_a_skip_brings_the_rows_back() -> None:
    """Rows dropped before layer 1 return before layer 2: the same as a bypass of that block without keys."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4], [6]])
    skip = Stage(vlprune.LLMLayer(1), RandomScore(0), TopK(), Drop(), vlprune.Budget(0.5), restore=2)
    with torch.no_grad(), vlprune.apply(model, PruningMethod("skip", (skip,))) as handle:
        skipped = model.generate(**prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        kept = handle.report().points[0].keep_indices[0]
        assert [layer.stored_keys().shape[2] for layer in skipped.past_key_values.layers][1] < 43 + 3
        assert [layer.stored_keys().shape[2] for layer in skipped.past_key_values.layers][2] == 43 + 3
        states = model(**prompt, output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states] == [43] * 5
    stays = torch.zeros(36, dtype=torch.bool)
    stays[kept] = True

    def rows(visual: torch.Tensor) -> torch.Tensor:
        runs = ~visual
        runs[0, visual[0]] = stays
        return runs

    with torch.no_grad(), vlprune.apply(model, PruningMethod("b", bypasses=(Bypass(1, "block", rows, "active_only"),))):
        bypassed = model.generate(**prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(skipped.logits), torch.stack(bypassed.logits), rtol=1e-4, atol=1e-4)


def test_layers_skipped_by_phase() -> None:
    """A layer that never runs equals a model without it; one that runs only in prefill keeps its prompt keys."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4]])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        with vlprune.apply(model, PruningMethod("s", layer_skips=(LayerSkip(2, lambda phase, step, position: True),))):
            always = model.generate(**prompt, **options)
        assert torch.equal(always.sequences, model.generate(**prompt, **options).sequences)
        with vlprune.apply(model, PruningMethod("s", layer_skips=(LayerSkip(2, lambda phase, step, position: False),))):
            never = model.generate(**prompt, **options)
        with vlprune.apply(model, PruningMethod("s", layer_skips=(LayerSkip(2, lambda phase, step, position: phase == "prefill"),))):
            prefill = model.generate(**prompt, **options)
            assert prefill.past_key_values.layers[2].stored_keys().shape[2] == prompt["input_ids"].shape[1]
        layers = model.model.language_model.layers
        removed = layers[2]
        removed.forward, kept = (lambda hidden, **_: hidden), removed.forward
        shorter = model(input_ids=never.sequences[:, :-1], pixel_values=prompt["pixel_values"]).logits
        del removed.forward
        assert kept == removed.forward
    length = prompt["input_ids"].shape[1]
    torch.testing.assert_close(torch.stack(never.logits, 1)[0], shorter[0, length - 1 :], rtol=1e-4, atol=1e-4)
    assert torch.equal(prefill.logits[0], always.logits[0])
    assert not torch.equal(prefill.logits[1], always.logits[1])


def test_entries_can_be_edited_out_of_a_cache_layer() -> None:
    """kv_edit: what is taken out after prefill is not seen any more; in all layers it equals a prompt mask."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4]])
    length = prompt["input_ids"].shape[1]
    with torch.no_grad(), vlprune.apply(model, "random", keep=0.5):
        cache = model(**prompt, use_cache=True).past_key_values
        entries = cache.layers[0].stored_keys().shape[2]
        stays = torch.tensor([[n for n in range(entries) if n not in (4, 5, 6)]])
        for layer in cache.layers:
            layer.edit(stays)
            assert layer.stored_keys().shape[2] == entries - 3
            assert layer.get_seq_length() == length
        gone = cache.layers[0].keymap.dropped
        assert int(gone) == 18 + 3
        out = model(input_ids=prompt["input_ids"][:, -1:], attention_mask=torch.ones(1, length + 1), past_key_values=cache)
        assert bool(torch.isfinite(out.logits).all())
        assert cache.layers[0].stored_keys().shape[2] == entries - 2


def test_attention_over_a_selection_of_keys() -> None:
    """In one layer nobody sees the picture, now and later: an explicit mask on that layer gives the same."""
    family = families()["llava"]
    model = family.build()
    prompt = family.prompt([[3, "image", 4], [5, "image", 2]])
    length = prompt["input_ids"].shape[1]
    with torch.no_grad(), vlprune.apply(model, PruningMethod("a", attends=(Attend(2, TEXT_ONLY),))):
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    hidden = [torch.zeros(2, length, dtype=torch.bool)] * 4
    hidden[2] = prompt["input_ids"] == IMAGE
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    reference = masked_run(model, prompt, hidden, out.sequences[:, length:-1], position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), reference[:, length - 1 :], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize("reducer", [Merge(), Recycle(2)], ids=["merge", "recycle"])
def test_merged_tokens_equal_a_naive_loop(reducer: object, size_bias: bool, attention: str) -> None:
    """A decoder fed with the merged tokens (built token by token here), log sizes on their keys, sees what the pruned model sees."""
    family = families()["llava"]
    model = family.build(attention)
    prompt = family.prompt([[3, "image", 4]])
    stage = Stage(vlprune.BeforeLLM(), RandomScore(1), TopK(), reducer, vlprune.Budget(6))
    seen: dict[str, torch.Tensor] = {}
    decoder = model.model.language_model
    with torch.no_grad():
        hook = decoder.register_forward_pre_hook(lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True)
        model(**prompt)
        hook.remove()
        with vlprune.apply(model, PruningMethod("merging", (stage,), size_bias=size_bias)) as handle:
            out = model.generate(**prompt, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
            kept = handle.report().points[0].keep_indices[0].tolist()
        picture = seen["embeds"][0, 3:39]
        takes = kept if isinstance(reducer, Merge) else kept[1::2]
        groups = {k: [k] for k in kept}
        for token in range(36):
            if token not in kept:
                groups[max(takes, key=lambda k: float(torch.cosine_similarity(picture[token], picture[k], dim=0)))].append(token)
        merged = torch.stack([picture[groups[k]].mean(0) for k in kept])
        sizes = torch.tensor([len(groups[k]) for k in kept]).float()
        new = decoder.embed_tokens(out.sequences[0, 43:-1])
        embeds = torch.cat([seen["embeds"][0, :3], merged, seen["embeds"][0, 39:], new])[None]
        places = torch.cat([torch.arange(3), 3 + torch.tensor(kept), torch.arange(39, 43 + len(new))])[None]
        bias = torch.zeros(embeds.shape[1])
        bias[3:9] = sizes.log() if size_bias else 0.0
        mask = torch.full((embeds.shape[1], embeds.shape[1]), torch.finfo(torch.float32).min).triu(1) + bias
        states = decoder(inputs_embeds=embeds, position_ids=places, attention_mask=mask[None, None]).last_hidden_state
        expected = model.lm_head(states)[0, -3:]
    torch.testing.assert_close(torch.stack(out.logits, 1)[0], expected, rtol=1e-4, atol=2e-4)
