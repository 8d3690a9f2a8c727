"""Attention that each key receives, on CUDA: no logit leaves the chip, and memory is linear in the length.

Two passes over tiles of logits: the log-sum-exp of each query's row, then, key by key, the sum of ``exp(logit - lse)`` over the queries that see it. Every
sum has one order, so the same input gives the same bits. Triton comes with PyTorch for CUDA and is imported on first use; without it the torch path stays.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

#: Products of half-precision numbers are exact in float32; float32 itself is multiplied as it is, not as TF32.
TYPES = (torch.float16, torch.bfloat16, torch.float32)
#: By bytes a number: the widest head, beyond which registers do not hold a tile.
WIDEST = {2: 256, 4: 128}
#: Tiles: rows held, rows a step, loads in flight, warps. The largest first that leave an SM room for two programs, one of which multiplies while the other
#: takes exponentials.
TILES = {2: ((128, 64, 3, 4), (128, 64, 2, 4), (64, 64, 2, 4), (64, 32, 2, 4)), 4: ((64, 32, 2, 8), (32, 32, 2, 4), (16, 16, 2, 4))}
#: Shared memory that is left to the compiler, in bytes.
SPARE = 4096


@functools.cache
def kernels() -> Any:
    """The module of both passes, or ``None`` where Triton is not installed."""
    try:
        return importlib.import_module("vlprune.kernels.received_loop")
    except ImportError:
        return None


def usable(queries: Tensor, keys: Tensor) -> bool:
    """Whether the kernels take these: on an NVIDIA GPU from 8.0 on, of one known type, no gradient asked for."""
    if queries.device.type != "cuda" or torch.version.hip is not None or queries.dtype != keys.dtype or queries.dtype not in TYPES:
        return False
    if queries.shape[-1] > WIDEST[queries.element_size()] or 0 in queries.shape or 0 in keys.shape:
        return False
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return False
    return torch.cuda.get_device_capability(queries.device) >= (8, 0) and kernels() is not None


def tile(width: int, itemsize: int, shared: int) -> tuple[int, int, int, int]:
    """The first of `TILES` that fits ``shared`` bytes of a block's memory, for rows of ``width`` numbers."""
    fits = (size for size in TILES[itemsize] if (size[0] + size[1] * size[2]) * width * itemsize + SPARE <= shared)
    return next(fits, TILES[itemsize][-1])


def key_sums(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    *,
    causal: bool = False,
    past: int = 0,
    weights: Tensor | None = None,
    key_valid: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attention that keys receive from all queries of their row, mean over heads.

    Args:
        queries: (B, H, L, d), of one of `TYPES`; d up to its `WIDEST`.
        keys: (B, Hkv, S, d) of the same type, Hkv a divisor of H.
        scale: on the logits.
        causal: query i sees keys up to ``past + i``; all of them otherwise.
        past: keys before the first query's own.
        weights: (B, L) how much each query counts, from 0; one each if not given.
        key_valid: (B, S) bool, false for keys that nobody sees; a query that sees none pays nothing.
        cap: soft cap, ``cap * tanh(logit / cap)``.

    Returns:
        (B, S) float32.
    """
    batch, heads, length, width = queries.shape
    total, device = keys.shape[2], queries.device
    queries, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys))
    lse = torch.empty(batch, heads, length, device=device)
    sums = torch.empty(batch, heads, total, device=device)
    valid = lse if key_valid is None else key_valid.expand(batch, total).to(torch.int8).contiguous()
    counts = lse if weights is None else weights.expand(batch, length).float().contiguous()
    wide = max(16, 1 << (width - 1).bit_length())
    chip: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    shared = int(getattr(chip, "shared_memory_per_block_optin", 49152))
    held, step, stages, warps = tile(wide, queries.element_size(), shared)
    inner, outer = (scale / cap, cap / math.log(2)) if cap else (scale / math.log(2), 0.0)
    sizes = (*queries.stride()[:3], *keys.stride()[:3], heads, heads // keys.shape[1], length, total, past, inner, outer, width)
    how = {"CAUSAL": causal, "VALID": key_valid is not None, "CAPPED": bool(cap), "HELD": held, "STEP": step, "WIDTH": wide}
    launch, programs = {"num_warps": warps, "num_stages": stages}, batch * heads
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernels().row_kernel[(-(-length // held) * programs,)](queries, keys, valid, lse, *sizes, **how, **launch)
        column = kernels().column_kernel[(-(-total // held) * programs,)]
        column(queries, keys, valid, lse, counts, sums, *sizes, **how, WEIGHTED=weights is not None, **launch)
    return sums.mean(dim=1)
