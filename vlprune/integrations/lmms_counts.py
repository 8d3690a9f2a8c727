"""How many visual tokens the prompts of a run had and how many stayed: counted call by call, averaged over samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprune.api import PruneHandle
from vlprune.trace import PointRecord, Trace

COSTS = ("flops_dense", "flops_pruned", "kv_bytes_dense", "kv_bytes_pruned")


@dataclass
class Counts:
    """Counts of all samples that the model has seen.

    Attributes:
        placeholders: token ids that stand for visual tokens in a prompt.
        prompt, kept: visual tokens of each sample in its prompt, and behind the last pruning point.
        points: by pruning point and method: visual tokens that reached it and that stayed, summed over samples, and of how many samples.
        costs: prefill FLOPs and bytes in the cache behind it, dense and pruned, summed over samples with visual tokens.
        failed: calls that raised an error; the first one's words in ``error``.
    """

    placeholders: tuple[int, ...]
    prompt: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    points: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    failed: int = 0
    error: str = ""
    _last: Trace | None = None

    def add(self, ids: Tensor | None, handle: PruneHandle | None) -> None:
        """Note one call.

        Args:
            ids: (samples, L) token ids of the prompts.
            handle: of the pruned model; ``None`` for the dense one.
        """
        if ids is None:
            return
        prompt = sum((ids == number).sum(dim=1) for number in self.placeholders)
        rows = prompt.tolist() if isinstance(prompt, Tensor) else [0] * len(ids)
        trace = handle.trace if handle is not None else None
        self.prompt += rows
        self.kept += rows if trace is None or trace is self._last else self._behind(trace, rows)
        if handle is not None and trace is not None and trace is not self._last:
            report = handle.report()
            for name in COSTS:
                self.costs[name] = self.costs.get(name, 0.0) + getattr(report, name) * len(rows) / _num_rows(trace, len(rows))
        self._last = trace

    def summary(self) -> dict[str, Any]:
        """Means and largest numbers of tokens a sample, ready for JSON. Samples without visual tokens are counted apart."""
        seen = [(prompt, kept) for prompt, kept in zip(self.prompt, self.kept, strict=True) if prompt]
        tokens: dict[str, Any] = {}
        for place, name in enumerate(("prompt", "kept")):
            numbers = [pair[place] for pair in seen]
            tokens[name] = {"mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)} if numbers else None
        total = sum(prompt for prompt, _ in seen)
        points = [
            {"point": point, "method": method, "before": before / count, "kept": kept / count} for (point, method), (before, kept, count) in self.points.items()
        ]
        costs = {name: value / len(seen) for name, value in self.costs.items() if value} if seen else {}
        return {
            "samples": len(self.prompt), "samples_with_visual_tokens": len(seen), "failed_calls": self.failed, "first_error": self.error,
            "visual_tokens": {**tokens, "share": sum(kept for _, kept in seen) / total if total else None}, "points": points, "prefill": costs,
        }  # fmt: skip

    def line(self) -> str:
        """The same in a few words."""
        found = self.summary()
        tokens = found["visual_tokens"]
        if tokens["prompt"] is None:
            return f"no visual tokens in {found['samples']} samples"
        words = f"visual tokens a sample: {tokens['prompt']['mean']:.1f} in the prompt, {tokens['kept']['mean']:.1f} kept ({tokens['share']:.1%})"
        return f"{words}, {found['samples_with_visual_tokens']} samples" + (f"; {self.failed} calls FAILED, first: {self.error}" if self.failed else "")

    def _behind(self, trace: Trace, rows: list[int]) -> list[int]:
        """Visual tokens of each sample behind the last point; beams of a sample are equal rows side by side."""
        beams = _num_rows(trace, len(rows)) // len(rows)
        records = [record for record in trace.points if record.tokens == "visual"]
        for record in records:
            sums = self.points.setdefault((record.point, record.method), [0, 0, 0])
            sums[0] += record.visual_before // beams
            sums[1] += record.visual_kept // beams
            sums[2] += len({item.row // beams for item in record.items})
        return _by_sample(records[-1], len(rows), beams) if records else rows


def write_report(path: Path, entries: Mapping[str, Any], rank: int = 0) -> Path:
    """Write JSON, whole or not at all; processes of a run behind the first write beside it."""
    target = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, target)
    return target


def _num_rows(trace: Trace, samples: int) -> int:
    return trace.layout.num_rows if trace.layout is not None else samples


def _by_sample(record: PointRecord, samples: int, beams: int) -> list[int]:
    found = [0] * samples
    for item, kept in zip(record.items, record.kept, strict=True):
        if item.row % beams == 0:
            found[item.row // beams] += int(kept.numel())
    return found
