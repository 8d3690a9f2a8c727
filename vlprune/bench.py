"""Measured speed: dense, ``random`` and every method at the same budget, in one process, interleaved, warm, medians.

The models have random weights and real proportions, so times and counts are those of a trained model of that shape; answers
mean nothing here. Efficiency is (dense time / pruned time) / (dense FLOPs / pruned FLOPs): 1.0 means every FLOP saved is time saved.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vlprune
from vlprune.errors import OptionError, VlpruneError, unknown
from vlprune.method import MethodCard


@dataclass(frozen=True)
class Shape:
    """A model to measure on.

    Attributes:
        decoder, width, heads, kv_heads, hidden: layers and widths of the decoder.
        tower, tower_width, tower_heads: of the vision tower.
        visual, text: visual and text tokens of the prompt (visual is a square number; in a video, frames of 100).
        vocabulary: rows of the embedding and of the head.
    """

    decoder: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    tower: int
    tower_width: int
    tower_heads: int
    visual: int
    text: int = 64
    dtype: str = "float32"
    vocabulary: int = 32064


#: ``cpu``: the default; ``cpu-short``: a third of its layers, for very long prompts. The others have the widths and depths of published models, for a GPU; the
#: architecture is LLaVA's in all of them, also where the widths are Qwen's (grouped keys, but one-dimensional positions and a plain tower).
SHAPES = {
    "cpu": Shape(12, 1024, 16, 16, 2752, 9, 256, 4, 1600),
    "cpu-short": Shape(4, 1024, 16, 16, 2752, 3, 256, 4, 1600),
    "tiny": Shape(4, 128, 4, 4, 344, 4, 64, 2, 400, 16),
    "llava-1.5-7b": Shape(32, 4096, 32, 32, 11008, 24, 1024, 16, 576, dtype="bfloat16"),
    "llava-next-7b": Shape(32, 4096, 32, 32, 11008, 24, 1024, 16, 2916, dtype="bfloat16"),
    "qwen2.5-vl-7b": Shape(28, 3584, 28, 4, 18944, 32, 1280, 16, 1600, dtype="bfloat16"),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14336, 24, 1024, 16, 576, dtype="bfloat16", vocabulary=128256),
}


@dataclass
class Row:
    """One line of the table. Milliseconds are medians; bytes are of one prefill; ratios are against dense in the same run."""

    method: str
    keep: Any
    point: str
    prefill_ms_dense: float
    prefill_ms: float
    speedup: float
    flops_ratio: float
    efficiency: float
    scorer_ms: float
    scorer_share: float
    decode_ms_dense: float
    decode_ms: float
    kv_bytes: int
    kv_bytes_expected: int
    peak_bytes_dense: int
    peak_bytes: int


def build(shape: Shape, *, video: bool, device: str) -> nn.Module:
    """A LLaVA of this shape (LLaVA-NeXT-Video for methods that need frames), random weights, on the device."""
    import transformers

    side = 20 if video else round(shape.visual**0.5)
    if not video and side * side != shape.visual:
        raise OptionError(f"visual={shape.visual}: a square number is needed")
    vision = {
        "model_type": "clip_vision_model", "hidden_size": shape.tower_width, "intermediate_size": 4 * shape.tower_width, "num_hidden_layers": shape.tower,
        "num_attention_heads": shape.tower_heads, "image_size": 14 * side, "patch_size": 14, "projection_dim": shape.tower_width,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.decoder,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary, "max_position_embeddings": 8192,
    }  # fmt: skip
    if video:
        config = transformers.LlavaNextVideoConfig(
            vision_config=vision, text_config=text, image_token_index=32000, video_token_index=32001, spatial_pool_mode="average"
        )
        kind = transformers.LlavaNextVideoForConditionalGeneration
    else:
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, image_seq_length=shape.visual)
        kind = transformers.LlavaForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=getattr(torch, shape.dtype))
    return model.eval()  # type: ignore[no-any-return]


def prompt(shape: Shape, model: nn.Module, *, video: bool, batch: int, device: str) -> dict[str, torch.Tensor]:
    """Random pictures between random words."""
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, shape.dtype)
    size = int(model.config.vision_config.image_size)  # type: ignore[union-attr, arg-type]
    head = torch.randint(10, 30000, (batch, shape.text // 2), generator=generator)
    tail = torch.randint(10, 30000, (batch, shape.text - shape.text // 2), generator=generator)
    count = 100 * (shape.visual // 100) if video else shape.visual
    ids = torch.cat([head, torch.full((batch, count), 32001 if video else 32000), tail], dim=1).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if video:
        inputs["pixel_values_videos"] = torch.randn(batch, shape.visual // 100, 3, size, size, generator=generator).to(device, dtype)
    else:
        inputs["pixel_values"] = torch.randn(batch, 3, size, size, generator=generator).to(device, dtype)
    return inputs


class Rig:
    """A model, its prompt, and the clock."""

    def __init__(self, shape: Shape, *, video: bool, batch: int, device: str, decode_steps: int) -> None:
        self.model = build(shape, video=video, device=device)
        self.inputs = prompt(shape, self.model, video=video, batch=batch, device=device)
        self.device, self.batch, self.decode_steps = device, batch, decode_steps
        self.stored = 0                                                  # bytes of the cache behind the last prompt

    def now(self) -> float:
        """Seconds, after everything queued is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def once(self) -> tuple[float, float]:
        """Prefill and mean decode step in milliseconds."""
        start = self.now()
        out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        prefill = self.now() - start
        cache = out.past_key_values
        self.stored = stored_bytes(cache)
        token, length = out.logits[:, -1:].argmax(-1), self.inputs["input_ids"].shape[1]
        start = self.now()
        for step in range(self.decode_steps):
            mask = torch.ones(self.batch, length + step + 1, dtype=torch.long, device=self.device)
            token = self.model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        return 1e3 * prefill, 1e3 * (self.now() - start) / max(self.decode_steps, 1)

    @torch.no_grad()
    def peak(self) -> int:
        """Most bytes that one prefill held at a time beyond what was there before it."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            return int(torch.cuda.max_memory_allocated() - before)
        with PeakMeter() as meter:
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        return int(meter.most)


class PeakMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of new tensors alive at a time, looked at after every operator; scratch memory inside one operator is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def run(
    methods: Sequence[str] | None = None,
    keep: float = 1 / 9,
    shape: str = "cpu",
    batch: int = 1,
    rounds: int = 5,
    decode_steps: int = 8,
    device: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure methods against dense and ``random`` at the same budget.

    Args:
        methods: names; ``None`` for all that are registered. ``dense`` and ``random`` always come first.
        keep: share of visual tokens that stay.
        shape: one of `SHAPES`.
        batch: prompts at a time.
        rounds: counted runs of each, after one that is not; in every round each method runs once.
        decode_steps: tokens decoded after each prefill.
        device: ``"cpu"`` or ``"cuda"``; ``None``: a GPU if there is one.
        progress: called with a word on what is being run.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = list(dict.fromkeys(["dense", "random", *(methods or vlprune.list_methods("visual"))]))
    cards = {name: vlprune.get_method(name) for name in names}
    rows: list[Row] = []
    for video in (False, True):
        group = [name for name in names if (cards[name].modality == "video") == video]
        if video and group:
            group = ["dense", "random", *group]
        if group:
            progress(f"building the {'video' if video else 'image'} model")
            rig = Rig(SHAPES[shape], video=video, batch=batch, device=device, decode_steps=decode_steps)
            measured = _measure(rig, [cards[name] for name in group], keep, rounds, progress)
            rows.extend(row for row in measured if not (video and row.method in ("dense", "random") and len(rows) > 1))
            del rig
    return rows


def _measure(rig: Rig, cards: list[MethodCard], keep: float, rounds: int, progress: Callable[[str], None]) -> list[Row]:
    prefill: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    scorer: dict[str, list[float]] = {}
    facts: dict[str, Any] = {}
    failed: set[str] = set()
    for number in range(rounds + 1):
        for card in cards:
            if card.name in failed:
                continue
            progress(f"round {number}/{rounds}: {card.name}" if number else f"warm-up: {card.name}")
            try:
                handle = vlprune.apply(rig.model, card, keep=keep)
            except VlpruneError as error:
                progress(f"{card.name} left out: {error}")
                failed.add(card.name)
                continue
            with handle:
                handle.pruner.clock = rig.now
                before, after = rig.once()
                if number == 0:
                    handle.pruner.clock = None
                    report = handle.report()
                    facts[card.name] = {
                        "report": report,
                        "stored": rig.stored,
                        "peak": rig.peak(),
                        "points": ",".join(stage.point.label for stage in handle.method.stages) or "-",
                    }
                else:
                    prefill.setdefault(card.name, []).append(before)
                    decode.setdefault(card.name, []).append(after)
                    scorer.setdefault(card.name, []).append(1e3 * handle.pruner.clocked)
    dense_ms, dense_decode = statistics.median(prefill["dense"]), statistics.median(decode["dense"])
    result = []
    for card in cards:
        if card.name in failed:
            continue
        known, report = facts[card.name], facts[card.name]["report"]
        mine = statistics.median(prefill[card.name])
        ratio = report.flops_dense / report.flops_pruned if report.flops_pruned else 1.0
        expected = report.kv_bytes_pruned or known["stored"]
        scored = statistics.median(scorer[card.name])
        result.append(
            Row(
                card.name, keep if card.name != "dense" else 1.0, known["points"], dense_ms, mine, dense_ms / mine, ratio, dense_ms / mine / ratio,
                scored, scored / dense_ms, dense_decode, statistics.median(decode[card.name]), known["stored"], expected, facts["dense"]["peak"], known["peak"],
            )
        )  # fmt: skip
    return result


def stored_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache, read off its tensors."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def environment(shape: str, batch: int, device: str | None = None) -> dict[str, Any]:
    """What a table was measured on."""
    import transformers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "vlprune": vlprune.__version__,
        "shape": shape, "batch": batch, **asdict(SHAPES[shape]),
    }  # fmt: skip


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list with one object a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    """The table for a results folder."""
    head = "| method | point | prefill ms | speed-up | FLOPs ratio | efficiency | scorer ms (share) | decode ms | KV MB (expected) | peak MB |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        slower = " (slower than dense)" if row.speedup < 0.98 else ""
        lines.append(
            f"| {row.method}{slower} | {row.point} | {row.prefill_ms:.0f} | {row.speedup:.2f} | {row.flops_ratio:.2f} | {row.efficiency:.2f} "
            f"| {row.scorer_ms:.0f} ({row.scorer_share:.1%}) | {row.decode_ms:.1f} | {row.kv_bytes / 1e6:.1f} ({row.kv_bytes_expected / 1e6:.1f}) "
            f"| {row.peak_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"
