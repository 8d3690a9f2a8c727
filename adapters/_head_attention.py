"""Attention of one decoder layer in which every head has keys (and queries) of its own: the module's forward, written out around a choice.

Queries, keys and values are the module's own, rotated, and the cache holds them all; then an `vlprune.method.Attend` may choose. Rows that no head asks
for get zeros in that head, so their residual goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlprune.adapters import _attention
from vlprune.adapters._cache import PrunedLayer
from vlprune.adapters._decoder_taps import attention_of
from vlprune.errors import OptionError, UnsupportedCallError, UnsupportedModelError, UnsupportedPointError
from vlprune.hooks import HookSet
from vlprune.method import Attend
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.pruner import Pruner


class HeadAttention:
    """The `Attend` parts of a method that choose head by head, on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner) -> None:
        self.layers, self.pruner = layers, pruner
        self.attends = [attend for attend in pruner.method.attends if attend.choose is not None]

    def attach(self, hooks: HookSet) -> None:
        """Take the place of the forwards of the layers' attention."""
        for attend in self.attends:
            if any(bypass.layer == attend.layer and bypass.part != "mlp" for bypass in self.pruner.method.bypasses):
                raise UnsupportedPointError(
                    f"{self.pruner.method.name} lets rows skip the attention of layer {attend.layer} and chooses keys head by head there; do one of the two"
                )
            attn: Any = attention_of(self.layers[attend.layer])
            missing = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not isinstance(getattr(attn, name, None), nn.Module)]
            if missing or getattr(attn, "sinks", None) is not None:
                what = ", ".join(missing) if missing else "attention without sinks"
                raise UnsupportedModelError(f"{type(attn).__name__}: choosing keys head by head needs {what}, which it does not have")
            hooks.wrap(attn, "forward", self._around(attend, attn))

    def _around(self, attend: Attend, attn: Any) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            session = self.pruner.session
            hidden = args[0] if args else kwargs["hidden_states"]
            cache, rotary = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
            prompt = session is not None or hidden.shape[1] > 1
            if len(args) > 1 or (attend.phase != "both" and prompt != (attend.phase == "prefill")):
                return original(*args, **kwargs)
            queries, keys, values = (_attention.project(attn, hidden, which) for which in "qkv")
            if rotary is not None:
                queries, keys = _attention.rotate(attn, queries, *rotary), _attention.rotate(attn, keys, *rotary)
            entry = cache.layers[attend.layer] if cache is not None and len(getattr(cache, "layers", ())) > attend.layer else None
            if cache is not None:
                keys, values = cache.update(keys, values, attend.layer)
            mask = kwargs.get("attention_mask")
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
                raise UnsupportedCallError(f"{self.pruner.method.name} chooses keys head by head; load the model with attn_implementation='sdpa' or 'eager'")
            group = None if session is None else session.mask_of(attend.tokens)
            inputs = HeadInputs(
                attend.layer, "prefill" if prompt else "decode", queries, keys, values, mask, _attention.scale_of(attn, queries.shape[-1]),
                tokens=group, real=None if session is None else session.real_tokens(),
                state=entry.state if isinstance(entry, PrunedLayer) else self.pruner.generation,
            )  # fmt: skip
            with self.pruner.timed():
                choice = attend.choose(inputs)  # type: ignore[misc]
            out = attend_heads(inputs, choice, cap=getattr(attn, "attn_logit_softcapping", None), causal=bool(getattr(attn, "is_causal", True)))
            return attn.o_proj(out.transpose(1, 2).flatten(2)), None

        return forward


def attend_heads(inputs: HeadInputs, choice: HeadChoice | None, *, cap: float | None = None, causal: bool = True) -> Tensor:
    """(B, H, Q, d) attention of each head over its own keys; zeros for queries that a head does not ask with.

    Args:
        inputs: queries, keys, values and mask of the layer.
        choice: what each head sees; ``None``: everything.
        cap: soft cap on the logits.
        causal: what no mask means.
    """
    queries, keys, values, mask = inputs.queries, inputs.keys, inputs.values, inputs.mask
    heads, length, total = queries.shape[1], queries.shape[2], keys.shape[2]
    repeat = heads // keys.shape[1]
    asked = keys_of = None if choice is None else choice.keys
    if choice is not None:
        asked = choice.queries
        for name, index, most in (("keys", keys_of, total), ("queries", asked, length)):
            if index is not None and (index.dim() != 3 or index.shape[:2] != queries.shape[:2]):
                raise OptionError(f"a choice of {name} has shape {tuple(index.shape)}; (batch, heads, number) is needed, places below {most}")
    keys, values = (part.repeat_interleave(repeat, dim=1) if repeat > 1 and keys_of is not None else part for part in (keys, values))
    q, k, v = queries, keys, values
    if keys_of is not None:
        k, v = (torch.gather(part, 2, keys_of[..., None].expand(-1, -1, -1, part.shape[3])) for part in (keys, values))
    if asked is not None:
        q = torch.gather(queries, 2, asked[..., None].expand(-1, -1, -1, queries.shape[3]))
    same = keys_of is not None and asked is keys_of and total == length
    bias: Tensor | None
    if mask is None and causal and length > 1 and not (choice is None or same):
        mask = (torch.arange(total, device=q.device)[None, :] <= torch.arange(length, device=q.device)[:, None] + (total - length))[None, None]
    bias = mask
    if mask is not None and choice is not None:
        bias = mask.expand(q.shape[0], heads if (keys_of is not None or asked is not None) else mask.shape[1], -1, -1)[..., :total]
        if asked is not None:
            bias = torch.gather(bias, 2, asked[..., None].expand(-1, -1, -1, bias.shape[3]))
        if keys_of is not None:
            bias = torch.gather(bias, 3, keys_of[:, :, None, :].expand(-1, -1, bias.shape[2], -1))
    if choice is not None and choice.seen is not None:
        bias = choice.seen if bias is None else bias & choice.seen if bias.dtype == torch.bool else bias.masked_fill(~choice.seen, torch.finfo(bias.dtype).min)
    if choice is not None and bias is not None and bias.dtype == torch.bool:
        bias = bias | ~bias.any(dim=-1, keepdim=True)                    # padding that sees nothing would be not a number
    is_causal = bias is None and causal and q.shape[2] > 1
    out = _plain(q, k, v, bias, inputs.scale, cap, is_causal)
    if asked is None:
        return out
    zeros = torch.zeros_like(queries[..., : out.shape[-1]]) if out.shape[-1] <= queries.shape[-1] else out.new_zeros(*queries.shape[:3], out.shape[-1])
    return zeros.scatter(2, asked[..., None].expand_as(out), out)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, cap: float | None, is_causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if not cap:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=is_causal)
    logits = torch.tanh((q @ k.transpose(-1, -2)) * scale / cap) * cap
    if is_causal:
        bias = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if bias is not None:
        logits = logits.masked_fill(~bias, torch.finfo(logits.dtype).min) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
