"""SpAtten against its algorithm written out as a loop; its schedule; what heads cost; and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.tiny_text import text_families
from vlprune.errors import OptionError
from vlprune.kernels.some_heads import attend_some, pick_heads
from vlprune.method import ModelFacts
from vlprune.protocols import HeadInputs


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(H, n, d) at the places of ``cos`` (n, d)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def naive(model: Any, ids: Tensor, shares: list[float], head_shares: list[float]) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Logits of the last token, and places and heads of every layer, of a Llama; one row, one loop."""
    inner, config = model.model, model.config
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    total = ids.shape[0]
    hidden = inner.embed_tokens(ids)
    cos, sin = (part[0] for part in inner.rotary_emb(hidden[None], torch.arange(total)[None]))
    places, alive = list(range(total)), list(range(heads))
    paid, put_out = [0.0] * total, [0.0] * heads
    seen_places, seen_heads = [], []
    for layer, share, head_share in zip(inner.layers, shares, head_shares, strict=True):
        number = round(total * max(0.01, share))
        if number < len(places):
            best = sorted(places[:-1], key=lambda place: -paid[place])[: number - 1]
            stay = [place in best or place == places[-1] for place in places]
            hidden, places = hidden[stay], [place for place, here in zip(places, stay, strict=True) if here]
        count = math.floor(heads * head_share + 1e-9)
        if count < len(alive):
            alive = sorted(sorted(alive, key=lambda head: -put_out[head])[:count])
        states, attn = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            part(states).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1) for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )  # (H, n, d)
        q, k = rotated(q, cos[places], sin[places]), rotated(k, cos[places], sin[places])
        answers = torch.zeros(heads, len(places), attn.head_dim)
        for head in alive:
            logits = q[head] @ k[head // groups].T * attn.scaling
            weights = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)
            answers[head] = weights @ v[head // groups]
            put_out[head] += float(answers[head].abs().sum())
            for place, received in zip(places, weights.sum(dim=0).tolist(), strict=True):
                paid[place] += received
        hidden = hidden + attn.o_proj(answers.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        seen_places.append(places)
        seen_heads.append(alive)
    return model.lm_head(inner.norm(hidden[-1:]))[0], seen_places, seen_heads


@pytest.mark.parametrize(("keep", "heads"), [(0.25, 0.5), (0.5, None), (7, 0.6), (0.4, 1.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_loop(keep: Any, heads: Any, padded: bool) -> None:
    """A row, alone and with padding before it; tokens and heads leave from layer 1 on, so that cumulative scores matter."""
    tiny = text_families()["llama"]
    model = tiny.build()
    inputs = tiny.prompt([[29], [20]]) if padded else tiny.prompt([[29]])
    row, depth = (1, 4) if padded else (0, 4)
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    end = keep / len(ids) if isinstance(keep, int) else keep
    least = heads if heads is not None else 1 - (1 - keep) / 8
    way = [0, 1 / 3, 2 / 3, 1]
    with torch.no_grad():
        expected, places, alive = naive(model, ids, [1 + (end - 1) * w for w in way], [1 + (least - 1) * w for w in way])
        with vlprune.apply(model, "spatten", keep=keep, heads=heads, start=1) as handle:
            logits = model(**inputs, use_cache=True).logits[row, -1]
            chosen = {} if handle.pruner.generation is None else handle.pruner.generation.values
            lengths = [lengths[row] for lengths in handle.trace.decoder_lengths]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(places[-1]) < len(ids)
    assert (len(alive[-1]) < 4) == (heads != 1.0)
    if not padded:
        assert lengths == [len(kept) for kept in places]
    for layer in range(depth):
        if len(alive[layer]) < 4:
            assert chosen[f"spatten heads of layer {layer}"][row].tolist() == alive[layer]


def test_the_published_schedule() -> None:
    """32 layers: 5 whole ones, then a line down to ``keep``; heads on the same line, rounded down."""
    method = vlprune.get_method("spatten").build(ModelFacts(decoder_layers=32), 0.26)
    assert [stage.point.layer for stage in method.stages] == list(range(5, 32))
    for stage in method.stages:
        step = stage.point.layer - 5 + 1
        assert stage.budget.num_keep(1000) == round(1000 * (1 - 0.74 / 27 * step))
    assert method.stages[-1].budget.num_keep(1000) == 260
    assert method.attends[-1].choose.share == pytest.approx(0.9075)      # heads 1.1 times fewer where tokens are 3.8 times fewer
    assert [len(stage.scorer.needs) for stage in method.stages] == list(range(5, 32))
    few = vlprune.get_method("spatten").build(ModelFacts(decoder_layers=32), 40)
    assert [few.stages[-1].budget.num_keep(tokens) for tokens in (1000, 30)] == [40, 30]
    assert few.attends == ()
    assert vlprune.get_method("spatten").build(ModelFacts(decoder_layers=32), 1.0) == vlprune.PruningMethod("spatten")


def test_the_random_twin_leaves_as_much_and_looks_at_nothing() -> None:
    facts = ModelFacts(decoder_layers=8)
    ours, twin = (vlprune.get_method("spatten").build(facts, 0.5, ranking=ranking) for ranking in ("attention", "random"))
    assert [stage.budget for stage in ours.stages] == [stage.budget for stage in twin.stages]
    assert not any(stage.needs for stage in twin.stages)
    shares = {attend.layer: attend.choose.share for attend in twin.attends}
    assert shares == {attend.layer: attend.choose.share for attend in ours.attends if attend.choose.share < 1}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 3])
def test_heads_that_answer_alone_answer_as_among_all(padded: bool, past: int) -> None:
    """Grouped keys, a cache before the prompt, a mask with padding; the others are nought, for one token, too."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5 + past, 8), torch.randn(2, 3, 5 + past, 8)
    mask = None
    if padded:
        mask = torch.ones(5, 5 + past).tril(past).bool().repeat(2, 1, 1, 1)
        mask[1, :, :, :2] = False
    heads = torch.tensor([[0, 3, 4], [1, 2, 5]])
    for number in (5, 1):
        asked = queries[:, :, -number:]
        part = None if mask is None else mask[:, :, -number:]
        inputs = HeadInputs(0, "prefill", asked, keys, values, part, 0.3)
        whole = torch.zeros(2, 6, number, 8)
        for b, h in [(0, 0), (0, 3), (0, 4), (1, 1), (1, 2), (1, 5)]:
            logits = asked[b, h] @ keys[b, h // 2].T * 0.3
            free = torch.ones(number, 5 + past).tril(5 + past - number).bool() if part is None else part[b, 0]
            logits = logits.masked_fill(~free, -torch.inf)
            whole[b, h] = torch.where(free.any(-1, keepdim=True), logits.softmax(-1).nan_to_num() @ values[b, h // 2], 0.0)
        out = attend_some(inputs, heads)
        rows = torch.ones(2, number, dtype=torch.bool) if part is None else part[:, 0].any(-1)      # padding that sees nothing may say anything
        torch.testing.assert_close(out.transpose(1, 2)[rows], whole.transpose(1, 2)[rows], rtol=1e-5, atol=1e-6)
    assert torch.equal(pick_heads(keys, heads, 2)[1, 2], keys[1, 2])
    with pytest.raises(OptionError, match="from 1 to 6"):
        attend_some(inputs, torch.zeros(2, 7, dtype=torch.long))


def test_fewer_heads_are_fewer_operations() -> None:
    model = text_families()["llama"].build()
    inputs = text_families()["llama"].prompt([[40]])
    counts = []
    for heads in (1.0, 0.5):
        with torch.no_grad(), vlprune.apply(model, "spatten", keep=0.5, heads=heads, start=1) as handle:
            model(**inputs, use_cache=True)
            counts.append(handle.report().flops_pruned)
    assert counts[1] < counts[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"heads": 0}, "share of the heads"), ({"heads": True}, "share of the heads"), ({"ranking": "best"}, "'attention' or 'random'"), ({"start": 0}, "start=0"),
     ({"tokens": "visual"}, "'text', or 'all'"), ({"protect": (0, 0)}, "protect")],
)  # fmt: skip
def test_wrong_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        vlprune.get_method("spatten").build(ModelFacts(decoder_layers=4), 0.5, **options)
