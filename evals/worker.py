"""Asks a model: samples in, one record for each setting and sample out. The same on this machine and on a worker of a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import vlprune
from vlprune.api import PruneHandle
from vlprune.errors import VlpruneError
from vlprune.evals.asking import Frames, Opened, collate, inputs_for, open_sample, pad_token
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.judge import Judge, judged, load_judge
from vlprune.evals.settings import Setting, make_settings
from vlprune.loading import Loaded, load_embedded, load_model
from vlprune.report import Report

EMBEDDED = ("embedded", "embedded-video")


@dataclass(frozen=True)
class ModelSpec:
    """A model to load: a folder or hub id, ``"embedded"`` or ``"embedded-video"``."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def load(self) -> Loaded:
        """The model with its processor."""
        if self.name == "embedded":
            return load_embedded()
        if self.name == "embedded-video":
            from vlprune.embedded_video import load_embedded_video

            return load_embedded_video()
        return load_model(self.name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Plan:
    """What every worker has to know.

    Attributes:
        methods, keeps, draws, options: see `vlprune.evals.settings.make_settings`.
        batch: samples at a time.
        judge: of open answers, see `vlprune.evals.judge`; only benchmarks that say ``judge=True`` are given to it.
    """

    spec: ModelSpec
    methods: tuple[str, ...]
    keeps: tuple[str, ...]
    draws: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    frames: Frames = field(default_factory=Frames)
    batch: int = 1
    judge: str | Judge | None = None


class Worker:
    """A loaded model and the settings for it."""

    def __init__(self, plan: Plan, loaded: Loaded | None = None) -> None:
        self.plan = plan
        self._judge = load_judge(plan.judge)
        self.loaded = plan.spec.load() if loaded is None else loaded
        self.loaded.model.eval()
        self._settings: dict[str, tuple[list[Setting], dict[str, str]]] = {}

    def modality(self, benchmark: Benchmark) -> str:
        """Of the items that the model sees: a model that takes no videos gets frames as pictures."""
        return "video" if benchmark.modality == "video" and self.loaded.takes_video else "image"

    def settings(self, benchmark: Benchmark) -> tuple[list[Setting], dict[str, str]]:
        """The settings for a benchmark, and why the other methods are left out."""
        kind = self.modality(benchmark)
        if kind not in self._settings:
            plan = self.plan
            self._settings[kind] = make_settings(self.loaded.model, plan.methods, plan.keeps, kind, draws=plan.draws, options=plan.options)
        return self._settings[kind]

    def answer(self, benchmark: Benchmark, samples: Sequence[Sample], lacking: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Records for a few samples, all settings of one batch after each other.

        Args:
            benchmark: whose prompts and score count.
            samples: to open, once each.
            lacking: labels of the settings that are asked for, by sample id. What is not asked for keeps its place in its batch and is thrown away: FLOPs
                and bytes count the padding, so they depend on who is in it.
        """
        opened: list[Opened] = []
        settings = self.settings(benchmark)[0]
        for sample in samples:
            try:
                opened.append(open_sample(sample, self.plan.frames))
            except Exception as error:                                   # whatever a broken file makes a decoder do is that sample's failure
                for label in lacking[sample.id]:
                    yield {"setting": label, "id": sample.id, "answer": "", "score": 0.0, "failed": "open", "error": _words(error)}
        for setting in settings:
            asked = {entry.sample.id for entry in opened if setting.label in lacking[entry.sample.id]}
            for start in range(0, len(opened), self.plan.batch):
                part = opened[start : start + self.plan.batch]
                if asked.intersection(entry.sample.id for entry in part):
                    yield from (record for record in self._ask(benchmark, setting, part) if record["id"] in asked)

    def _ask(self, benchmark: Benchmark, setting: Setting, part: list[Opened]) -> list[dict[str, Any]]:
        try:
            inputs = collate([inputs_for(self.loaded, entry) for entry in part], pad_token(self.loaded))
            if inputs is not None:
                return self._generate(benchmark, setting, part, inputs)
        except Exception as error:
            if len(part) == 1:
                sample = part[0].sample
                return [{"setting": setting.label, "id": sample.id, "answer": "", "score": 0.0, "failed": "run", "error": _words(error)}]
        return [record for entry in part for record in self._ask(benchmark, setting, [entry])]    # one by one: only what fails is lost

    @torch.no_grad()
    def _generate(self, benchmark: Benchmark, setting: Setting, part: list[Opened], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        model = self.loaded.model
        with nullcontext() if setting.built is None else vlprune.apply(model, setting.built) as handle:
            begun = time.perf_counter()
            made = model.generate(**inputs, max_new_tokens=benchmark.max_new_tokens, do_sample=False)
            seconds = (time.perf_counter() - begun) / len(part)
            counts, shares = ([{}] * len(part), {}) if handle is None else (_counts(handle, setting, len(part)), _flops(handle.report(), len(part)))
        new = made[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.loaded.processor.batch_decode(new, skip_special_tokens=True)]
        records = []
        for entry, text, count in zip(part, texts, counts, strict=True):
            score = self._score(benchmark, entry.sample, text)
            records.append({"setting": setting.label, "id": entry.sample.id, "answer": text, **score, **count, **shares, "seconds": round(seconds, 5)})
        return records

    def _score(self, benchmark: Benchmark, sample: Sample, answer: str) -> dict[str, float]:
        matched = float(benchmark.score(sample, answer))
        if self._judge is None or not benchmark.judge:
            return {"score": matched}
        return {"score": judged(self._judge, sample, answer), "matched": matched}


def _counts(handle: PruneHandle, setting: Setting, rows: int) -> list[dict[str, Any]]:
    """Visual tokens of each row: in the prompt, behind the last point, and what was asked for there."""
    found: list[dict[str, Any]] = [{"visual": 0, "kept": 0} for _ in range(rows)]
    trace = handle.trace
    if trace is None or trace.layout is None:
        return found
    for item in trace.layout.items:
        found[item.row]["visual"] += item.num_tokens
    points = [point for point in trace.points if point.tokens == "visual"]
    if not points:
        return [{**row, "kept": row["visual"]} for row in found]
    last = points[-1]
    stages = [stage for stage in handle.method.stages if stage.point.label == last.point and stage.tokens == "visual"]
    for item, kept in zip(last.items, last.kept, strict=True):
        row = found[item.row]
        row["kept"] += int(kept.numel())
        if setting.counted and stages and stages[-1].gate is None:
            row["asked"] = row.get("asked", 0) + min(stages[-1].budget.num_keep(item.num_tokens, item.num_frames), item.num_tokens)
    return found


def _flops(report: Report, rows: int) -> dict[str, Any]:
    """Prefill FLOPs of a row (the mean over the batch), split by where they are spent, and bytes in the cache."""
    flops = {name: value / rows for name, value in report.parts.items()}
    return {"flops": flops, "kv_bytes": report.kv_bytes_pruned // rows, "kv_bytes_dense": report.kv_bytes_dense // rows}


def _words(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return (line if isinstance(error, VlpruneError) else f"{type(error).__name__}: {line}")[:400]
