"""Rows that pass by parts of layers, layers skipped by schedule, keys chosen head by head: the primitives on text, each against a long forward or a loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import decoder_of, hidden_columns, masked_run, snapshot
from tests.test_decode_select import dense
from tests.test_text_laws import STEPS, TOLERANCE, backend, check_one_long_forward, generate, longer, prompts
from tests.tiny import families, tiny_clip
from tests.tiny_text import text_families
from vlprune.adapters._head_attention import attend_heads
from vlprune.budget import Budget
from vlprune.errors import OptionError, UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.method import Attend, Bypass, DecodeSelect, LayerSkip, Observe, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import BeforeLLM, LLMLayer
from vlprune.protocols import HeadChoice, HeadInputs, Step, Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.selectors import TopK

ATTENTION = SignalScore(Tap("last_row", 2))


def some(layer: int, part: str, kv: str, tokens: str, keep: Any = 0.5, scorer: Any = None) -> Bypass:
    return Bypass(layer, part, kv=kv, tokens=tokens, budget=Budget(keep), scorer=scorer or RandomScore(3), selector=TopK())


@pytest.mark.parametrize("kv", ["full", "project_only", "active_only", "copy_prev_layer"])
@pytest.mark.parametrize("part", ["attn", "block"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral", "llava", "qwen2_5_vl"])
def test_rows_that_pass_by_attention(family: str, part: str, kv: str) -> None:
    tiny = text_families()[family]
    model = tiny.build(backend(tiny))
    sets = ("text", "all", "visual") if tiny.modalities else ("text",)
    for tokens in sets:
        rows = prompts(tiny) if tokens != "visual" else [[3, "image", 9], [2, "image", 5]]
        check_one_long_forward(tiny, model, PruningMethod("b", bypasses=(some(2, part, kv, tokens, scorer=ATTENTION),)), rows)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "llava"])
def test_rows_that_pass_by_the_mlp_and_attention_each_their_own(family: str) -> None:
    """The MLP's choice is made behind the attention, also by what the last token looked at there."""
    tiny = text_families()[family]
    model = tiny.build()
    for attention_kv in ("active_only", "project_only"):
        both = (some(2, "attn", attention_kv, "text", 0.6, ATTENTION), some(2, "mlp", "full", "text", 0.4, ATTENTION), some(3, "mlp", "full", "text", 7))
        handle = check_one_long_forward(tiny, model, PruningMethod("b", bypasses=both), prompts(tiny))
        records = {record.point: record for record in handle.report().bypasses}
        assert list(records) == ["llm:2.attn", "llm:2.mlp", "llm:3.mlp"]
        share = records["llm:2.mlp"].visual_kept / records["llm:2.mlp"].visual_before
        assert abs(share - 0.4) < 0.05
        assert records["llm:3.mlp"].visual_kept == 14
        assert "llm:2.attn" in str(handle.report())


def test_together_with_tokens_that_leave() -> None:
    """Stages cut the sequence, bypasses choose among what is left, at layers behind and before."""
    for name in ("llama", "llava"):
        tiny = text_families()[name]
        drop = Stage(LLMLayer(2), RandomScore(5), TopK(), Drop(), Budget(0.6), tokens="text")
        for kv in ("active_only", "project_only"):
            method = PruningMethod("b", (drop,), bypasses=(some(1, "block", kv, "text"), some(3, "block", kv, "all", scorer=SignalScore(Tap("last_row", 3)))))
            check_one_long_forward(tiny, tiny.build(), method, prompts(tiny))


@pytest.mark.parametrize("kv", ["active_only", "project_only", "copy_prev_layer"])
@pytest.mark.parametrize("part", ["attn", "mlp", "block"])
def test_new_tokens_pass_by_as_decided(part: str, kv: str) -> None:
    """Decisions by step for the whole batch, and (where every row keeps its keys) row by row."""
    if part == "mlp" and kv == "copy_prev_layer":
        with pytest.raises(OptionError, match="attention that is bypassed"):
            Bypass(2, part, phase="decode", kv=kv, tokens="text")
        return
    tiny = text_families()["qwen3"]
    model = tiny.build()
    decisions = [lambda step: step.state.step % 2 == 0]
    if kv != "active_only" or part == "mlp":
        decisions.append(lambda step: [step.state.step % 2 == 0, step.state.step < 2])
    for decide in decisions:
        method = PruningMethod("d", bypasses=(Bypass(2, part, phase="decode", kv=kv, tokens="text", decode=decide),))
        handle = check_one_long_forward(tiny, model, method, prompts(tiny))
        skipped = handle.report().decoding
        assert skipped["steps"] == STEPS - 1
        assert skipped["mlp_skipped"] == (0 if part == "attn" else 0.125)
        assert "decoding steps skipped" in str(handle.report())
    if kv == "active_only" and part != "mlp":
        method = PruningMethod("d", bypasses=(Bypass(2, part, phase="decode", kv=kv, tokens="text", decode=lambda step: [True, False]),))
        with vlprune.apply(model, method), pytest.raises(UnsupportedCallError, match="differ in length"):
            generate(model, tiny.prompt(prompts(tiny)))


def test_skipping_saves_work() -> None:
    """Fewer rows reach the projections and the MLP, and fewer keys the cache, as the report says."""
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt([[40]])
    seen: dict[str, int] = {}
    layer: Any = decoder_of(model).layers[2]  # type: ignore[index]
    for name, module in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj), ("mlp", layer.mlp.up_proj)):
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, seen.get(name, 0) + args[0].shape[1]))
    for kv, entries in (("active_only", 10), ("project_only", 40)):
        seen.clear()
        with torch.no_grad(), vlprune.apply(model, PruningMethod("b", bypasses=(some(2, "block", kv, "text", 10),))) as handle:
            cache = model(**inputs).past_key_values
            report = handle.report()
        assert (seen["q"], seen["mlp"]) == (10, 10)
        assert cache.layers[2].stored_keys().shape[2] == entries
        assert cache.get_seq_length() == 40
        assert report.flops_pruned < report.flops_dense
        assert report.kv_bytes_pruned == report.kv_bytes_dense * (3 * 40 + entries) // 160
    seen.clear()
    with torch.no_grad(), vlprune.apply(model, PruningMethod("b", bypasses=(Bypass(2, "block", phase="decode", tokens="text", kv="active_only"),))):
        generate(model, inputs)
    assert seen == {"q": 40, "k": 40, "mlp": 40}, "decoded tokens pass by"


def test_schedules_must_nest() -> None:
    model = text_families()["llama"].build()
    rises = LayerSkip(2, lambda phase, step, position: phase == "prefill" or step > 3)
    with pytest.raises(OptionError, match=r"layer 2 runs at decoding step 4 after step 0 skipped it"):
        vlprune.apply(model, PruningMethod("s", layer_skips=(rises,)))
    with pytest.raises(OptionError, match="after the prompt skipped it"):
        vlprune.apply(model, PruningMethod("s", layer_skips=(LayerSkip(2, lambda phase, step, position: phase == "decode"),)))
    late = LayerSkip(2, lambda phase, step, position: phase == "prefill" or step != 1, horizon=1)
    inputs = text_families()["llama"].prompt([[9]])
    with vlprune.apply(model, PruningMethod("s", layer_skips=(late,))), pytest.raises(UnsupportedCallError, match="rises again"):
        generate(model, inputs)
    tiny = text_families()["qwen3"]
    for kv in ("project_only", "copy_prev_layer"):                       # with keys it may rise, and prompts may skip
        check_one_long_forward(tiny, tiny.build(), PruningMethod("s", layer_skips=(replace(rises, kv=kv),)), prompts(tiny))
        skip = LayerSkip(2, lambda phase, step, position: phase == "decode", kv=kv)
        check_one_long_forward(tiny, tiny.build(), PruningMethod("s", layer_skips=(skip,)), prompts(tiny))


def test_generations_in_turn_have_states_of_their_own() -> None:
    """Two caches on one model: each step's number is that of its own generation."""
    tiny = text_families()["llama"]
    model = tiny.build()
    steps: list[tuple[int, int]] = []

    def decide(step: Step) -> bool:
        steps.append((step.state.step, step.state.position))
        step.state.values["seen"] = step.state.values.get("seen", 0) + 1
        return True

    method = PruningMethod("d", bypasses=(Bypass(1, "mlp", phase="decode", tokens="text", decode=decide),))
    with torch.no_grad(), vlprune.apply(model, method):
        caches = [model(**tiny.prompt([[length]])).past_key_values for length in (5, 8)]
        for number in (0, 1, 0, 0, 1):
            model(input_ids=torch.tensor([[7]]), past_key_values=caches[number])
        assert steps == [(0, 5), (0, 8), (1, 6), (2, 7), (1, 9)]
        assert [cache.layers[0].state.values["seen"] for cache in caches] == [3, 2]
        model(input_ids=torch.tensor([[7, 8]]), past_key_values=caches[0])
        model(input_ids=torch.tensor([[7]]), past_key_values=caches[0])
        assert steps[-1] == (0, 10)
        assert caches[0].layers[3].state.turn == 1
        state = caches[1].layers[0].state
        state.values["rows"] = torch.tensor([[1.0], [2.0]])
        assert state.rows(torch.tensor([1, 1, 0])).values["rows"].tolist() == [[2.0], [2.0], [1.0]]


def test_observers_see_the_residual() -> None:
    tiny = text_families()["gemma2"]
    model = tiny.build("eager")
    seen: list[Step] = []
    inputs = tiny.prompt([[9]])
    with vlprune.apply(model, PruningMethod("o", observes=(Observe(2, seen.append),))):
        out = generate(model, inputs)
    new = out.sequences[:, 9:-1]
    whole = {"input_ids": torch.cat([inputs["input_ids"], new], 1)}
    before: dict[str, Tensor] = {}
    layer: Any = decoder_of(model).layers[2]  # type: ignore[index]
    hook = layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, args: before.update(states=args[0]))
    with torch.no_grad():
        after = model(**whole, output_hidden_states=True).hidden_states[3]
    hook.remove()
    assert len(seen) == STEPS - 1
    torch.testing.assert_close(torch.cat([step.states for step in seen], 1), before["states"][:, 9:], **TOLERANCE)
    torch.testing.assert_close(torch.cat([step.after for step in seen if step.after is not None], 1), after[:, 9:], **TOLERANCE)


# token sets


def test_visual_and_text_tokens_together() -> None:
    """Two methods, two sets: the trace keeps them apart, each budget counts its own, and the whole equals the masked run."""
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[9, "image", 12], [14, "image", 3]])
    with torch.no_grad(), vlprune.apply(model, ["hiprune", "random_text"], keep=0.5, random_text={"point": "llm:2"}) as handle:
        logits = model(**inputs).logits
        records, hidden = handle.report().points, hidden_columns(handle.trace, 4)
    assert [(record.point, record.tokens, record.visual_before, record.visual_kept) for record in records] == [
        ("before_llm", "visual", 72, 36), ("llm:2", "text", 38, 18),
    ]  # fmt: skip
    assert "text" in str(handle.report())
    assert handle.report().to_dict()["points"][1]["tokens"] == "text"
    expected = masked_run(model, inputs, hidden).logits
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], expected[seen], **TOLERANCE)
    everything = Stage(LLMLayer(3), RandomScore(1), TopK(), Drop(), Budget(0.5), tokens="all")
    visual = Stage(BeforeLLM(), RandomScore(1), TopK(), Drop(), Budget(0.5))
    with torch.no_grad(), vlprune.apply(model, PruningMethod("v", (visual, everything))) as handle:
        logits, hidden = model(**inputs).logits, hidden_columns(handle.trace, 4)
        counts = [(r.tokens, r.visual_before, r.visual_kept) for r in handle.report().points]
    assert counts == [("visual", 72, 36), ("all", 74, 54)]               # shares are of the 57 and 53 tokens of the rows
    seen = inputs["attention_mask"].bool() & ~hidden[-1]
    torch.testing.assert_close(logits[seen], masked_run(model, inputs, hidden).logits[seen], **TOLERANCE)
    with pytest.raises(OptionError, match="come last"):
        vlprune.apply(model, PruningMethod("v", (everything, replace(visual, point=LLMLayer(3)))))


def test_what_is_protected_stays_and_counts() -> None:
    tiny = families()["llava"]
    model, inputs = tiny.build(), tiny.prompt([[9, "image", 12], [30], [2]])
    stage = Stage(BeforeLLM(), RandomScore(1), TopK(), Drop(), Budget(8), tokens="text", protect=(2, 3))
    with torch.no_grad(), vlprune.apply(model, PruningMethod("p", (stage,))) as handle:
        model(**inputs)
    gone = hidden_columns(handle.trace, 4)[0]
    text = (inputs["input_ids"] < 90) & inputs["attention_mask"].bool()
    assert [(int((row & there).sum()), int((row & ~there).sum())) for row, there in zip(gone, text, strict=True)] == [(13, 0), (22, 0), (0, 0)]
    for row in range(2):
        places = torch.nonzero(text[row]).flatten()
        assert not gone[row, torch.cat([places[:2], places[-3:]])].any()


def test_text_models_say_what_they_cannot() -> None:
    from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, GPT2Config

    model = text_families()["llama"].build()
    with pytest.raises(UnsupportedModelError, match=r"hiprune reduces visual tokens.*text or all"):
        vlprune.apply(model, "hiprune")
    gpt = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16))
    with pytest.raises(UnsupportedModelError, match=r"get_decoder\(\)\.layers"):
        vlprune.apply(gpt, "recent")
    words = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    clip = CLIPModel(CLIPConfig(text_config=words, vision_config=tiny_clip()))
    with pytest.raises(UnsupportedModelError, match="recent reduces text tokens"):
        vlprune.apply(clip, "recent")
    inputs = text_families()["llama"].prompt([[12]])
    with vlprune.apply(model) as handle:
        assert handle.method.name
        with pytest.raises(UnsupportedCallError, match="candidate tokens"):
            generate(model, inputs, prompt_lookup_num_tokens=3, output_logits=False)
        with pytest.raises(UnsupportedCallError, match="in pieces"):
            generate(model, inputs, prefill_chunk_size=4)
        with pytest.raises(UnsupportedCallError, match="output_attentions"):
            model(**inputs, output_attentions=True)
    stage = Stage(BeforeLLM(), RandomScore(0), TopK(), Drop(), Budget(0.5), tokens="text")
    skip = PruningMethod("s", (stage,), bypasses=(some(2, "attn", "active_only", "text"),))
    with pytest.raises(UnsupportedModelError, match="renumber"):
        vlprune.apply(model, skip, positions="renumber")
    with pytest.raises(UnsupportedPointError, match="do not hold the same tokens"):
        vlprune.apply(model, PruningMethod("c", bypasses=(some(1, "attn", "active_only", "text"), some(2, "attn", "copy_prev_layer", "text"))))
    with pytest.raises(UnsupportedPointError, match="rotates them differently"):
        vlprune.apply(text_families()["gemma3_text"].build(), PruningMethod("c", bypasses=(some(2, "attn", "copy_prev_layer", "text"),)))


def test_static_caches_embeddings_and_renumbering() -> None:
    tiny = text_families()["llama"]
    model, inputs = tiny.build(), tiny.prompt(prompts(tiny))
    for name in ("random_text", "ftp", "skipdecode"):
        card = vlprune.get_method(name)
        with vlprune.apply(model, name, keep=0.6, **card.test_options), torch.no_grad():
            growing = torch.stack(generate(model, inputs).logits)
            static = torch.stack(generate(model, inputs, cache_implementation="static", disable_compile=True).logits) if name != "skipdecode" else growing
            torch.testing.assert_close(static, growing, **TOLERANCE)
            embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}  # type: ignore[operator]
            assert torch.equal(model(**embeds).logits, model(**inputs).logits)  # type: ignore[operator]
    one = tiny.prompt([[23]])
    with vlprune.apply(model, "random_text", keep=0.5, positions="renumber") as handle, torch.no_grad():
        pruned = model(**one).logits
        stays = ~hidden_columns(handle.trace, 4)[-1][0]
    with torch.no_grad():
        short = model(input_ids=one["input_ids"][:, stays]).logits
    torch.testing.assert_close(pruned[:, stays], short, **TOLERANCE)


# keys chosen while decoding, and head by head


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llava"])
def test_text_keys_selected_while_decoding(family: str) -> None:
    """As for visual keys: at each step, from the layer on, the other text keys of the prompt are hidden."""
    tiny = text_families()[family]
    model, inputs = tiny.build(), tiny.prompt(prompts(tiny))
    select = DecodeSelect(2, Budget(0.4), reads=1, tokens="text", protect=(1, 2))
    with vlprune.apply(model, PruningMethod("k", decode_selects=(select,))):
        out = generate(model, inputs)
    start = inputs["input_ids"].shape[1]
    new = out.sequences[:, start:-1]
    whole, kwargs = longer(tiny, model, inputs, new)
    batch, length = whole["input_ids"].shape
    hidden = [torch.zeros(batch, length, length, dtype=torch.bool) for _ in range(4)]
    eager = tiny.build("eager")
    maps = dense(eager, whole, hidden, output_attentions=True, **kwargs).attentions[1]
    chosen_sets = set()
    for row in range(batch):
        text = [place for place in range(start) if inputs["attention_mask"][row, place] and int(inputs["input_ids"][row, place]) < 90]
        free = text[1:-2]
        for query in range(start, length):
            attention = maps[row, :, query, free].mean(0)
            keep = Budget(0.4).num_keep(len(text)) - 3
            chosen = {free[i] for i in attention.argsort(descending=True)[:keep].tolist()}
            chosen_sets.add((row, tuple(sorted(chosen))))
            for layer in (2, 3):
                hidden[layer][row, query, [place for place in free if place not in chosen]] = True
    assert len(chosen_sets) > 2, "the choice never changes: the test shows nothing"
    expected = dense(eager, whole, hidden, **kwargs).logits[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_with_keys_of_their_own_equal_a_loop(masked: bool, cap: float | None) -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    causal = torch.arange(9)[None, :] <= torch.arange(5)[:, None] + 4
    mask = (causal & (torch.arange(9) != 2)).expand(2, 1, -1, -1) if masked else None
    chosen = torch.stack([torch.randperm(9)[:6].sort().values for _ in range(8)]).reshape(2, 4, 6)
    asked = torch.stack([torch.randperm(5)[:3].sort().values for _ in range(8)]).reshape(2, 4, 3)
    seen = torch.rand(2, 4, 3, 6) > 0.1
    inputs = HeadInputs(0, "prefill", queries, keys, values, mask, 0.3)
    for choice in (None, HeadChoice(keys=chosen), HeadChoice(queries=asked), HeadChoice(keys=chosen, queries=asked), HeadChoice(chosen, asked, seen)):
        out = attend_heads(inputs, choice, cap=cap) if not (choice is None and mask is None) else None
        if out is None:
            continue
        expected = torch.zeros_like(queries)
        for b in range(2):
            for h in range(4):
                for number, q in enumerate(range(5) if choice is None or choice.queries is None else asked[b, h].tolist()):
                    places = list(range(9)) if choice is None or choice.keys is None else chosen[b, h].tolist()
                    allowed = [k for i, k in enumerate(places) if (mask[b, 0] if mask is not None else causal)[q, k] and
                               (choice is None or choice.seen is None or seen[b, h, number, i])]  # fmt: skip
                    logits = torch.tensor([float(queries[b, h, q] @ keys[b, h // 2, k]) * 0.3 for k in allowed])
                    logits = torch.tanh(logits / cap) * cap if cap else logits
                    expected[b, h, q] = sum((w * values[b, h // 2, k] for w, k in zip(logits.softmax(0), allowed, strict=True)), torch.zeros(8))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2_5_vl"])
def test_a_choice_of_everything_is_dense_and_one_for_all_heads_a_mask(family: str) -> None:
    """In prompts and while decoding."""
    tiny = text_families()[family]
    model, inputs = tiny.build(backend(tiny)), tiny.prompt(prompts(tiny))
    state = snapshot(model)
    plain = torch.stack(generate(model, inputs).logits)

    def everything(given: HeadInputs) -> HeadChoice:
        return HeadChoice(keys=torch.arange(given.keys.shape[2]).expand(*given.queries.shape[:2], -1))

    def odd(given: HeadInputs) -> HeadChoice:
        places = torch.arange(given.keys.shape[2])
        return HeadChoice(seen=((places % 2 == 1) | (places >= given.keys.shape[2] - 2))[None, None, None])

    state = snapshot(model)
    with vlprune.apply(model, PruningMethod("h", attends=(Attend(2, choose=everything, phase="both", tokens="text"),))):
        torch.testing.assert_close(torch.stack(generate(model, inputs).logits), plain, **TOLERANCE)
    with vlprune.apply(model, PruningMethod("h", attends=(Attend(2, choose=odd, phase="decode", tokens="text"),))):
        out = generate(model, inputs)
    assert snapshot(model) == state
    start = inputs["input_ids"].shape[1]
    whole, kwargs = longer(tiny, model, inputs, out.sequences[:, start:-1])
    batch, length = whole["input_ids"].shape
    hidden = [torch.zeros(batch, length, length, dtype=torch.bool) for _ in range(4)]
    for query in range(start, length):
        hidden[2][:, query, [place for place in range(query - 1) if place % 2 == 0]] = True
    expected = dense(model, whole, hidden, **kwargs).logits[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, **TOLERANCE)
    assert not torch.allclose(torch.stack(out.logits, 1), plain.transpose(0, 1), atol=1e-3)


def test_the_last_row_of_text_is_the_attention_of_the_last_token() -> None:
    """The signal of a row's text, at the point and probed where rows pass by, against the eager map."""
    tiny = text_families()["llama"]
    model, inputs = tiny.build("eager"), tiny.prompt([[23]])
    seen: list[Tensor] = []

    class Look:
        needs = (Tap("last_row", 2),)

        def __call__(self, given: vlprune.ScoreInputs) -> Tensor:
            seen.append(given.signal(self.needs[0]))
            return seen[-1]

    bypass = Bypass(2, "attn", kv="active_only", tokens="text", protect=(1, 1), budget=Budget(0.5), scorer=Look(), selector=TopK())
    mlp = replace(bypass, part="mlp", kv="full")
    with torch.no_grad(), vlprune.apply(model, PruningMethod("l", bypasses=(bypass, mlp))):
        model(**inputs)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[2]
    for values in seen:
        torch.testing.assert_close(values[0], maps[0, :, -1, 1:-1].mean(0), rtol=1e-4, atol=1e-6)
    assert len(seen) == 2
