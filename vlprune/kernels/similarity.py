"""Cosine similarities between two sets of tokens, one product an item: an item's bits do not depend on what else is in the call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(B, N, M) cosines of tokens (B, N, D) with tokens (B, M, D), in float32, also under autocast; zero vectors are like nothing.

    A batched product may round differently for another number of items, and then the largest of two near-equal cosines is another one.
    """
    with torch.autocast(first.device.type, enabled=False):
        left, right = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
        return torch.stack([x @ y.mT for x, y in zip(left, right, strict=True)])
