"""Attention statistics from queries and keys: a few rows or column means, never a whole map kept, whatever kernel the model uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlprune.errors import UnsupportedModelError
from vlprune.kernels import received_triton

#: Upper bound on the number of float32 logits that exist at a time: few enough for a CPU's cache (4x faster than 1 << 24 there),
#: enough for a GPU to be busy.
CHUNK_LOGITS = {"cpu": 1 << 20}
CHUNK_LOGITS_ELSEWHERE = 1 << 24


class PlainMask(NamedTuple):
    """A mask of which this says everything: query i sees keys up to ``past + i`` if causal, else all, and of them those that are valid."""

    causal: bool
    past: int = 0
    key_valid: Tensor | None = None                                      # (B, S) bool; None: all are

    def seen(self, counts: Tensor, num_keys: int) -> Tensor:
        """(B, S) float32: the queries that may see each key, added up as they count, (B, L) bool or float."""
        counts = counts.long() if counts.dtype == torch.bool else counts.float()
        first = torch.arange(num_keys, device=counts.device) - self.past if self.causal else torch.zeros(num_keys, dtype=torch.long, device=counts.device)
        before = torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0))   # (B, L + 1)
        seen = before[:, -1:] - before[:, first.clamp(0, counts.shape[1])]
        return (seen if self.key_valid is None else seen * self.key_valid).float()


def plain_mask(mask: Any, past: int, length: int, num_keys: int, key_valid: Tensor | None, causal: bool, plain: bool) -> PlainMask | None:
    """What `mask_rows` makes of a layer's mask for all its queries, if that is said in few words.

    ``plain``: whoever made the mask says that one with four dimensions means "causal, and no padding"; then its last row has the padding.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        if not plain or not causal or mask.shape[1:3] != (1, length):
            return None
        last = mask[:, 0, -1, :num_keys]
        return PlainMask(causal, past, last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2)
    if mask is not None and not isinstance(mask, Tensor):
        return None
    parts = [part[:, :num_keys].bool() for part in (mask, key_valid) if isinstance(part, Tensor)]
    return PlainMask(causal, past, parts[0] & parts[-1] if parts else None)


def _by_kernel(queries: Tensor, keys: Tensor) -> bool:
    """Whether to add up columns with `received_triton`: logits that torch makes at one go are not worth compiling it for."""
    batch, heads, length, _ = queries.shape
    return batch * heads * length * keys.shape[2] > CHUNK_LOGITS_ELSEWHERE and received_triton.usable(queries, keys)


def project(attn: nn.Module, states: Tensor, which: str) -> Tensor:
    """Apply the query (``"q"``), key (``"k"``) or value (``"v"``) projection and its norm: (B, L, D) to (B, H, L, d), before rotation."""
    name = {"q": ("q_proj", "query", "to_q"), "k": ("k_proj", "key", "to_k"), "v": ("v_proj", "value", "to_v")}[which]
    linear = next((getattr(attn, n) for n in name if isinstance(getattr(attn, n, None), nn.Module)), None)
    if linear is not None:
        out = linear(states)
    else:
        fused = next((getattr(attn, n) for n in ("qkv", "qkv_proj", "c_attn") if isinstance(getattr(attn, n, None), nn.Module)), None)
        if fused is None:
            raise UnsupportedModelError(f"{type(attn).__name__}: looked for q_proj/k_proj or a fused qkv projection and found neither")
        out = fused(states)
        width = out.shape[-1]
        heads_q, heads_kv, head_dim = head_counts(attn, width)
        start, count = {"q": (0, heads_q), "k": (heads_q, heads_kv), "v": (heads_q + heads_kv, heads_kv)}[which]
        out = out[..., start * head_dim : (start + count) * head_dim]
    return by_head(attn, out, which)


def by_head(attn: nn.Module, out: Tensor, which: str) -> Tensor:
    """What a projection gave, (B, L, H d), head by head and with the norm that the module has for it: (B, H, L, d)."""
    head_dim = _head_dim(attn, out.shape[-1], which)
    heads = out.unflatten(-1, (-1, head_dim))                            # (B, L, H, d)
    norm = getattr(attn, f"{which}_norm", None)
    if isinstance(norm, nn.Module):
        heads = norm(heads)
    return heads.transpose(1, 2)


def head_counts(attn: Any, fused_width: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and head width of a module with one fused projection."""
    heads = int(getattr(attn, "num_heads", 0) or attn.config.num_attention_heads)  # type: ignore[union-attr]
    head_dim = int(getattr(attn, "head_dim", 0) or fused_width // (3 * heads))
    return heads, (fused_width // head_dim - heads) // 2, head_dim


def _head_dim(attn: nn.Module, width: int, which: str) -> int:
    head_dim = getattr(attn, "head_dim", None)
    if head_dim:
        return int(head_dim)
    config = getattr(attn, "config", None)
    heads = getattr(attn, "num_heads", None) or getattr(config, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(f"{type(attn).__name__}: looked for head_dim or num_heads and found neither")
    return width // int(heads)


def rotate(attn: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, L, d) queries or keys with the model's own rotary function."""
    module = sys.modules[type(attn).__module__]
    sections = getattr(attn, "rope_parameters", None) or getattr(getattr(attn, "config", None), "rope_parameters", None) or {}
    multimodal = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if multimodal is not None and "mrope_section" in sections:
        return multimodal(x, x, cos, sin, sections["mrope_section"])[0]  # type: ignore[no-any-return]
    return module.apply_rotary_pos_emb(x, x, cos, sin)[0]  # type: ignore[no-any-return]


def scale_of(attn: nn.Module, head_dim: int) -> float:
    """The factor on the logits."""
    scale = getattr(attn, "scaling", None) or getattr(attn, "scale", None)
    return float(scale) if isinstance(scale, (int, float)) else head_dim**-0.5


def attention_rows(attn: nn.Module, queries: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention rows of a few queries, softmax in float32.

    Args:
        attn: the module, for its scale and soft cap.
        queries: (G, H, T, d) rotated.
        keys: (G, Hkv, S, d) rotated.
        allowed: (G, 1, T, S) bool or additive mask, or ``None``.

    Returns:
        (G, H, T, S) float32; every row sums to one.
    """
    groups = queries.shape[1] // keys.shape[1]
    scale = scale_of(attn, queries.shape[-1])
    grouped = (queries.float() * scale).unflatten(1, (keys.shape[1], groups)).flatten(2, 3)      # (G, Hkv, r T, d): no copy of the keys for each head
    logits = (grouped @ keys.float().transpose(-1, -2)).unflatten(2, (groups, -1)).flatten(1, 2)  # (G, H, T, S)
    cap = getattr(attn, "attn_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else logits + allowed.float()
    return logits.softmax(dim=-1)


def column_mean(queries: Tensor, keys: Tensor, scale: float, lengths: list[int] | None = None) -> Tensor:
    """Attention received: mean over heads and over all queries of the softmaxed attention, in chunks of query rows.

    Args:
        queries: (B, H, S, d); full, bidirectional attention.
        keys: (B, H, S, d).
        scale: on the logits.
        lengths: for packed sequences (B = 1): lengths of the segments that attend to themselves only.

    Returns:
        (B, S) float32. Memory is linear in S.
    """
    if lengths is not None:
        parts = zip(queries.split(lengths, dim=2), keys.split(lengths, dim=2), strict=True)
        return torch.cat([column_mean(q, k, scale) for q, k in parts], dim=1)
    return column_sum(queries, keys, scale) / queries.shape[2]


def column_sum(queries: Tensor, keys: Tensor, scale: float, weights: Tensor | None = None) -> Tensor:
    """(B, S) float32: head-mean attention received from all queries, each counted with its ``weights`` (B, S); in chunks of query rows."""
    if _by_kernel(queries, keys):
        return received_triton.key_sums(queries, keys, scale, weights=weights)
    batch, heads, length, _ = queries.shape
    queries, keys_t = queries.float() * scale, keys.float().transpose(-1, -2)
    received = torch.zeros(batch, heads, length, device=queries.device)
    limit = CHUNK_LOGITS.get(queries.device.type, CHUNK_LOGITS_ELSEWHERE)
    rows = max(1, min(length, limit // max(1, batch * heads * length)))
    for start in range(0, length, rows):
        attention = (queries[:, :, start : start + rows] @ keys_t).softmax(dim=-1)       # (B, H, rows, S)
        received += attention.sum(dim=2) if weights is None else (attention * weights[:, None, start : start + rows, None]).sum(dim=2)
    return received.mean(dim=1)


def received_from(queries: Tensor, keys: Tensor, scale: float, lengths: list[int] | None, share: float, how: str) -> Tensor:
    """Attention received from the queries that are themselves attended to: those whose column sum exceeds ``share`` times the mean.

    ``how``: ``"mean"`` or ``"sum"`` over these queries. Where none exceeds it, the most attended one is asked alone.
    """
    if lengths is not None:
        parts = zip(queries.split(lengths, dim=2), keys.split(lengths, dim=2), strict=True)
        return torch.cat([received_from(q, k, scale, None, share, how) for q, k in parts], dim=1)
    received = column_sum(queries, keys, scale)
    asked = (received > share * received.mean(dim=1, keepdim=True)) | (received == received.amax(dim=1, keepdim=True))
    found = column_sum(queries, keys, scale, asked.float())
    return found / asked.sum(dim=1, keepdim=True) if how == "mean" else found


def received(
    attn: nn.Module, queries: Tensor, keys: Tensor, allowed: Callable[[Tensor], Tensor], real: Tensor, how: str = "sum", *, open_to: Tensor | None = None,
    plain: PlainMask | None = None,
) -> Tensor:  # fmt: skip
    """Attention that keys receive from the queries of their row, mean over heads, in chunks of queries.

    Args:
        attn: the module, for its scale and soft cap.
        queries: (B, H, L, d) rotated.
        keys: (B, Hkv, S, d) rotated.
        allowed: for places (T,) of queries, the (B, 1, T, S) mask, bool or additive.
        real: (B, L) queries that count, bool, or by how much.
        how: ``"sum"`` over the queries; ``"mean"``, divided by their number; ``"seen"``, by the number of those that may see the key.
        open_to: (B, L, S) which may, where the mask does not say it plainly.
        plain: the same mask in few words, if there are; ``allowed`` is not asked where a kernel knows it.

    Returns:
        (B, S) float32.
    """
    if plain is not None and _by_kernel(queries, keys):
        total = received_triton.key_sums(
            queries, keys, scale_of(attn, queries.shape[-1]), causal=plain.causal, past=plain.past, weights=real, key_valid=plain.key_valid,
            cap=getattr(attn, "attn_logit_softcapping", None),
        )  # fmt: skip
        return _divided(total, plain.seen(real, keys.shape[2]) if how == "seen" else None, real, how)
    batch, heads, length, _ = queries.shape
    total = torch.zeros(batch, keys.shape[2], device=queries.device)
    seen = torch.zeros_like(total)
    limit = CHUNK_LOGITS.get(queries.device.type, CHUNK_LOGITS_ELSEWHERE)
    rows = max(1, min(length, limit // max(1, batch * heads * keys.shape[2])))
    for start in range(0, length, rows):
        places = torch.arange(start, min(length, start + rows), device=queries.device)
        mask, counts = allowed(places), real[:, start : start + rows, None].float()      # (B, 1, T, S), (B, T, 1)
        attention = attention_rows(attn, queries[:, :, start : start + rows], keys, mask).mean(dim=1)
        total = total + torch.where(counts > 0, attention * counts, 0.0).sum(dim=1)      # padding that sees nothing is not a number
        if how == "seen":
            may = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
            may = may if open_to is None else open_to[:, start : start + rows]
            seen = seen + (may * counts).sum(dim=1)
    return _divided(total, seen, real, how)


def _divided(total: Tensor, seen: Tensor | None, real: Tensor, how: str) -> Tensor:
    if how == "mean":
        return total / real.float().sum(dim=1, keepdim=True).clamp(min=1)
    return total / seen.clamp(min=1e-6) if how == "seen" and seen is not None else total


def mask_rows(mask: Any, slots: Tensor, rows: Tensor, past: int, num_keys: int, key_valid: Tensor | None, causal: bool = True) -> Tensor:
    """Part of a layer's mask for a few queries.

    Args:
        mask: what the layer got: (B, 1, Q, S) bool or additive, (B, S), or ``None`` (causal).
        slots: (G, T) the queries' places among the layer's current tokens.
        rows: (G,) batch rows.
        past: entries that were in the cache before.
        num_keys: past and current entries.
        key_valid: (B, S) false on filler entries, or ``None``.
        causal: what the module takes no mask to mean.

    Returns:
        (G, 1, T, S) bool or additive.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        own = mask[rows] if mask.shape[0] > 1 else mask.expand(rows.shape[0], -1, -1, -1)
        picked = torch.gather(own, 2, slots[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3]))
        return picked[..., :num_keys]
    limit = (slots + past)[:, :, None] if causal else num_keys
    allowed = (torch.arange(num_keys, device=slots.device)[None, None, :] <= limit).expand(slots.shape[0], slots.shape[1], -1)
    for padding in (mask, key_valid):
        if isinstance(padding, Tensor):
            allowed = allowed & padding[rows][:, None, :num_keys].bool()
    return allowed[:, None]
