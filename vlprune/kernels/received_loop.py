"""Device code of `vlprune.kernels.received_triton`: what each key receives, in two passes over tiles of logits. Imported only where Triton is."""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

#: Lengths differ from layer to layer where tokens leave: none of them is a reason to compile again.
LENGTHS = ["length", "total", "past"]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _logits(a, b, inner, outer, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Base-2 logits (A, B) of rows ``a`` (A, d) and ``b`` (B, d)."""
    logits = tl.dot(a, tl.trans(b), input_precision="ieee") * inner
    if CAPPED:
        logits = outer * (1.0 - 2.0 / (tl.exp(2.0 * logits) + 1.0))  # tanh, also where exp is infinite
    return logits


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator, unused-ignore]
def row_kernel(  # type: ignore[no-untyped-def]
    queries,  # (B, H, L, d)
    keys,  # (B, Hkv, S, d)
    valid,  # (B, S) int8, if VALID
    lse,  # (B, H, L) float32, the answer: log2 of the sum of 2**logit over the keys that a query sees; infinite where it sees none
    query_batch,  # strides; that of d is one
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    heads,  # H
    groups,  # H / Hkv
    length,  # L
    total,  # S
    past,  # query i sees keys up to past + i, if CAUSAL
    inner,  # on the products
    outer,  # cap in base 2, if CAPPED
    width,  # d
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    CAPPED: tl.constexpr,
    HELD: tl.constexpr,  # queries a program
    STEP: tl.constexpr,  # keys a step
    WIDTH: tl.constexpr,  # power of two from d
):
    """One program: a block of queries of one head, over all keys. The last blocks, which see most, start first."""
    blocks = tl.cdiv(length, HELD)
    at = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * HELD
    batch, head = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    queries += batch * query_batch + head * query_head + first.to(tl.int64) * query_row
    keys += batch * key_batch + (head // groups) * key_head
    valid += batch * total
    lse += at.to(tl.int64) * length
    held, step, dim = tl.arange(0, HELD), tl.arange(0, STEP), tl.arange(0, WIDTH)
    rows = first + held
    query = tl.load(queries + held[:, None] * query_row + dim[None, :], mask=(rows < length)[:, None] & (dim < width)[None, :], other=0.0)
    end, full = total, total  # below `full`, in whole steps, every query of the block sees every key
    if CAUSAL:
        end = tl.minimum(total, past + first + HELD)
        full = tl.minimum(total, past + first + 1)
    full = full // STEP * STEP
    most = tl.full([HELD], float("-inf"), tl.float32)
    mass = tl.zeros([HELD], tl.float32)
    for part in tl.static_range(2):
        if part == 0:
            low, high = full * 0, full
        else:
            low, high = full, end
        for start in range(low, high, STEP):
            place = start + step
            there = place < total
            offsets = step[:, None] * key_row + dim[None, :]
            key = tl.load(keys + tl.cast(start, tl.int64) * key_row + offsets, mask=there[:, None] & (dim < width)[None, :], other=0.0)
            logits = _logits(query, key, inner, outer, CAPPED)
            if part == 1:
                sees = there[None, :]
                if CAUSAL:
                    sees = sees & (place[None, :] <= past + rows[:, None])
                logits = tl.where(sees, logits, float("-inf"))
            if VALID:
                open_key = tl.load(valid + place, mask=there, other=0) != 0
                logits = tl.where(open_key[None, :], logits, float("-inf"))
            now = tl.maximum(most, tl.max(logits, axis=1))
            base = tl.where(now == float("-inf"), 0.0, now)  # nothing seen yet: no infinity minus infinity
            mass = mass * tl.exp2(most - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
            most = now
    tl.store(lse + rows, tl.where(mass == 0.0, float("inf"), most + tl.log2(mass)), mask=rows < length)


@triton.jit(do_not_specialize=LENGTHS)  # type: ignore[untyped-decorator, unused-ignore]
def column_kernel(  # type: ignore[no-untyped-def]
    queries,  # as above, down to `width`
    keys,
    valid,
    lse,
    weights,  # (B, L) float32, if WEIGHTED
    sums,  # (B, H, S) float32, the answer
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    heads,
    groups,
    length,
    total,
    past,
    inner,
    outer,
    width,
    CAUSAL: tl.constexpr,
    VALID: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    HELD: tl.constexpr,  # keys a program
    STEP: tl.constexpr,  # queries a step
    WIDTH: tl.constexpr,
):
    """One program: a block of keys for one query head, over all queries that see one of them, in their order. The first blocks are seen most."""
    blocks = tl.cdiv(total, HELD)
    at = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * HELD
    batch, head = (at // heads).to(tl.int64), (at % heads).to(tl.int64)
    queries += batch * query_batch + head * query_head
    keys += batch * key_batch + (head // groups) * key_head + first.to(tl.int64) * key_row
    lse += at.to(tl.int64) * length
    weights += batch * length
    held, step, dim = tl.arange(0, HELD), tl.arange(0, STEP), tl.arange(0, WIDTH)
    places = first + held
    key = tl.load(keys + held[:, None] * key_row + dim[None, :], mask=(places < total)[:, None] & (dim < width)[None, :], other=0.0)
    low, full = first * 0, first * 0  # from `full` on every query sees every key of the block
    if CAUSAL:
        low = tl.maximum(first - past, 0) // STEP * STEP
        full = tl.cdiv(tl.maximum(first + HELD - 1 - past, 0), STEP) * STEP
    received = tl.zeros([HELD], tl.float32)
    for part in tl.static_range(2):
        if part == 0:
            start_at, end = low, tl.minimum(full, length)
        else:
            start_at, end = full, length
        if CAUSAL or part == 1:
            for start in range(start_at, end, STEP):
                row = start + step
                there = row < length
                offsets = step[:, None] * query_row + dim[None, :]
                query = tl.load(queries + tl.cast(start, tl.int64) * query_row + offsets, mask=there[:, None] & (dim < width)[None, :], other=0.0)
                log_mass = tl.load(lse + row, mask=there, other=float("inf"))
                share = tl.exp2(_logits(key, query, inner, outer, CAPPED) - log_mass[None, :])
                if part == 0:
                    share = tl.where(places[:, None] <= past + row[None, :], share, 0.0)
                if WEIGHTED:
                    weight = tl.load(weights + row, mask=there, other=0.0)[None, :]
                    share = tl.where(weight > 0.0, share * weight, 0.0)  # what padding asks may be no number
                received += tl.sum(share, axis=1)
    if VALID:
        received = tl.where(tl.load(valid + batch * total + places, mask=places < total, other=0) != 0, received, 0.0)
    tl.store(sums + at.to(tl.int64) * total + places, received, mask=places < total)
