"""The one place that cuts the arguments of a decoder layer to the rows that are still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import UnsupportedCallError

#: Arguments of decoder layers that never follow the sequence.
NOT_ALIGNED = frozenset({"past_key_values", "past_key_value", "use_cache", "output_attentions", "cache_position", "layer_idx"})
#: Aligned arguments and the dimension of their sequence axis.
ALIGNED = {"position_ids": -1, "position_embeddings": -2, "attention_mask": None}


def take_rows(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Gather ``index`` (B, K) along ``axis`` (-1 or -2) of ``x``, whose batch axis stands right before it and may be 1."""
    index = index.to(x.device)
    batch_axis = x.dim() + axis - 1
    if batch_axis < 0:                                                   # no batch axis: (L, d)
        x, batch_axis = x[None], 0
    x = x.expand(*x.shape[:batch_axis], index.shape[0], *x.shape[batch_axis + 1 :])
    shape = [1] * x.dim()
    shape[batch_axis], shape[axis] = index.shape
    sizes = list(x.shape)
    sizes[axis] = index.shape[1]
    return torch.gather(x, axis, index.reshape(shape).expand(sizes))


def cut_mask(
    mask: Any,
    *,
    rows: Tensor | None,
    columns: Tensor | None,
    columns_valid: Tensor | None,
    query_positions: Tensor | None,
    backend: str,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Any:
    """Cut an attention mask to the queries ``rows`` and the keys ``columns``.

    Args:
        mask: what the model made: ``None`` (causal or everything), (B, 1, Q, K) bool or additive, or (B, K) for flash attention.
        rows: (B, Q') current queries among the Q of the mask; ``None``: all of them.
        columns: (B, K') current keys among the K of the mask; ``None``: all of them.
        columns_valid: (B, K') false for keys nobody may see (repeated entries of short rows); ``None``: all may be seen.
        query_positions: (B, Q') places of the queries on the axis of ``columns``, needed to build a causal mask.
        backend: the attention implementation.
        causal: what the module takes no mask to mean; bidirectional otherwise.
        bias: (B, K') added to the logits of each key, or ``None``.
    """
    if columns is None:
        return mask
    if bias is not None:
        if "flash" in backend:
            raise UnsupportedCallError("size_bias adds to attention logits, which flash attention does not take; use attn_implementation='sdpa'")
        if mask is None and columns_valid is None:
            columns_valid = torch.ones_like(columns, dtype=torch.bool)
        cut = cut_mask(
            mask, rows=rows, columns=columns, columns_valid=columns_valid, query_positions=query_positions, backend=backend, causal=causal
        )
        if cut.dtype == torch.bool:
            cut = torch.zeros(cut.shape, dtype=bias.dtype, device=cut.device).masked_fill(~cut, torch.finfo(bias.dtype).min)
        return (cut + bias.to(cut.device)[:, None, None, :]).clamp(min=torch.finfo(cut.dtype).min).to(cut.dtype)
    if mask is None:
        if columns_valid is None:
            return None                                                  # order is kept, so causal stays causal
        if "flash" in backend:
            return columns_valid
        if query_positions is None or not causal:
            return columns_valid[:, None, None, :]
        earlier = columns[:, None, :] <= query_positions[:, :, None]     # (B, Q', K')
        return (earlier & columns_valid[:, None, :])[:, None]
    if not isinstance(mask, Tensor):
        raise UnsupportedCallError(
            f"attention masks of type {type(mask).__name__} cannot be cut. Load the model with attn_implementation='sdpa', 'eager' or "
            "'flash_attention_2'."
        )
    rows, columns, columns_valid = (None if part is None else part.to(mask.device) for part in (rows, columns, columns_valid))
    assert columns is not None
    batch = columns.shape[0]
    if mask.dim() == 2:                                                  # flash attention: padding only
        cut = torch.gather(mask.expand(batch, -1), 1, columns)
        return cut if columns_valid is None else cut * columns_valid.to(cut.dtype)
    mask = mask.expand(batch, *mask.shape[1:])
    heads = mask.shape[1]
    if rows is not None:
        mask = torch.gather(mask, 2, rows[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    mask = torch.gather(mask, 3, columns[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    if columns_valid is None:
        return mask
    allowed = columns_valid[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def check_checkpointing(layer: nn.Module) -> None:
    """Older transformers replay hooks when a checkpointed layer is recomputed, long after the call they belong to: refused."""
    replays = "__call__" in vars(next((kind for kind in type(layer).__mro__ if kind.__name__ == "GradientCheckpointingLayer"), object))
    if replays and layer.training and getattr(layer, "gradient_checkpointing", False):
        raise UnsupportedCallError(
            "this version of transformers recomputes hooks together with checkpointed layers, which pruning cannot follow. "
            "Update transformers (5.23 works), or train without gradient checkpointing."
        )


def check_aligned(kwargs: Mapping[str, Any], length: int, layer_name: str) -> None:
    """An argument that follows the sequence but is not known here is an error, never ignored."""
    for name, value in kwargs.items():
        if name in ALIGNED or name in NOT_ALIGNED or not isinstance(value, Tensor):
            continue
        if value.dim() >= 2 and length in value.shape[-2:]:
            raise UnsupportedCallError(
                f"{layer_name} was called with {name!r} of shape {tuple(value.shape)}, which follows the sequence of {length} tokens and is not known to "
                "vlprune. Leave the argument out, or add it to ALIGNED in adapters/_sequence.py."
            )
