"""What a setting costs: time to first token, time per decoded token, throughput at several batch sizes, cache bytes, peak memory.

Measured on one prompt of the benchmark (the first that can be opened), copied to a batch. All settings take turns, several rounds, warm, medians. Reading
files and preprocessing are not counted: they are the same for every setting.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.bench import PeakMeter, stored_bytes
from vlprune.evals.asking import collate, inputs_for, open_sample, pad_token
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.settings import Setting
from vlprune.evals.worker import Worker

ROUNDS = 5
STEPS = 4


class Meter:
    """Measures, and remembers in a file what was measured."""

    def __init__(self, path: Path, worker: Worker, batches: Sequence[int]) -> None:
        self.path, self.worker, self.batches = path, worker, tuple(batches)
        whole = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = whole.splitlines()
        self._torn = bool(whole) and not whole.endswith("\n")
        self.known: list[dict[str, Any]] = []
        for line in lines:
            try:
                self.known.append(json.loads(line))
            except ValueError:                                           # the line that a kill cut short
                continue

    def measure(
        self, card: Benchmark, samples: Sequence[Sample], settings: Sequence[Setting], progress: Callable[[int, int, str], None]
    ) -> dict[str, dict[str, Any]]:
        """Numbers by row label. All settings of a table are measured in one run or not at all, so that their ratios are fair."""
        kind = self.worker.modality(card)
        once = [setting for setting in settings if setting.draw == 0]
        wanted = {"modality": kind, "batches": list(self.batches), "settings": [setting.label for setting in once], "benchmark": card.name}
        for record in self.known:
            if record["of"] == wanted:
                return dict(record["costs"])
        inputs = self._inputs(samples)
        if inputs is None:
            return {}
        costs: dict[str, dict[str, Any]] = {setting.label: {} for setting in once}
        for batch in self.batches:
            together = collate([inputs] * batch, pad_token(self.worker.loaded))
            if together is None:
                continue

            def tell(done: int, total: int, words: str = f"{card.title}: cost at batch {batch}") -> None:
                progress(done, total, words)

            self._rounds(together, batch, once, costs, tell)
        record = {"of": wanted, "costs": costs}
        self.known.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(record) + "\n")
        self._torn = False
        return costs

    def close(self) -> None:
        """Nothing is held."""

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Any] | None:
        for sample in samples:
            try:
                return inputs_for(self.worker.loaded, open_sample(sample, self.worker.plan.frames))
            except Exception:                                            # it is listed as failed already
                continue
        return None

    def _rounds(
        self, inputs: dict[str, Any], batch: int, settings: Sequence[Setting], costs: dict[str, dict[str, Any]], tell: Callable[[int, int], None]
    ) -> None:
        first: dict[str, list[float]] = {}
        step: dict[str, list[float]] = {}
        rounds = ROUNDS if batch == 1 else 3
        for number in range(rounds + 1):                                 # the first warms up
            for place, setting in enumerate(settings):
                tell(number * len(settings) + place, (rounds + 1) * len(settings))
                if "failed" in costs[setting.label]:
                    continue
                try:
                    with nullcontext() if setting.built is None else vlprune.apply(self.worker.loaded.model, setting.built):
                        prefill, decode, stored = self._once(inputs)
                        if number == 0 and batch == 1:
                            costs[setting.label] |= {"kv_bytes_stored": stored, "peak_bytes": self._peak(inputs)}
                except Exception as error:
                    costs[setting.label]["failed"] = f"batch {batch}: {type(error).__name__}: {error}"[:300]
                    continue
                if number:
                    first.setdefault(setting.label, []).append(prefill)
                    step.setdefault(setting.label, []).append(decode)
        for label, times in first.items():
            if batch == 1:
                costs[label] |= {"ttft_ms": 1e3 * statistics.median(times), "decode_ms": 1e3 * statistics.median(step[label])}
            costs[label][f"per_second_{batch}"] = batch / statistics.median(a + STEPS * b for a, b in zip(times, step[label], strict=True))

    @torch.no_grad()
    def _once(self, inputs: dict[str, Any]) -> tuple[float, float, int]:
        """Seconds to the first token, seconds per further token, bytes in the cache behind the prefill."""
        model = self.worker.loaded.model
        start = self._now()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        prefill = self._now() - start
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        stored = stored_bytes(cache)
        mask = inputs["attention_mask"]
        start = self._now()
        for _ in range(STEPS):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            token = model(input_ids=token, attention_mask=mask, past_key_values=cache, **_positions(model, mask)).logits[:, -1:].argmax(-1)
        return prefill, (self._now() - start) / STEPS, stored

    @torch.no_grad()
    def _peak(self, inputs: dict[str, Any]) -> int:
        model = self.worker.loaded.model
        if model.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(**inputs, use_cache=True, logits_to_keep=1)
            return int(torch.cuda.max_memory_allocated() - before)
        with PeakMeter() as meter:
            model(**inputs, use_cache=True, logits_to_keep=1)
        return int(meter.most)

    def _now(self) -> float:
        if self.worker.loaded.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _positions(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions of the next token where a model with three-part positions counts on `generate` to give them: by itself it takes all columns of the mask."""
    deltas = getattr(getattr(model, "model", None), "rope_deltas", None)
    if deltas is None:
        return {}
    return {"position_ids": (mask.long().sum(-1, keepdim=True) - 1 + deltas.to(mask.device)).expand(3, -1, -1)}
