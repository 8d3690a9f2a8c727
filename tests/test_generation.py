"""Every way transformers generates, trains and caches: each works, or is refused with a clear message."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vlprune
from tests.oracle import hidden_columns, masked_run
from tests.tiny import IMAGE, families
from vlprune.errors import UnsupportedCallError

#: One vision-side and two in-decoder methods; the last reads attention and drops in stages.
CASES = [("hiprune", {}), ("fastv", {}), ("transprune", {}), ("transprune", {"positions": "renumber"})]
IDS = ["before", "inside", "stages", "renumbered"]
ROWS = [[3, "image", 4], [2, "image", 3, "image", 5]]


def tiny(name: str = "llava", attention: str = "sdpa") -> tuple[Any, Any]:
    family = families()[name]
    return family, family.build(attention)


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    with torch.no_grad():
        return model.generate(**inputs, **options)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_beam_search_and_return_sequences(method: str, options: dict[str, Any]) -> None:
    """Beams on a batch equal beams on each row alone; one beam of each is a real continuation."""
    family, model = tiny()
    with vlprune.apply(model, method, keep=0.4, **options):
        both = generate(model, family.prompt(ROWS), num_beams=3, num_return_sequences=2, output_logits=False)
        for row in range(2):
            alone = generate(model, family.prompt([ROWS[row]], row_numbers=[row]), num_beams=3, num_return_sequences=2, output_logits=False)
            assert torch.equal(both.sequences[2 * row : 2 * row + 2, -6:], alone.sequences[:, -6:])
        one = generate(model, family.prompt(ROWS), num_beams=1)
        again = generate(model, family.prompt(ROWS), num_beams=1, num_return_sequences=1)
        assert torch.equal(one.sequences, again.sequences)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_sampled_sequences_of_one_prompt(method: str, options: dict[str, Any]) -> None:
    """``num_return_sequences`` with sampling repeats prompts after the features were encoded."""
    family, model = tiny()
    if not hasattr(type(model), "_expand_multimodal_outputs"):
        pytest.skip("this version of transformers repeats single pictures, which mixes up rows with different numbers of them")
    with vlprune.apply(model, method, keep=0.4, **options) as handle:
        torch.manual_seed(0)
        out = generate(model, family.prompt(ROWS), do_sample=True, num_return_sequences=3)
        assert out.sequences.shape[0] == 6
        kept = handle.report().points[-1].keep_indices
        assert torch.equal(kept[0], kept[2])
        assert torch.equal(kept[3], kept[5])
        generate(model, family.prompt(ROWS))
        alone = handle.report().points[-1].keep_indices
        assert torch.equal(kept[0], alone[0])
        assert torch.equal(kept[3], alone[1])


@pytest.mark.parametrize("turn", ["text", "image"])
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_second_turn_on_the_same_cache(method: str, options: dict[str, Any], turn: str) -> None:
    """A second turn, with or without a new picture, equals the masked run of the whole conversation."""
    family, model = tiny()
    first = family.prompt([ROWS[0]])
    second = family.prompt([[4, "image", 3] if turn == "image" else [5]], seed=1)
    cache = DynamicCache(config=model.config.text_config)
    with vlprune.apply(model, method, keep=0.4, **options) as handle, torch.no_grad():
        length = first["input_ids"].shape[1]
        model(**first, past_key_values=cache, use_cache=True)
        hidden = hidden_columns(handle.trace, 4)
        assert cache.get_seq_length() == length
        ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
        inputs = {k: v for k, v in second.items() if k not in ("input_ids", "attention_mask")}
        out = model(input_ids=second["input_ids"], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **inputs)
        assert out.logits.shape[1] == second["input_ids"].shape[1]
        assert cache.get_seq_length() == ids.shape[1]
        new = hidden_columns(handle.trace, 4) if turn == "image" else [torch.zeros_like(second["input_ids"], dtype=torch.bool)] * 4
        step = model(input_ids=ids[:, -1:], attention_mask=torch.ones(1, ids.shape[1] + 1), past_key_values=cache, use_cache=True).logits
    if options:
        assert bool(torch.isfinite(step).all())         # renumbered ids have no masked equivalent; the golden models cover them
        return
    hidden = [torch.cat([old, now], dim=1) for old, now in zip(hidden, new, strict=True)]
    pixels = {k: torch.cat([first[k], second[k]]) if k in second else first[k] for k in first if k.startswith("pixel")}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    reference = masked_run(model, whole, hidden, ids[:, -1:]).logits
    seen = ~hidden[-1][:, length:]
    torch.testing.assert_close(out.logits[seen], reference[:, length:-1][seen], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(step[:, 0], reference[:, -1], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_interleaved_generations(method: str, options: dict[str, Any]) -> None:
    """Two conversations step in turn on one model; each goes on as if alone."""
    family, model = tiny()
    prompts = [family.prompt([ROWS[0]]), family.prompt([ROWS[1]], seed=3)]
    with vlprune.apply(model, method, keep=0.4, **options), torch.no_grad():
        expected = [generate(model, prompt).sequences[0, -6:] for prompt in prompts]
        caches = [DynamicCache(config=model.config.text_config) for _ in prompts]
        tokens: list[list[torch.Tensor]] = [[], []]
        for number, prompt in enumerate(prompts):
            tokens[number].append(model(**prompt, past_key_values=caches[number]).logits[:, -1].argmax(-1))
        for _ in range(5):
            for number in range(2):
                mask = torch.ones(1, caches[number].get_seq_length() + 1, dtype=torch.long)
                out = model(input_ids=tokens[number][-1][:, None], attention_mask=mask, past_key_values=caches[number])
                tokens[number].append(out.logits[:, -1].argmax(-1))
        for number in range(2):
            assert torch.equal(torch.cat(tokens[number]), expected[number])


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_two_threads_on_one_model(method: str, options: dict[str, Any]) -> None:
    """Threads do not see each other's prompts."""
    family, model = tiny()
    prompts = [family.prompt([ROWS[0]]), family.prompt([ROWS[1]], seed=3)]
    with vlprune.apply(model, method, keep=0.4, **options):
        expected = [generate(model, prompt).sequences for prompt in prompts]
        results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        threads = [
            threading.Thread(target=lambda n=n: results[n].extend(generate(model, prompts[n]).sequences for _ in range(4))) for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(2):
        assert len(results[number]) == 4
        assert all(torch.equal(result, expected[number]) for result in results[number])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_static_cache(method: str, options: dict[str, Any], attention: str, rows: int) -> None:
    """A static buffer holds the kept entries first; unwritten slots stay hidden."""
    family, model = tiny(attention=attention)
    prompt = family.prompt(ROWS[:rows])
    with vlprune.apply(model, method, keep=0.4, **options):
        expected = generate(model, prompt)
        out = generate(model, prompt, cache_implementation="static")
        cache = StaticCache(config=model.config.text_config, max_cache_len=prompt["input_ids"].shape[1] + 8)
        given = generate(model, prompt, past_key_values=cache)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(given.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "options"), [*CASES, ("hiprune", {"positions": "renumber"})], ids=[*IDS, "before-renumbered"])
@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_assisted_generation(method: str, options: dict[str, Any], how: str) -> None:
    """Candidates are checked in one forward and rolled back on the pruned cache; methods that look at the text are refused."""
    family, model = tiny()
    prompt = family.prompt([[9, "image", 5]])
    prompt["input_ids"][0, -2:] = prompt["input_ids"][0, :2]             # something to look up, before the picture
    helper = {"prompt_lookup_num_tokens": 3} if how == "prompt_lookup" else {"assistant_model": family.build(seed=0)}
    with vlprune.apply(model, method, keep=0.4, **options):
        expected = generate(model, prompt, output_logits=False).sequences
        if vlprune.get_method(method).text_aware:
            with pytest.raises(UnsupportedCallError, match="assist"):
                generate(model, prompt, output_logits=False, **helper)
            return
        out = generate(model, prompt, output_logits=False, **helper).sequences
    assert torch.equal(out, expected)


def test_chunked_prefill_is_refused() -> None:
    """A chunk does not hold the whole picture."""
    family, model = tiny()
    with vlprune.apply(model, "hiprune", keep=0.4), pytest.raises((UnsupportedCallError, ValueError), match="prefill"):
        generate(model, family.prompt([ROWS[0]]), prefill_chunk_size=8)


def test_contrastive_search_is_not_in_transformers() -> None:
    """transformers 5 fetches it as remote code, so without ``trust_remote_code`` it refuses by itself."""
    family, model = tiny()
    with vlprune.apply(model, "hiprune", keep=0.4), pytest.raises((ValueError, OSError, ImportError), match=r"trust_remote_code|contrastive"):
        generate(model, family.prompt([ROWS[0]]), penalty_alpha=0.6, top_k=4)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_quantized_cache(method: str, options: dict[str, Any]) -> None:
    """Any layer that stores its entries its own way is used through its own update."""
    from transformers import cache_utils

    class Rounded(cache_utils.DynamicLayer):
        """Stands for a quantized layer without its packages: entries are stored in half precision."""

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(key_states.half(), value_states.half(), *args, **kwargs)
            return keys.float(), values.float()

    family, model = tiny()
    prompt = family.prompt([ROWS[0]])
    with vlprune.apply(model, method, keep=0.4, **options):
        expected = generate(model, prompt, max_new_tokens=2)
        out = generate(model, prompt, max_new_tokens=2, past_key_values=cache_utils.Cache(layers=[Rounded() for _ in range(4)]))
    torch.testing.assert_close(out.logits[1], expected.logits[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["fastv", "todre", "transprune"])
def test_caches_that_hide_their_keys(method: str) -> None:
    """A first turn never needs the stored keys; the choice is the one made without a cache."""
    from transformers import cache_utils

    class Hidden(getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)):  # type: ignore[misc]
        """Counts as quantized: nobody may read its keys, only what `update` returns."""

        def __init__(self) -> None:
            cache_utils.DynamicLayer.__init__(self)

        update = cache_utils.DynamicLayer.update
        lazy_initialization = cache_utils.DynamicLayer.lazy_initialization
        get_seq_length = cache_utils.DynamicLayer.get_seq_length
        _quantize = _dequantize = None

    family, model = tiny()
    prompt = family.prompt(ROWS)
    with vlprune.apply(model, method, keep=0.4) as handle, torch.no_grad():
        expected = model(**prompt, use_cache=False).logits
        kept = handle.report().to_dict()["points"]
        logits = model(**prompt, past_key_values=cache_utils.Cache(layers=[Hidden() for _ in range(4)])).logits
        assert handle.report().to_dict()["points"] == kept
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_hybrid_caches_are_refused() -> None:
    """Recurrent layers have no entries to leave out."""
    from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer

    family, model = tiny()
    with vlprune.apply(model, "hiprune", keep=0.4), pytest.raises(UnsupportedCallError, match="LinearAttentionAndFullAttentionLayer"), torch.no_grad():
        model(**family.prompt([ROWS[0]]), past_key_values=Cache(layers=[LinearAttentionAndFullAttentionLayer() for _ in range(4)]))


def test_sliding_window_cache_counts_logical_positions() -> None:
    """Gemma 3 generates past its window on a pruned cache (law 1 covers the numbers; this one goes further)."""
    family, model = tiny("gemma3")
    prompt = family.prompt([[3, "image", 12]])
    with vlprune.apply(model, "random", keep=0.4) as handle:
        out = generate(model, prompt, max_new_tokens=24)
        hidden = hidden_columns(handle.trace, 4)
    length = prompt["input_ids"].shape[1]
    reference = masked_run(model, prompt, hidden, out.sequences[:, length:-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, 1)[0], reference[0, length - 1 :], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_inputs_embeds(method: str, options: dict[str, Any]) -> None:
    """Placeholder embeddings are found; embeddings that hide where the picture is are refused."""
    family, model = tiny()
    prompt = family.prompt(ROWS)
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    others = {k: v for k, v in prompt.items() if k != "input_ids"}
    with vlprune.apply(model, method, keep=0.4, **options), torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, **others).logits, model(**prompt).logits)
        ids = generate(model, prompt).sequences[:, prompt["input_ids"].shape[1] :]
        assert torch.equal(generate(model, {"inputs_embeds": embeds, **others}).sequences, ids)
        with pytest.raises(UnsupportedCallError, match="input_ids"):
            model(inputs_embeds=embeds, attention_mask=prompt["attention_mask"])


def test_logits_to_keep_and_outputs() -> None:
    """Shapes are those of the untouched model; attention maps are refused."""
    family, model = tiny()
    prompt = family.prompt(ROWS)
    with vlprune.apply(model, "fastv", keep=0.4), torch.no_grad():
        whole = model(**prompt)
        torch.testing.assert_close(model(**prompt, logits_to_keep=1).logits, whole.logits[:, -1:])
        assert isinstance(model(**prompt, return_dict=False)[0], torch.Tensor)
        with pytest.raises(UnsupportedCallError, match="output_attentions"):
            model(**prompt, output_attentions=True)
        assert torch.equal(model(**prompt).logits, whole.logits)         # the refusal left nothing behind


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_training_forward(method: str, options: dict[str, Any]) -> None:
    """Labels, gradients, and the same gradients with gradient checkpointing."""
    family, model = tiny()
    prompt = family.prompt(ROWS)
    labels = prompt["input_ids"].masked_fill((prompt["input_ids"] == IMAGE) | (prompt["attention_mask"] == 0), -100)
    with vlprune.apply(model, method, keep=0.4, **options):
        model.train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing and transformers_replays_hooks():
                model.gradient_checkpointing_enable()
                with pytest.raises(UnsupportedCallError, match="Update transformers"):
                    model(**prompt, labels=labels)
                return
            if checkpointing:
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable()
            model.zero_grad()
            loss = model(**prompt, labels=labels).loss
            loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert bool(torch.isfinite(loss))
        assert gradients[0].keys() == gradients[1].keys()
        assert any(name.startswith("model.vision_tower") for name in gradients[0])
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def transformers_replays_hooks() -> bool:
    """Before checkpointing moved inside the hooks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_half_precision(method: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Scores are computed in float32; the outputs keep the model's dtype."""
    family, model = tiny()
    model.to(dtype)
    prompt = family.prompt(ROWS)
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    with vlprune.apply(model, method, keep=0.4, **options) as handle:
        out = generate(model, prompt)
        assert out.logits[0].dtype in (dtype, torch.float32)
        assert all(bool(torch.isfinite(step.float()).all()) for step in out.logits)
        assert handle.report().points[-1].visual_kept == 42


def test_device_map() -> None:
    """accelerate's hooks and ours live side by side."""
    accelerate = pytest.importorskip("accelerate")
    family, model = tiny()
    prompt = family.prompt(ROWS)
    with vlprune.apply(model, "transprune", keep=0.4):
        expected = generate(model, prompt).sequences
    model = accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    with vlprune.apply(model, "transprune", keep=0.4):
        assert torch.equal(generate(model, prompt).sequences, expected)
    assert torch.equal(generate(model, prompt).sequences, generate(tiny()[1], prompt).sequences)


def test_torch_compile_runs_with_graph_breaks() -> None:
    """The compiled model gives what the plain one gives; hooks break graphs, they do not change numbers."""
    family, model = tiny()
    prompt = family.prompt([ROWS[0]])
    with vlprune.apply(model, "hiprune", keep=0.4), torch.no_grad():
        expected = model(**prompt).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**prompt).logits, expected, rtol=1e-4, atol=1e-4)


def test_renumbering_equals_a_physically_shorter_prompt() -> None:
    """Renumbered survivors before the decoder are what a decoder sees that never got the others."""
    family, model = tiny()
    prompt = family.prompt([ROWS[0]])
    with vlprune.apply(model, "random", keep=0.4, positions="renumber") as handle, torch.no_grad():
        pruned = model(**prompt).logits
        stays = ~hidden_columns(handle.trace, 4)[-1][0]
        handle.remove()
        seen = {}
        hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
        model(**prompt)
        hook.remove()
        short = model.model.language_model(inputs_embeds=seen["inputs_embeds"][:, stays]).last_hidden_state
        torch.testing.assert_close(pruned[:, stays], model.lm_head(short), rtol=1e-4, atol=1e-4)


def test_several_methods_together() -> None:
    """Stages of several methods act in the order of their points; budgets are shares of the original number."""
    family, model = tiny()
    prompt = family.prompt(ROWS)
    with vlprune.apply(model, ["hiprune", "fastv"], hiprune={"keep": 0.5}, fastv={"layer": 3, "keep": 0.5}) as handle:
        out = generate(model, prompt)
        points = handle.report().points
        hidden = hidden_columns(handle.trace, 4)
        assert [(record.point, record.visual_kept) for record in points] == [("before_llm", 54), ("llm:3", 54)]
    with vlprune.apply(model, vlprune.PruningMethod("both", (*_stages(model, "hiprune", 0.5), *_stages(model, "fastv", 0.25)))) as handle:
        out = generate(model, prompt)
        assert [record.visual_kept for record in handle.report().points] == [54, 27]
        hidden = hidden_columns(handle.trace, 4)
    length = prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    reference = masked_run(model, prompt, hidden, out.sequences[:, length:-1], position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), reference[:, length - 1 :], rtol=1e-4, atol=2e-4)


def _stages(model: Any, name: str, keep: float) -> tuple[vlprune.Stage, ...]:
    from vlprune.adapter import find_adapter

    return vlprune.get_method(name).build(find_adapter(model).facts, keep).stages
