"""Flash attention needs a GPU, but what it is handed does not: a stand-in with its calling rules runs the laws on a CPU.

The rules (transformers' flash integration): masks are two-dimensional paddings or ``None``; sequences are unpadded by them and
causal from the lower right; position ids with gaps in a batch of one mean several packed sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import vlprune
from tests.oracle import hidden_columns, masked_run
from tests.tiny import families
from vlprune.errors import UnsupportedModelError

NAME = "stand_in_for_flash"


def stand_in(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """(B, H, Q, d) queries; returns (B, Q, H, d) as every backend does."""
    batch, heads, length, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    causal = kwargs.get("is_causal")
    causal = module.is_causal if causal is None else causal
    if causal:
        assert not bool(_is_packed_sequence(kwargs.get("position_ids"), batch)), "read as packed sequences"
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        assert attention_mask.shape[1] == key.shape[2]
    out = torch.zeros_like(query)
    for row in range(batch):
        real = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        asks = torch.ones(1, dtype=torch.bool) if length == 1 else real[-length:]
        q, k, v = query[row][:, asks], key[row][:, real], value[row][:, real]
        logits = q @ k.mT * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
        if causal:
            logits = logits.masked_fill(torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]) == 0, -torch.inf)
        out[row][:, asks] = logits.softmax(-1) @ v
    return out.transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def registered() -> Any:
    AttentionInterface.register(NAME, stand_in)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)


def with_flash(name: str) -> Any:
    """A tiny model whose decoder uses the stand-in."""
    model = families()[name].build("sdpa")
    model.config.get_text_config()._attn_implementation_internal = NAME
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and config is model.config.get_text_config():
            config._attn_implementation_internal = NAME
    return model


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["random", "hiprune", "fastv", "transprune"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_drop_equals_mask(family: str, method: str, rows: int) -> None:
    tiny, model = families()[family], with_flash(family)
    decoder = vlprune.adapter.find_adapter(model).decoder  # type: ignore[attr-defined]
    assert decoder.config._attn_implementation == NAME
    last = tiny.shapes["image"] - 1
    prompt = tiny.prompt([[3, "image", 4], [2, ("image", last), 3, "image", 5], [6]][:rows])
    length = prompt["input_ids"].shape[1]
    with vlprune.apply(model, method, keep=0.4) as handle, torch.no_grad():
        options = {"suppress_tokens": [97, 98], "max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(**prompt, **options)
        hidden = hidden_columns(handle.trace, 4)
    kwargs = {}
    if family != "qwen2_5_vl":
        mask = torch.cat([prompt["attention_mask"], torch.ones(rows, 3, dtype=torch.long)], dim=1)
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    reference = masked_run(tiny.build("sdpa"), prompt, hidden, out.sequences[:, length:-1], **kwargs).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), reference[:, length - 1 :], rtol=1e-4, atol=2e-4)


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        vlprune.apply(with_flash("gemma3"), "random")
