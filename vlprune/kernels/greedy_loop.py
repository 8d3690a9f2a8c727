"""Device code of `vlprune.kernels.greedy_triton`: the K steps of greedy selection for one item, one program. Imported only where Triton is."""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

MAXSUM = tl.constexpr(0)
MAXMIN = tl.constexpr(1)
WEIGHTED = tl.constexpr(2)
DETERMINANTAL = tl.constexpr(3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def greedy_kernel(  # type: ignore[no-untyped-def]
    gram,  # (B, N, N) cosines
    own,  # (B, N) cosine with itself
    weights,  # (B, N)
    groups,  # (B, N) int32, if GROUPED
    quotas,  # (B, N) int32, if GROUPED
    first,  # (B,) int64
    factor,  # (B, K, N) scratch, if DETERMINANTAL
    picks,  # (B, K) int64, the answer
    count,  # N
    num_keep,  # K
    spent,  # as in `vlprune.kernels.greedy_rules`
    RULE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two from N
):
    """State lives in registers; what one thread writes and another reads, rows of the factor, has a barrier between."""
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < count
    gram += item * count * count
    factor += item * num_keep * count
    picks += item * num_keep
    weight = tl.load(weights + item * count + at, mask=there, other=0.0)
    diagonal = weight * weight * tl.load(own + item * count + at, mask=there, other=0.0)
    order = -1.0 / tl.maximum(diagonal, 1e-30)
    blocked = at >= count
    group = tl.zeros([BLOCK], dtype=tl.int32)
    quota = tl.full([BLOCK], 1, dtype=tl.int32)
    if GROUPED:
        group = tl.load(groups + item * count + at, mask=there, other=0)
        quota = tl.load(quotas + item * count + at, mask=there, other=0)
        blocked = blocked | (quota <= 0)
    left = tl.zeros([BLOCK], dtype=tl.float32)  # minus the sum, or the nearest distance, or what is left of the diagonal
    if RULE == DETERMINANTAL:
        left = diagonal
    elif RULE != MAXSUM:
        left += float("inf")
    chosen = tl.load(first + item).to(tl.int32)
    tl.store(picks, chosen.to(tl.int64))
    for step in range(num_keep - 1):
        blocked = blocked | (at == chosen)
        cosine = tl.load(gram + chosen.to(tl.int64) * count + at, mask=there, other=0.0)
        same = there
        if GROUPED:
            same = group == tl.load(groups + item * count + chosen)
            quota = tl.where(same, quota - 1, quota)
            blocked = blocked | (quota <= 0)
        if RULE == MAXSUM:
            left = left - tl.where(same, cosine, 0.0)
            gain = left
        elif RULE == DETERMINANTAL:
            weight_chosen = tl.load(weights + item * count + chosen)
            row = weight * weight_chosen * tl.where(same, cosine, 0.0)
            known = tl.zeros([BLOCK], dtype=tl.float32)
            for before in range(step):
                there_before = factor + before * count
                known += tl.load(there_before + chosen) * tl.load(there_before + at, mask=there, other=0.0)
            row = row - known
            size = tl.sum(tl.where(at == chosen, left, 0.0))
            full = weight_chosen * weight_chosen * tl.load(own + item * count + chosen)
            row = tl.where(size > spent * full, row / tl.sqrt(tl.maximum(size, 1.1754944e-38)), 0.0)
            tl.store(factor + step * count + at, row, mask=there)
            tl.debug_barrier()
            left = left - row * row
            gain = tl.where(left > spent * diagonal, left, order)
        else:
            left = tl.where(same, tl.minimum(left, 1.0 - cosine), left)
            gain = left
            if RULE == WEIGHTED:
                gain = weight * tl.where(left == float("inf"), 1.0, left)
        chosen = tl.argmax(tl.where(blocked, float("-inf"), gain), axis=0, tie_break_left=True)
        tl.store(picks + step + 1, chosen.to(tl.int64))
