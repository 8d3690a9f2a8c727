"""Measured cost of the methods for text, ``vlprune bench --text``: a text-only decoder, long prompts, dense and ``random_text`` in the same run.

Time to first token, decode step, bytes of keys and values (read off the cache and as computed) and FLOPs, warm, interleaved, medians. Efficiency is
(dense time / pruned time) / (dense FLOPs / pruned FLOPs) of the prefill: 1.0 means that every FLOP saved is time saved. Methods act on a prompt of random
words in a model of random weights, so adaptive ones do what such a prompt makes them do.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.bench import SHAPES, Rig, Shape
from vlprune.errors import OptionError, VlpruneError, unknown
from vlprune.fitting import Fit, fit, reason

LENGTHS = (4096, 16384)
DENSE, RANDOM = "dense", "random_text"
NOISE = 0.98                                                             # below it a ratio of times is a loss

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TextRow:
    """One method at one length. Milliseconds are medians; ratios are against dense in the same run; bytes are of the cache behind the prompt."""

    length: int
    method: str
    keep: str
    options: str
    prefill_ms: float
    speedup: float
    flops_ratio: float
    efficiency: float
    decode_ms: float
    decode_speedup: float
    kv_bytes: int
    kv_bytes_expected: int


class TextRig(Rig):
    """A text-only decoder of a shape, a prompt of random words, and the clock."""

    def __init__(self, shape: Shape, length: int, *, batch: int, device: str, decode_steps: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.decoder, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary, max_position_embeddings=2 * length,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = LlamaForCausalLM._from_config(config, dtype=getattr(torch, shape.dtype))
        words = torch.randint(10, 30000, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
        self.model, self.inputs = model.eval(), {"input_ids": words, "attention_mask": torch.ones_like(words)}
        self.device, self.batch, self.decode_steps, self.stored = device, batch, decode_steps, 0


@dataclass
class _Times:
    """What was measured of one method."""

    prefill: list[float]
    decode: list[float]
    flops: float = 1.0
    stored: int = 0
    expected: int = 0


def run(
    methods: Sequence[str] | None = None,
    keep: float | None = None,
    shape: str = "cpu",
    lengths: Sequence[int] = LENGTHS,
    batch: int = 1,
    rounds: int = 3,
    decode_steps: int = 16,
    device: str | None = None,
    progress: Progress = lambda text: None,
) -> tuple[list[TextRow], dict[str, str]]:
    """Measure methods for text against dense and ``random_text``, which always run.

    Args:
        methods: names; ``None`` for all that reduce text, or text and visual tokens alike.
        keep: what every method is given, in its own meaning (`vlprune methods`); ``None``: each its default.
        shape: one of `vlprune.bench.SHAPES`, of which the decoder is built.
        lengths: tokens of the prompts.
        batch: prompts at a time.
        rounds: counted runs of each, after one that is not.
        decode_steps: tokens decoded after each prefill.
        device: ``"cpu"`` or ``"cuda"``; ``None``: a GPU if there is one.
        progress: called with a word on what is being run.

    Returns:
        The rows, and why methods were left out, by name.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    if not lengths or any(length < 8 for length in lengths):
        raise OptionError(f"lengths={tuple(lengths)}: prompts of at least 8 tokens are needed")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = [*vlprune.list_methods("text"), *vlprune.list_methods("all")]
    names = list(dict.fromkeys([RANDOM, *(methods if methods is not None else known)]))
    for name in names:
        if vlprune.get_method(name).tokens == "visual" and name != DENSE:
            raise OptionError(f"{name} reduces visual tokens, and this prompt has none. For text there are: {', '.join(known)}")
    rows: list[TextRow] = []
    left_out: dict[str, str] = {}
    for length in lengths:
        progress(f"building a decoder for {length:,} tokens")
        rig = TextRig(SHAPES[shape], length, batch=batch, device=device, decode_steps=decode_steps)
        fits: list[Fit] = []
        for name in names:
            try:
                if name != DENSE:
                    fits.append(fit(rig.model, name, vlprune.get_method(name).default_keep if keep is None else keep, "text", untrained=True))
            except VlpruneError as error:
                left_out[name] = reason(error)
        rows += _measure(rig, length, keep, fits, rounds, left_out, progress)
    return rows, left_out


def _measure(rig: TextRig, length: int, keep: float | None, fits: list[Fit], rounds: int, left_out: dict[str, str], progress: Progress) -> list[TextRow]:
    times = {name: _Times([], []) for name in (DENSE, *(one.name for one in fits))}
    for number in range(rounds + 1):
        for name, one in ((DENSE, None), *((one.name, one) for one in fits)):
            if name in left_out:
                continue
            progress(f"{length:,} tokens, {f'round {number}/{rounds}' if number else 'warm-up'}: {name}")
            found = times[name]
            try:
                with vlprune.apply(rig.model, DENSE if one is None else one.method) as handle:
                    before, after = rig.once()
                    if number:
                        found.prefill.append(before)
                        found.decode.append(after)
                        continue
                    report = handle.report()
                    found.stored = rig.stored
                    found.expected = report.kv_bytes_pruned or found.stored
                    found.flops = report.flops_dense / report.flops_pruned if report.flops_pruned else 1.0
            except VlpruneError as error:
                left_out[name] = reason(error)
            except torch.OutOfMemoryError:
                left_out[name] = f"out of the device's memory at {length:,} tokens"
    dense = times[DENSE]
    first, step = statistics.median(dense.prefill), statistics.median(dense.decode)
    rows = [TextRow(length, DENSE, "1", "", first, 1.0, 1.0, 1.0, step, 1.0, dense.stored, dense.expected)]
    for one in fits:
        if one.name in left_out:
            continue
        found = times[one.name]
        mine, decode = statistics.median(found.prefill), statistics.median(found.decode)
        ratio = first / mine
        of_prompt, of_steps = (mine, ratio, found.flops, ratio / found.flops), (decode, step / decode)
        given = one.card.default_keep if keep is None else keep
        words = f"{given:.4g}" if isinstance(given, (int, float)) else str(given)
        rows.append(TextRow(length, one.name, words, one.options, *of_prompt, *of_steps, found.stored, found.expected))
    return rows


def markdown(rows: Sequence[TextRow], left_out: dict[str, str]) -> str:
    """A table a length, and why methods were left out."""
    lines: list[str] = []
    for length in dict.fromkeys(row.length for row in rows):
        lines += [f"## {length:,} tokens", "", *table([row for row in rows if row.length == length]), ""]
    lines += [f"- {name} left out: {why}" for name, why in left_out.items()]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: Sequence[TextRow]) -> list[str]:
    """Lines of a table of one length. What is slower than dense is marked."""
    lines = [
        "| method | keep | options | first token ms | speed-up | FLOPs ratio | efficiency | decode ms | decode speed-up | KV MB (expected) |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        slower = [words for words, ratio in (("prefill", row.speedup), ("decode", row.decode_speedup)) if ratio < NOISE]
        mark = f" (slower than dense: {', '.join(slower)})" if slower else ""
        lines.append(
            f"| {row.method}{mark} | {row.keep} | {row.options} | {row.prefill_ms:.0f} | {row.speedup:.2f} | {row.flops_ratio:.2f} | {row.efficiency:.2f} "
            f"| {row.decode_ms:.1f} | {row.decode_speedup:.2f} | {row.kv_bytes / 1e6:.1f} ({row.kv_bytes_expected / 1e6:.1f}) |"
        )
    return lines


def write_json(rows: Sequence[TextRow], left_out: dict[str, str], facts: dict[str, Any], path: Path) -> None:
    """Facts, rows and reasons."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"facts": facts, "columns": [part.name for part in fields(TextRow)], "rows": [asdict(row) for row in rows], "left_out": left_out}
    path.write_text(json.dumps(found, indent=1) + "\n")
