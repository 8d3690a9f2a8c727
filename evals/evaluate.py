"""`vlprune eval`: methods over benchmarks, dense and random first, into one results folder that goes on where it was stopped.

    vlprune eval --model embedded --benchmarks digits --methods dense,random,hiprune --keep 1/3,1/9 --out out/eval

Every sample is opened once and asked under every setting before the next one, so the table is comparable at any moment. The folder holds ``config.json``,
``answers/BENCHMARK.jsonl`` (an answer a line), ``costs.jsonl``, ``results.json``, ``results.md``, plots and ``index.html``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

import vlprune
from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source, get_benchmark, load_samples
from vlprune.evals.journal import Journal, write_whole
from vlprune.evals.judge import judge_name
from vlprune.evals.worker import Plan, Worker


@dataclass(frozen=True)
class Task:
    """A batch of samples for a worker, with the labels of the settings that lack an answer, by sample id; of some that may be none."""

    benchmark: Benchmark
    samples: tuple[Sample, ...]
    lacking: Mapping[str, tuple[str, ...]]


class Engine(Protocol):
    """Where tasks are done. Records come in the order of the tasks."""

    def run(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """The records of every task."""
        ...


@dataclass
class Local:
    """This process."""

    worker: Worker

    def run(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """One task after the other; records as they are made."""
        for task in tasks:
            yield from self.worker.answer(task.benchmark, task.samples, task.lacking)


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        plan: model, methods, keeps.
        benchmarks: names, or benchmarks of your own.
        sources: where each benchmark is read from, by name; benchmarks that need no data may be left out.
        out: the results folder.
        limit: samples of each benchmark at most, evenly spread; results are marked as not comparable with full ones.
        retry: ask samples again that failed.
        costs: whether latency, throughput and memory are measured.
        batches: batch sizes of the throughput.
        gallery: samples whose pictures are shown on the page.
    """

    plan: Plan
    benchmarks: tuple[str | Benchmark, ...]
    sources: Mapping[str, Source] = field(default_factory=dict)
    out: Path = Path("out/eval")
    limit: int | None = None
    seed: int = 0
    retry: bool = False
    costs: bool = True
    batches: tuple[int, ...] = (1, 8, 32)
    gallery: int = 3


#: ``(done, total, words)``
Progress = Callable[[int, int, str], None]


def evaluate(
    request: Request, *, worker: Worker | None = None, engine: Engine | None = None, progress: Progress = lambda done, total, words: None, command: str = ""
) -> dict[str, Any]:
    """Ask everything that is not answered yet, and write the results folder.

    Args:
        request: what is asked for.
        worker: a worker with the model of ``request.plan``; made if not given.
        engine: where the samples are asked; this process if not given.
        progress: called with every answer.
        command: for the results; the words of this process if not given.

    Returns:
        What is in ``results.json``.

    Raises:
        OptionError: a name or value that does not exist, or a folder that holds answers to something else; nothing is asked then.
    """
    cards = [get_benchmark(name) for name in request.benchmarks]
    config = check_folder(request.out, describe(request))                # before samples are made, which takes a while
    samples = {card.name: load_samples(card, _source(request, card)) for card in cards}
    worker = Worker(request.plan) if worker is None else worker
    settings = {card.name: worker.settings(card) for card in cards}
    (request.out / "answers").mkdir(parents=True, exist_ok=True)
    write_whole(request.out / "config.json", json.dumps(config, indent=1) + "\n")
    journals = {card.name: Journal(request.out / "answers" / f"{card.name}.jsonl") for card in cards}
    try:
        for card in cards:
            journal = journals[card.name]
            if request.retry:
                failed = [(record["setting"], record["id"]) for record in journal.records() if record.get("failed")]
                if failed:
                    journal.forget(failed)
            tasks = list(make_tasks(card, samples[card.name], [one.label for one in settings[card.name][0]], journal, request.plan.batch))
            todo = sum(len(labels) for task in tasks for labels in task.lacking.values())
            total, done = len(samples[card.name]) * len(settings[card.name][0]), 0
            progress(total - todo, total, card.title)
            for record in (engine or Local(worker)).run(tasks):
                journal.add(record)
                done += 1
                progress(total - todo + done, total, f"{card.title}: {record['setting']}")
        from vlprune.evals import results

        costs = measure_costs(request, worker, cards, samples, settings, progress) if request.costs else {}
        found = results.collect(request, config, cards, samples, settings, journals, costs, command or shlex.join(["vlprune", *sys.argv[1:]]))
        results.write(request, found, worker, cards, samples, settings)
        return found
    finally:
        for journal in journals.values():
            journal.close()


def make_tasks(card: Benchmark, samples: Sequence[Sample], labels: Sequence[str], journal: Journal, batch: int) -> Iterator[Task]:
    """The batches in which something is not answered yet, whole, so that they are put together as they were before."""
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        lacking = {sample.id: tuple(label for label in labels if (label, sample.id) not in journal) for sample in part}
        if any(lacking.values()):
            yield Task(card, tuple(part), lacking)


def measure_costs(
    request: Request, worker: Worker, cards: Sequence[Benchmark], samples: Mapping[str, Sequence[Sample]], settings: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Latency, throughput and memory of every setting, on the first sample of each kind of input that can be opened."""
    from vlprune.evals.costs import Meter

    meter = Meter(request.out / "costs.jsonl", worker, request.batches)
    try:
        return {card.name: meter.measure(card, samples[card.name], settings[card.name][0], progress) for card in cards}
    finally:
        meter.close()


def describe(request: Request) -> dict[str, Any]:
    """What answers depend on: they are never mixed with answers to something else."""
    import transformers

    plan = request.plan
    place = "cuda" if plan.spec.device == "auto" and torch.cuda.is_available() else "cpu" if plan.spec.device == "auto" else plan.spec.device
    name = torch.cuda.get_device_name() if place.startswith("cuda") and torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "model": plan.spec.name, "dtype": plan.spec.dtype, "device": name, "frames": asdict(plan.frames), "seed": request.seed, "batch": plan.batch,
        "judge": judge_name(plan.judge),
        "data": {card.name: _place(_source(request, card)) for card in map(get_benchmark, request.benchmarks) if not card.embedded},
        "options": {key: {name: repr(value) for name, value in given.items()} for key, given in plan.options.items()},
        "vlprune": vlprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def check_folder(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A folder is continued only with the same model, frames, seed, versions and data; benchmarks may be added. The config with those of before."""
    path = out / "config.json"
    folder = next(place for place in (out, *out.parents) if place.exists())
    if not folder.is_dir():
        raise OptionError(f"--out {str(out)!r}: {str(folder)!r} is a file, and a folder is needed")
    if not os.access(folder, os.W_OK):
        raise OptionError(f"--out {str(out)!r}: {str(folder)!r} cannot be written to")
    if not path.exists():
        if out.exists() and any((out / "answers").glob("*.jsonl")):
            raise OptionError(f"{str(out)!r} holds answers, but no config.json that says of what. Choose another --out.")
        return config
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{str(path)!r} is no JSON: {error}. Choose another --out.") from error
    places = known.get("data") if isinstance(known, dict) else None
    if not isinstance(known, dict) or not isinstance(places, dict):
        raise OptionError(f"{str(path)!r} is not of vlprune eval. Choose another --out.")
    config = {**config, "data": {**places, **config["data"]}}
    known["data"] = {**config["data"], **places}                        # a benchmark more is no other data
    other = {name: (known.get(name), value) for name, value in config.items() if known.get(name) != value}
    if other:
        words = "; ".join(f"{name} was {before!r} and is {now!r}" for name, (before, now) in other.items())
        raise OptionError(f"{str(out)!r} holds answers to something else: {words}. Choose another --out, or remove this folder.")
    return config


def _source(request: Request, card: Benchmark) -> Source:
    given = request.sources.get(card.name, Source(hub=card.default_hub))
    if not card.embedded and given.folder is None and given.hub is None:
        raise OptionError(f"{card.name} needs its files: --data {card.name}=FOLDER with {card.layout}")
    if given.folder is not None and not given.folder.exists():
        raise OptionError(f"{card.name}: there is no folder {str(given.folder)!r}. It reads: {card.layout}")
    return Source(given.folder, given.hub, given.split, request.seed, request.limit)


def _place(source: Source) -> str:
    place = f"hub:{source.hub}" if source.folder is None else str(source.folder)
    return place if source.split is None else f"{place}, split {source.split}"
