"""Signals against what an explicit computation on the untouched model gives: attention maps of the eager backend, module inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.oracle import decoder_of
from tests.tiny import IMAGE, families
from vlprune.adapters._decoder_taps import attention_of
from vlprune.budget import Budget
from vlprune.method import PruningMethod, Stage
from vlprune.points import BeforeLLM, LLMLayer
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LAYER, BLOCK = 2, 1


@dataclass(frozen=True)
class Note:
    """A scorer that keeps what it was shown."""

    taps: tuple[Tap, ...]
    seen: list[ScoreInputs] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> tuple[Tap, ...]:
        return self.taps

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        self.seen.append(inputs)
        return torch.arange(inputs.tokens.shape[1], 0, -1).float().expand(inputs.tokens.shape[0], -1)


def look(model: Any, inputs: dict[str, Tensor], point: Any, *taps: Tap, before: bool = False) -> list[ScoreInputs]:
    """What a stage at ``point`` sees; ``before``: half of the tokens left before the decoder."""
    note = Note(taps)
    first = (Stage(BeforeLLM(), Note(()), TopK(), Drop(), Budget(0.5)),) if before else ()
    method = PruningMethod("note", (*first, Stage(point, note, TopK(), Drop(), Budget(0.25))))
    with vlprune.apply(model, method), torch.no_grad():
        model(**inputs)
    return note.seen


class Record:
    """Inputs and outputs of modules during a call of the untouched model."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], **modules: Any) -> None:
        self.given: dict[str, Any] = {}
        self.made: dict[str, Any] = {}
        handles = [module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in modules.items()]
        with torch.no_grad():
            self.out = model(**inputs, output_attentions=True)
        for handle in handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.given[name] = args[0] if args else kwargs["hidden_states"]
            self.made[name] = output[0] if isinstance(output, tuple) else output

        return hook


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Tensor]]:
    tiny = families()["llava"]
    return tiny.build("eager"), tiny.prompt([[3, "image", 6], [2, "image", 3]])


def test_vision_signals_of_llava(llava: Any) -> None:
    model, inputs = llava
    block = model.model.vision_tower.encoder.layers[BLOCK] if hasattr(model.model.vision_tower, "encoder") else None
    block = block or model.model.vision_tower.vision_model.encoder.layers[BLOCK]
    record = Record(model, inputs, q=block.self_attn.q_proj, k=block.self_attn.k_proj, block=block)
    queries, keys = heads(record.made["q"], 4), heads(record.made["k"], 4)
    attention = (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)              # (B, H, S, S)
    kinds = ["column_mean", "cls_row", "cls_row_wide", "vision_keys", "vision_keys_all", "vision_states", "cls_state", "pixels"]
    taps = {kind: Tap(kind, BLOCK) for kind in kinds}
    taps["received"] = Tap("received_from", BLOCK, (1.5, "mean"))
    taps["received_sum"] = Tap("received_from", BLOCK, (1.5, "sum"))
    taps["received_none"] = Tap("received_from", BLOCK, (1e6, "mean"))
    seen = look(model, inputs, BeforeLLM(), *taps.values())
    assert len(seen) == 1
    got = {name: seen[0].signal(tap) for name, tap in taps.items()}
    wide = (record.made["q"][:, :1] @ record.made["k"].mT * record.made["q"].shape[-1] ** -0.5).softmax(-1)[:, 0]
    mean_map = attention.mean(dim=1)
    column = mean_map.sum(dim=1)
    asked = column > 1.5 * column.mean(dim=1, keepdim=True)
    assert bool(asked.any(dim=1).all())
    assert not bool(asked.all())
    side = inputs["pixel_values"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    top = column.argmax(dim=1)
    want = {
        "column_mean": mean_map.mean(dim=1)[:, 1:], "cls_row": mean_map[:, 0, 1:], "cls_row_wide": wide[:, 1:],
        "vision_keys": keys.mean(dim=1)[:, 1:], "vision_keys_all": record.made["k"][:, 1:], "vision_states": record.made["block"][:, 1:],
        "cls_state": record.made["block"][:, :1].expand(-1, 36, -1), "pixels": side,
        "received": torch.stack([mean_map[b][asked[b]].mean(0) for b in range(2)])[:, 1:],
        "received_sum": torch.stack([mean_map[b][asked[b]].sum(0) for b in range(2)])[:, 1:],
        "received_none": torch.stack([mean_map[b, top[b]] for b in range(2)])[:, 1:],
    }  # fmt: skip
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


def test_the_projector_turns_features_into_tokens(llava: Any) -> None:
    model, inputs = llava
    tap = Tap("vision_states", 2)                                        # feature layer -2 of four blocks
    seen = look(model, inputs, BeforeLLM(), tap)[0]
    assert seen.project is not None
    torch.testing.assert_close(seen.project(seen.signal(tap)), seen.tokens, **CLOSE)
    assert look(model, inputs, LLMLayer(1), tap)[0].project is None


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_decoder_signals(name: str, before: bool) -> None:
    """Also behind an earlier drop; there the reference is a run on the shortened prompt's own columns, taken from a tap-free run."""
    tiny = families()[name]
    model = tiny.build("eager")
    inputs = tiny.prompt([[3, "image", 6], [4, "image", 2]])
    decoder: Any = decoder_of(model)
    attn = attention_of(decoder.layers[LAYER])
    taps = {kind: Tap(kind, LAYER) for kind in ("last_row", "text_rows", "text_max", "rater_rows", "key_l1", "text_key_l1")}
    taps |= {kind: Tap(kind, 0) for kind in ("normed", "text_states", "text_normed")}
    seen = look(model, inputs, LLMLayer(LAYER + 1), *taps.values(), before=before)
    assert sum(part.tokens.shape[0] for part in seen) == 2
    rows = [(part, row) for part in seen for row in range(part.tokens.shape[0])]
    got = [{kind: part.signal(tap)[row] for kind, tap in taps.items()} | {"valid": part.text_valid[row]} for part, row in rows]
    embeddings = Record(model, inputs, first=decoder.layers[0]).given["first"]
    if before:                                                           # the reference: the first half of each item's tokens alone
        with torch.no_grad(), vlprune.apply(model, PruningMethod("half", (Stage(BeforeLLM(), Note(()), TopK(), Drop(), Budget(0.5)),))):
            maps: list[Any] = []
            handle = attn.register_forward_hook(lambda m, a, o: maps.append(o[1]))
            states: list[Any] = []
            entered = decoder.layers[LAYER + 1].register_forward_pre_hook(lambda m, a, k: states.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
            cache = model(**inputs).past_key_values
            handle.remove(), entered.remove()
        attention, hidden, keys = maps[0], states[0], cache.layers[LAYER].keys
    else:
        record = Record(model, inputs, layer=decoder.layers[LAYER])
        attention, hidden, keys = record.out.attentions[LAYER], record.made["layer"], record.out.past_key_values.layers[LAYER].keys
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for row in range(2):
        visual = torch.nonzero(ids[row] == IMAGE).flatten()
        after = torch.nonzero(mask[row] & (torch.arange(ids.shape[1]) > visual[-1])).flatten()
        raters = _raters(embeddings[row, visual], embeddings[row, after])
        assert 0 < len(raters) < len(after)
        if before:
            kept = visual[: round(0.5 * len(visual))]
            stays = torch.ones(ids.shape[1], dtype=torch.bool)
            stays[visual[len(kept):]] = False
            stays[~mask[row]] = False
            order = torch.nonzero(stays).flatten()
            offset = hidden.shape[1] - len(order)                        # padding that was left in the row stands in front
            place = {int(old): offset + new for new, old in enumerate(order)}
            columns, lines = torch.tensor([place[int(p)] for p in kept]), torch.tensor([place[int(p)] for p in after])
        else:
            columns, lines = visual, after
        part = attention[row][:, lines][:, :, columns]                   # (H, T, n)
        norms = keys[row].abs().sum(dim=(0, 2))
        found, valid = got[row], got[row]["valid"]
        assert int(valid.sum()) == len(after)
        want = {
            "last_row": part[:, -1].mean(0), "text_rows": part.mean(dim=(0, 1)), "text_max": part.amax(dim=(0, 1)),
            "rater_rows": part[:, raters].mean(dim=(0, 1)), "key_l1": norms[columns], "normed": decoder.norm(hidden[row, columns]),
        }  # fmt: skip
        for kind, value in want.items():
            torch.testing.assert_close(found[kind], value, **CLOSE)
        for kind, value in {"text_key_l1": norms[lines], "text_states": hidden[row, lines], "text_normed": decoder.norm(hidden[row, lines])}.items():
            torch.testing.assert_close(found[kind][valid], value, **CLOSE)


def test_sparsevlm_plus_by_hand(llava: Any) -> None:
    """Attention over what positions alone would give, in loops; the heads with most of it."""
    model, inputs = llava
    row = {name: value[:1] for name, value in inputs.items()}
    tap = Tap("rater_rows_plus", LAYER, (2,))
    got = look(model, row, LLMLayer(LAYER + 1), tap)[0].signal(tap)[0]
    decoder: Any = decoder_of(model)
    record = Record(model, row, first=decoder.layers[0])
    visual = torch.nonzero(row["input_ids"][0] == IMAGE).flatten()
    after = torch.arange(int(visual[-1]) + 1, row["input_ids"].shape[1])
    raters = after[_raters(record.given["first"][0, visual], record.given["first"][0, after])]
    width = decoder.layers[0].self_attn.head_dim
    angles = [1 / 10000 ** (2 * k / width) for k in range(width // 2)]

    def response(query: int, key: int) -> float:                         # ones rotated by an angle each: (cos - sin, cos + sin) in every plane
        return sum(2 * float(torch.cos(torch.tensor((query - key) * angle))) for angle in angles) / width**0.5

    table = torch.tensor([[response(int(q), int(k)) for k in visual] for q in raters])
    divided = record.out.attentions[LAYER][0][:, raters][:, :, visual] / table           # (H, R, n)
    best = divided.sum(dim=(1, 2)).topk(2).indices
    torch.testing.assert_close(got, divided[best].mean(dim=(0, 1)), rtol=1e-3, atol=1e-4)


def _raters(visual: Tensor, text: Tensor) -> list[int]:
    """Indices of the text tokens that get more than the average share, in plain loops."""
    totals = [0.0] * len(text)
    for token in visual:
        weights = (text @ token).softmax(0)
        totals = [total + float(weight) / len(visual) for total, weight in zip(totals, weights, strict=True)]
    average = sum(totals) / len(totals)
    return [number for number, total in enumerate(totals) if total > average]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_signals_of_packed_towers_follow_the_features(name: str) -> None:
    """States of the last block, merged, are the features; pixels stay with their places although Qwen2.5-VL permutes its patches."""
    tiny = families()[name]
    model: Any = tiny.build()
    inputs = tiny.prompt([[3, ("image", 1), 2, ("image", 0), 4]])
    taps = Tap("vision_states", 3), Tap("pixels", 0), Tap("vision_keys_all", 3)
    seen = look(model, inputs, BeforeLLM(), *taps)
    lengths = [6 * 10 // 4, 8 * 8 // 4]
    assert [part.tokens.shape[1] for part in seen] == lengths
    pixels = inputs["pixel_values"].unflatten(0, (-1, 4)).mean(1).split(lengths)
    blocks: list[Tensor] = []
    handle = model.model.visual.blocks[3].register_forward_hook(lambda m, a, o: blocks.append(o))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    states = blocks[0].unflatten(0, (-1, 4)).mean(1)
    if name == "qwen2_5_vl":
        order: list[Tensor] = []
        tower = model.model.visual
        permute = tower.permute_input_for_window_attn
        tower.permute_input_for_window_attn = lambda x, index, *rest, **named: (order.append(index), permute(x, index, *rest, **named))[1]
        with torch.no_grad():
            model(**inputs)
        del tower.permute_input_for_window_attn
        states = states[order[0].argsort()]
    for part, want_pixels, want_states in zip(seen, pixels, states.split(lengths), strict=True):
        torch.testing.assert_close(part.signal(taps[1])[0], want_pixels, **CLOSE)
        torch.testing.assert_close(part.signal(taps[0])[0], want_states, **CLOSE)
