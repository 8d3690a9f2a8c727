"""The kernel of attention received against the torch path: in Triton's interpreter, through its compiler and, where there is one, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.tiny_text import text_families
from vlprune.adapters import _attention
from vlprune.adapters._attention import PlainMask
from vlprune.kernels import received_triton

ROOT = Path(__file__).parent.parent
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INTERPRETED = """
import torch
from types import SimpleNamespace
from vlprune.adapters import _attention
from vlprune.kernels import received_triton
generator = torch.Generator().manual_seed(0)
random = lambda *shape: torch.randn(*shape, generator=generator)
real = lambda *shape: torch.rand(*shape, generator=generator) > 0.3
close = lambda found, expected: torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
by_torch, by_kernel = (lambda *_: False), (lambda *_: True)

def both(function):
    _attention._by_kernel = by_torch
    expected = function()
    _attention._by_kernel = by_kernel
    close(function(), expected)

sizes = ((1, 2, 1, 5, 0, 16, None), (2, 4, 2, 75, 60, 72, None), (2, 2, 2, 70, 0, 80, 5.0), (1, 4, 2, 130, 0, 128, None), (1, 2, 1, 33, 100, 96, 2.0))
for batch, heads, groups, length, past, width, cap in sizes:
    total = length + past
    for kind in (torch.float32, torch.float16) if width in (16, 72) else (torch.float32,):   # the interpreter multiplies the bits of bfloat16
        queries = random(batch, length, heads, width).to(kind).transpose(1, 2)
        keys = random(batch, heads // groups, total, width).to(kind)
        attn = SimpleNamespace(scaling=2 * width**-0.5, attn_logit_softcapping=cap)
        for causal in (True, False):
            for padded in (True, False):
                valid = real(batch, total) if padded else None
                counts = real(batch, length) if padded else torch.ones(batch, length, dtype=torch.bool)
                if padded:
                    valid[:, past] = valid[:, 0] = True
                    valid[0, : past + 2], counts[0, :2] = False, False      # two queries that see nothing, if causal
                    valid[0, past + 2] = True
                slots, rows = torch.arange(length).expand(batch, -1), torch.arange(batch)
                allowed = lambda places: _attention.mask_rows(None, places.expand(batch, -1), rows, past, total, valid, causal)
                plain = _attention.plain_mask(None, past, length, total, valid, causal, False)
                assert plain == (causal, past, None) if valid is None else torch.equal(plain.key_valid, valid)
                weights = counts * torch.rand(batch, length, generator=generator) if padded and causal else counts
                for how in ("seen", "mean") if causal else ("sum",):
                    both(lambda: _attention.received(attn, queries, keys, allowed, weights, how, plain=plain))

q, k = random(1, 4, 150, 72), random(1, 4, 150, 72)
for lengths in (None, [64, 1, 85]):
    both(lambda: _attention.column_mean(q, k, 0.2, lengths))
    for how in ("mean", "sum"):
        both(lambda: _attention.received_from(q, k, 0.2, lengths, 1.02, how))
both(lambda: _attention.column_sum(q, k, 0.2, torch.arange(150)[None] % 3 / 2.0))

nothing = torch.zeros(1, 150, dtype=torch.bool)
assert not received_triton.key_sums(q, k, 0.2, key_valid=nothing).any()
late = torch.arange(150)[None] >= 9                                         # nine queries that count see nothing: as if they were not there
found = received_triton.key_sums(q, k, 0.2, causal=True, key_valid=late)
close(found, torch.cat([torch.zeros(1, 9), received_triton.key_sums(q[:, :, 9:], k[:, :, 9:], 0.2, causal=True)], 1))
broken = q.clone()
broken[:, :, 3] = float("nan")                                              # padding that asks what is no number
close(received_triton.key_sums(broken, k, 0.2, weights=torch.arange(150)[None] != 3), received_triton.key_sums(q, k, 0.2, weights=torch.arange(150)[None] != 3))
assert received_triton.key_sums(broken, k, 0.2).isnan().any(), "a query that counts must not hide it"
print("equal")
"""

COMPILED = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlprune.kernels.received_loop import column_kernel, row_kernel
from vlprune.kernels.received_triton import tile
whole = "query_batch query_head query_row key_batch key_head key_row heads groups length total past width".split()
types = {"queries": "*bf16", "keys": "*bf16", "valid": "*i8", "lse": "*fp32", "weights": "*fp32", "sums": "*fp32", "inner": "fp32", "outer": "fp32"}
types.update(dict.fromkeys(whole, "i32"))
cases = itertools.product(((80, 166912), (90, 232448)), ((128, True), (64, False), (80, True)), (row_kernel, column_kernel))
for (arch, shared), (width, causal), kernel in cases:
    wide = 128 if width == 80 else width
    held, step, stages, warps = tile(wide, 2, shared)
    fixed = {"CAUSAL": causal, "VALID": causal, "CAPPED": width == 80, "WEIGHTED": causal, "HELD": held, "STEP": step, "WIDTH": wide}
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature=signature, constexprs={name: fixed[name] for name in names if name in fixed})
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.asm["cubin"] and made.metadata.shared <= shared
print("compiled")
"""


@pytest.mark.parametrize(("code", "interpret", "word"), [(INTERPRETED, "1", "equal"), (COMPILED, "0", "compiled")], ids=["interpreted", "compiled"])
def test_without_a_gpu(code: str, interpret: str, word: str) -> None:
    """In Triton's interpreter it adds up as torch does; its compiler accepts it for GPUs that are not here, within their shared memory."""
    pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for CUDA)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": interpret})
    assert word in done.stdout, done.stderr[-2000:]


def test_tiles_fit_and_what_has_no_kernel_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert received_triton.tile(128, 2, 232448) == (128, 64, 3, 4)
    for wide, shared in ((16, 49152), (128, 65536), (256, 101376), (256, 232448)):
        held, step, stages, _ = received_triton.tile(wide, 2, shared)
        assert (held + step * stages) * wide * 2 <= shared
    x = torch.zeros(1, 1, 4, 16)
    assert not received_triton.usable(x, x), "no kernel on a CPU"

    def missing(name: str) -> Any:
        raise ImportError(name)

    received_triton.kernels.cache_clear()
    monkeypatch.setattr(received_triton.importlib, "import_module", missing)
    try:
        assert received_triton.kernels() is None
    finally:
        received_triton.kernels.cache_clear()


def test_triton_is_not_imported_before_it_is_used() -> None:
    code = "import sys, vlprune.adapters._attention; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


class Compared:
    """Instead of `_attention.received`: how often a mask was said in few words, and that these say what the mask says."""

    def __init__(self) -> None:
        self.own, self.said, self.asked, self.pasts = _attention.received, 0, 0, set[int]()

    def __call__(self, attn: Any, queries: Tensor, keys: Tensor, allowed: Any, real: Tensor, how: str = "sum", *, plain: PlainMask | None = None) -> Tensor:
        self.asked += 1
        if plain is not None:
            self.said += 1
            self.pasts.add(plain.past)
            (batch, _, length, _), total = queries.shape, keys.shape[2]
            mask = allowed(torch.arange(length))
            mask = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0].expand(batch, -1, -1)
            few = torch.arange(total) <= torch.arange(length)[:, None] + plain.past if plain.causal else torch.ones(length, total, dtype=torch.bool)
            few = few.expand(batch, -1, -1) if plain.key_valid is None else few & plain.key_valid[:, None]
            assert torch.equal(few[real], mask[real])
            torch.testing.assert_close(plain.seen(real, total).expand(batch, -1), (mask * real[..., None]).sum(dim=1).float())
        return self.own(attn, queries, keys, allowed, real, how)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_few_words_say_what_the_mask_says(family: str, backend: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns of rows that lose different numbers of tokens, so that padding and filler are among the keys."""
    if (family, backend) == ("gemma2", "sdpa"):
        pytest.skip("soft-capped logits need the eager backend")
    tiny = text_families()[family]
    compared = Compared()
    monkeypatch.setattr(_attention, "received", compared)
    model, inputs = tiny.build(backend), tiny.prompt([[23], [14]] if padded else [[23]])
    with torch.no_grad(), vlprune.apply(model, "ltp", keep=0.3, threshold=1.0):
        out = model(**inputs, use_cache=True)
        more = torch.arange(9, dtype=torch.long).expand(len(inputs["input_ids"]), -1) + 3
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
        model(input_ids=more, attention_mask=mask, past_key_values=out.past_key_values)
    assert compared.asked >= 6
    if family in ("llama", "qwen3"):
        assert compared.said == compared.asked or (backend == "eager" and compared.said >= 3)
        assert backend == "eager" or max(compared.pasts) > 0
    if family == "mistral" and (padded or backend == "eager"):
        assert compared.said < compared.asked, "a window is not said in few words"


# on a GPU


def expected_sums(queries: Tensor, keys: Tensor, scale: float, causal: bool, past: int, weights: Tensor, valid: Tensor, cap: float | None) -> Tensor:
    """(B, S) float64, head by head."""
    (batch, heads, length, _), total, device = queries.shape, keys.shape[2], queries.device
    sees = torch.ones(length, total, dtype=torch.bool, device=device).tril(past) if causal else torch.ones(length, total, dtype=torch.bool, device=device)
    sums = torch.zeros(batch, total, dtype=torch.float64, device=device)
    for row in range(batch):
        for head in range(heads):
            logits = queries[row, head].double() @ keys[row, head * keys.shape[1] // heads].double().T * scale
            logits = cap * torch.tanh(logits / cap) if cap else logits
            attention = logits.masked_fill(~(sees & valid[row]), float("-inf")).softmax(dim=-1).nan_to_num(0.0)
            sums[row] += (attention * weights[row, :, None]).sum(dim=0) / heads
    return sums


def fresh(kind: torch.dtype, batch: int, heads: int, groups: int, length: int, past: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New random inputs each time: queries and keys as a projection leaves them, (B, L, H, d) turned; weights and valid keys with padding."""
    queries = torch.randn(batch, length, heads, width, device="cuda").to(kind).transpose(1, 2)
    keys = torch.randn(batch, past + length, heads // groups, width, device="cuda").to(kind).transpose(1, 2)
    counts, valid = torch.rand(batch, length, device="cuda") > 0.1, torch.rand(batch, past + length, device="cuda") > 0.1
    valid[:, :3] = False                                                 # with no past, three queries that see nothing
    return queries, keys, counts, valid


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "past", "width", "cap"),
    [(1, 8, 4, 1000, 0, 128, None), (2, 4, 1, 577, 0, 64, None), (1, 8, 4, 4096, 0, 128, None), (1, 4, 2, 700, 333, 80, None), (2, 2, 1, 1000, 0, 96, 20.0)],
)
def test_on_cuda(kind: torch.dtype, causal: bool, batch: int, heads: int, groups: int, length: int, past: int, width: int, cap: float | None) -> None:
    """Within 2e-4 of float64, relative: products are exact, sums and exponentials are float32. The same bits again."""
    queries, keys, counts, valid = fresh(kind, batch, heads, groups, length, past, width)
    assert received_triton.usable(queries, keys)
    options: dict[str, Any] = {"causal": causal, "past": past, "cap": cap}
    found = received_triton.key_sums(queries, keys, width**-0.5, weights=counts, key_valid=valid, **options)
    torch.testing.assert_close(found.double(), expected_sums(queries, keys, width**-0.5, causal, past, counts, valid, cap), rtol=2e-4, atol=1e-6)
    assert torch.equal(found, received_triton.key_sums(queries, keys, width**-0.5, weights=counts, key_valid=valid, **options))
    plain = received_triton.key_sums(queries, keys, width**-0.5, **options)
    everything = expected_sums(queries, keys, width**-0.5, causal, past, torch.ones_like(counts), torch.ones_like(valid), cap)
    torch.testing.assert_close(plain.double(), everything, rtol=2e-4, atol=1e-6)
    assert float(plain.sum()) == pytest.approx(batch * length, rel=1e-4), "each query spreads one"


@pytest.mark.gpu
@ON_GPU
def test_the_adapters_use_it_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a tower, and the signal of a decoder with padding: with the kernel as without."""
    queries, keys, *_ = fresh(torch.bfloat16, 2, 16, 1, 1025, 0, 72)
    results = []
    tiny = text_families()["llama"]
    model, inputs = tiny.build().cuda(), {name: value.cuda() for name, value in tiny.prompt([[300], [211]]).items()}
    monkeypatch.setattr(_attention, "CHUNK_LOGITS_ELSEWHERE", 1 << 18)   # short prompts, too, are worth a kernel
    own, calls = received_triton.key_sums, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(received_triton, "key_sums", counted)
    read = _attention.received
    for by_kernel in (True, False):
        signals: list[Tensor] = []

        def noted(*args: Any, signals: list[Tensor] = signals, **kwargs: Any) -> Tensor:
            signals.append(read(*args, **kwargs))
            return signals[-1]

        if not by_kernel:
            monkeypatch.setattr(received_triton, "usable", lambda *_: False)
        monkeypatch.setattr(_attention, "received", noted)
        before = len(calls)
        mean, two = _attention.column_mean(queries, keys, 0.1), _attention.column_mean(queries[:1], keys[:1], 0.1, [1000, 25])
        with torch.no_grad(), vlprune.apply(model, "ltp", keep=0.9, threshold=1.0, layers=[1]):
            model(**inputs)
        assert (len(calls) - before >= 3) == by_kernel
        results.append((mean, two, *signals))
    assert len(results[0]) == len(results[1]) > 2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-4, atol=1e-6)


@pytest.mark.gpu
@ON_GPU
def test_memory_is_linear_on_cuda() -> None:
    """32,768 tokens: no more than the sums of rows and columns, of which one map of a head would be a thousand times as large."""
    queries, keys, *_ = fresh(torch.bfloat16, 1, 8, 4, 32768, 0, 128)
    received_triton.key_sums(queries[:, :, :64], keys[:, :, :64], 0.1, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = received_triton.key_sums(queries, keys, 0.1, causal=True)
    assert torch.cuda.max_memory_allocated() - before < 4 << 20
    assert float(found.sum()) == pytest.approx(32768, rel=1e-4)


@pytest.mark.gpu
@ON_GPU
def test_offsets_beyond_32_bits_on_cuda() -> None:
    """Rows 32,768 numbers apart, 70,000 of them: more than 2**31 numbers from end to end."""
    length = 70_000
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    buffer = torch.empty(length, 32_768, dtype=torch.bfloat16, device="cuda")
    buffer[:, :128].normal_()
    queries, keys = buffer[None, None, :, :64], buffer[None, None, :, 64:128]
    found = received_triton.key_sums(queries, keys, 0.1, causal=True)
    assert torch.equal(found, received_triton.key_sums(queries.contiguous(), keys.contiguous(), 0.1, causal=True))
    assert float(found.sum()) == pytest.approx(length, rel=1e-4)
