"""How much attention the last few tokens of a prompt pay to each earlier one, head by head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.protocols import HeadInputs

#: Logits that exist at a time.
LIMIT = {"cpu": 1 << 20}
LIMIT_ELSEWHERE = 1 << 26


def last_places(real: Tensor, counts: tuple[int, ...], number: int) -> tuple[Tensor, Tensor]:
    """(B, W) places of each row's last real entries, left to right, and which of them exist; ``number`` is the most, ``counts`` are those of ``real``."""
    width = min(number, max(counts))
    if min(counts) == real.shape[1]:
        places = torch.arange(real.shape[1] - width, real.shape[1], device=real.device).expand(real.shape[0], -1)
        return places, torch.ones_like(places, dtype=torch.bool)
    order = torch.argsort(real.to(torch.uint8), dim=1, descending=True, stable=True)      # real ones first, in order
    ends = torch.tensor(counts).to(real.device, non_blocking=True)[:, None]
    rank = ends - width + torch.arange(width, device=real.device)
    return torch.gather(order, 1, rank.clamp(min=0)), rank >= 0


def window_attention(inputs: HeadInputs, places: Tensor, weights: Tensor) -> Tensor:
    """(B, H, S) float32: mean of the attention rows of the queries at ``places`` (B, W), each counted with its ``weights`` (B, W); a few heads at a time."""
    queries, keys = inputs.queries, inputs.keys
    batch, heads, length, width = queries.shape
    total, groups, past = keys.shape[2], heads // keys.shape[1], keys.shape[2] - length
    picked = torch.gather(queries, 2, places[:, None, :, None].expand(-1, heads, -1, width))                  # (B, H, W, d)
    bias: Tensor | None = None
    if inputs.mask is None or inputs.plain:
        seen = torch.arange(total, device=keys.device) <= (places + past)[..., None]                           # (B, W, S)
        if inputs.real is not None and inputs.mask is not None:
            seen = seen & functional.pad(inputs.real, (past, 0), value=True)[:, None]
        bias = seen[:, None]
    else:
        mask = inputs.mask[..., :total].expand(batch, -1, -1, -1)
        bias = torch.gather(mask, 2, places[:, None, :, None].expand(-1, mask.shape[1], -1, total))
    out = []
    step = max(1, LIMIT.get(keys.device.type, LIMIT_ELSEWHERE) // max(1, batch * groups * places.shape[1] * total))
    share = (weights / weights.sum(dim=1, keepdim=True).clamp(min=1))[:, None, None]                           # (B, 1, 1, W)
    for first in range(0, keys.shape[1], step):
        key = keys[:, first : first + step]
        number = key.shape[1]
        query = picked[:, first * groups : (first + number) * groups].reshape(batch, number, -1, width)        # (B, n, r W, d)
        logits = ((query * inputs.scale) @ key.transpose(-1, -2)).float().view(batch, number * groups, -1, total)
        if inputs.cap:
            logits = torch.tanh(logits / inputs.cap) * inputs.cap
        mine = bias if bias.shape[1] == 1 else bias[:, first * groups : (first + number) * groups]
        low = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mine, low) if mine.dtype == torch.bool else (logits + mine.float()).clamp(min=low)
        out.append((share @ logits.softmax(dim=-1))[:, :, 0])
    return torch.cat(out, dim=1)
