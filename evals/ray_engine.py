"""Samples spread over the workers of a Ray cluster, each with a model of its own: ``vlprune eval --ray local``, or ``auto``, or an address.

This process alone writes answers. A worker is asked for the answers to a few samples, a second's worth at a time, so what a dying worker takes with it is
that second: the rest of its task goes to another one. Records come in the order of the tasks. At most a few tasks a worker are handed out ahead of the
oldest that is not done, so neither this process nor a worker ever holds more than that many tasks or answers.

A worker that dies (killed, out of memory, its machine gone) is replaced; `vlprune.evals.ray_work` says what becomes of its task.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import vlprune
from vlprune.errors import OptionError, VlpruneError
from vlprune.evals import benchmark as benchmarks
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.evaluate import Task
from vlprune.evals.ray_work import TRIES, Work
from vlprune.evals.worker import Plan, Worker

AHEAD = 4               # tasks a worker that may be handed out before the oldest is done
SLICE = 1.0             # seconds of answers that a worker gathers before it hands them in
STORE = 128 << 20       # bytes of a local cluster's shared memory: what is sent are questions and answers
PATIENCE = 60.0         # seconds until it is said that no worker is there yet


class _Asker:
    """What runs on a worker: the model, and the task that it is at."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.records: Iterator[dict[str, Any]] = iter(())

    def ready(self) -> tuple[int, str]:
        """Load the model; process id and version."""
        self.worker = Worker(self.plan)
        return os.getpid(), vlprune.__version__

    def ask(self, card: str | Benchmark, samples: Sequence[Sample], lacking: Mapping[str, Sequence[str]], seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """Begin a task; see `more`."""
        self.records = self.worker.answer(benchmarks.get_benchmark(card), samples, lacking)
        return self.more(seconds)

    def more(self, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """The records of the next so many seconds, at least one; and whether there are more."""
        begun, found = time.monotonic(), []
        for record in self.records:
            found.append(record)
            if time.monotonic() - begun >= seconds:
                return found, True
        return found, False


@dataclass(frozen=True)
class _Asked:
    """What a worker is at."""

    actor: Any
    work: Work
    ids: tuple[str, ...]                                                 # samples


class RayEngine:
    """The engine of `vlprune.evals.evaluate` on a Ray cluster. The cluster is reached, or started, when the first task is handed out.

    Args:
        plan: what every worker loads.
        address: ``"local"`` starts a cluster on this machine, for as long as this engine lives; ``"auto"`` finds the one that runs here; else
            ``"HOST:PORT"`` of its head, or ``"ray://HOST:PORT"`` of its client server. vlprune must be installed on its machines, in this version, and the
            files of the samples must lie at the same places.
        workers: models in the cluster; one for each GPU if not given, two on a cluster without.

    Raises:
        VlpruneError: Ray is not installed.
    """

    def __init__(self, plan: Plan, address: str = "local", workers: int | None = None) -> None:
        _ray()
        if address not in ("local", "auto") and ":" not in address:
            raise OptionError(f"--ray {address!r}: one of local, auto, HOST:PORT, ray://HOST:PORT")
        if workers is not None and workers < 1:
            raise OptionError(f"--workers {workers}: at least one")
        self.plan, self.address, self.workers = plan, address, workers
        self.pids: dict[Any, int] = {}                                   # of living workers
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}                              # actor by the reference that it is ready
        self._failed_starts = 0
        self._ours, self._most = False, 0
        self._resources: dict[str, Any] = {}

    def run(self, tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
        """The records of every task, task by task.

        Raises:
            OptionError: there is no such cluster, or no room in it.
            VlpruneError: its workers cannot load the model, or run another vlprune.
        """
        ray, todo = _ray(), deque(tasks)
        if not todo:
            return
        most = self._connect()
        for _ in range(most - len(self._idle) - len(self._starting)):
            self._hire()
        line: deque[Work] = deque()                                     # handed out, oldest first
        again: deque[Work] = deque()                                    # of these, what a dead worker left
        busy: dict[Any, _Asked] = {}
        told = time.monotonic() + PATIENCE
        try:
            while todo or line:
                while self._idle and (again or (todo and len(line) < AHEAD * most)):
                    if not again:
                        line.append(Work.of(todo.popleft()))
                    work = again.popleft() if again else line[-1]
                    asked = _Asked(self._idle.pop(0), work, tuple(sample.id for sample in work.samples()))
                    busy[self._ask(asked.actor, work)] = asked
                while line and (line[0].records or line[0].done):
                    yield from _emptied(line[0].records)
                    if line[0].done:
                        line.popleft()
                    else:
                        break
                if not (busy or self._starting):
                    continue                                             # everything is done, or there is someone idle for what is not
                ready = ray.wait([*busy, *self._starting], num_returns=1, timeout=PATIENCE)[0]
                if not ready and not busy and time.monotonic() > told:
                    told = time.monotonic() + 10 * PATIENCE
                    print("no worker is ready yet: the model is being loaded, or the cluster has no room", file=sys.stderr, flush=True)
                for reference in ready:
                    if reference in self._starting:
                        self._started(reference)
                    else:
                        self._answered(reference, busy.pop(reference), busy, again)
        finally:
            for asked in busy.values():                                      # an error, or nobody wants the rest
                self._drop(asked.actor)

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started for them."""
        ray = _ray()
        for actor in [*self._idle, *self._starting.values()]:
            self._drop(actor)
        self._idle, self._starting = [], {}
        if self._ours:
            ray.shutdown()
        self._ours, self._most = False, 0

    # workers

    def _answered(self, reference: Any, asked: _Asked, busy: dict[Any, _Asked], again: deque[Work]) -> None:
        ray, actor, work = _ray(), asked.actor, asked.work
        try:
            records, more = ray.get(reference)
        except ray.exceptions.RayTaskError as error:                     # not a death: what a worker raises is a mistake in the task
            self._drop(actor)
            cause = error.cause if isinstance(getattr(error, "cause", None), VlpruneError) else None
            raise cause or VlpruneError(f"a worker could not do its task: {_line(error)}") from error
        except ray.exceptions.RayError as error:
            self._drop(actor)
            self._hire()
            work.died(_line(error))
            if not work.done:
                again.append(work)
            return
        work.took(records)
        left = [name for name in asked.ids if work.lacking[name]]
        if left and more:
            busy[self._remote(actor, "more", 0.0 if work.careful else SLICE)] = asked
            return
        self._idle.append(actor)
        if left:
            lost = ", ".join(work.lacking[left[0]])
            raise VlpruneError(f"a worker gave no answer to {left[0]!r} of {work.task.benchmark.name} under {lost}: its methods are not those here")
        if not work.done:
            again.append(work)                                           # the next of the samples that are asked one by one

    def _ask(self, actor: Any, work: Work) -> Any:
        samples = work.samples()
        lacking = {sample.id: tuple(work.lacking[sample.id]) for sample in samples}
        try:
            return self._remote(actor, "ask", portable(work.task.benchmark), samples, lacking, 0.0 if work.careful else SLICE)
        except (TypeError, AttributeError) as error:
            self._drop(actor)
            raise VlpruneError(f"samples of {work.task.benchmark.name} cannot be sent to workers: {_line(error)}") from error

    @staticmethod
    def _remote(actor: Any, name: str, *arguments: Any) -> Any:
        return getattr(actor, name).remote(*arguments)

    def _hire(self) -> None:
        ray = _ray()
        spec = self.plan.spec
        inside = "cuda" if self._resources["num_gpus"] and spec.device.startswith("cuda") else spec.device     # a worker sees its own GPU only
        actor = ray.remote(_Asker).options(**self._resources, max_restarts=0).remote(replace(self.plan, spec=replace(spec, device=inside)))
        self._starting[actor.ready.remote()] = actor

    def _started(self, reference: Any) -> None:
        ray, actor = _ray(), self._starting.pop(reference)
        try:
            pid, version = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._drop(actor)
            self._failed_starts += 1
            raised = isinstance(error, ray.exceptions.RayTaskError)
            if raised or self._failed_starts >= TRIES:
                why = _line(error.cause if raised and error.cause is not None else error)
                raise VlpruneError(f"workers of the cluster cannot load {self.plan.spec.name!r}: {why}") from error
            self._hire()
            return
        if version != vlprune.__version__:
            self._drop(actor)
            raise VlpruneError(f"workers of the cluster run vlprune {version}, and this is {vlprune.__version__}: install the same on both")
        self._failed_starts = 0
        self.pids[actor] = pid
        self._idle.append(actor)

    def _drop(self, actor: Any) -> None:
        self.pids.pop(actor, None)
        with contextlib.suppress(Exception):
            _ray().kill(actor)

    # the cluster

    def _connect(self) -> int:
        """How many workers there are to be."""
        if self._most:
            return self._most
        ray = _ray()
        place = self.plan.spec.device
        if self.address != "local":
            _reach(self.address)
        if not ray.is_initialized():                                     # a user's own session is used, and left alone
            self._start(ray)
            self._ours = True
        total = ray.cluster_resources()
        gpus = 0 if place == "cpu" else int(total.get("GPU", 0))
        workers = self.workers or gpus or 2
        cores = int(total.get("CPU", 1))
        room = gpus if gpus else cores
        if workers > room:
            self.close()
            raise OptionError(f"--workers {workers}: the cluster has room for {room}, by its {'GPUs' if gpus else 'CPU cores'}")
        self._resources = {"num_gpus": int(gpus > 0), "num_cpus": max(1, cores // workers) if self.address == "local" else 1}
        self._most = workers
        return workers

    def _start(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == "local":
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            cores = max(os.cpu_count() or 1, self.workers or 2)          # workers that share a core are slow, but they work
            ray.init(address="local", num_cpus=cores, num_gpus=gpus, include_dashboard=False, object_store_memory=STORE, **quiet)
            return
        try:
            ray.init(address=self.address, **quiet)
        except Exception as error:                                       # Ray has no common class for these
            raise OptionError(f"--ray {self.address!r}: {_line(error)}") from error


@functools.cache
def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise VlpruneError("a cluster needs Ray, which is not installed: pip install 'vlprune[ray]'") from error
    return ray


def _reach(address: str) -> None:
    """Ray itself would try for ever."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise OptionError(f"--ray {address!r}: nothing answers there ({error})") from error


def portable(card: Benchmark) -> str | Benchmark:
    """What a worker needs of a benchmark: the name of a registered one; of one's own its score, in full, as a worker may not find its module."""
    if benchmarks._found().get(card.name) is card:
        return card.name
    module = sys.modules.get(getattr(card.score, "__module__", None) or "")
    if module is not None and module.__name__ != "__main__" and module.__name__.partition(".")[0] != "vlprune":
        _ray().cloudpickle.register_pickle_by_value(module)
    return replace(card, load=_nothing, summary=None)


def _nothing(source: Source) -> list[Sample]:
    return []


def _emptied(records: deque[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Take them out one by one."""
    while records:
        yield records.popleft()


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines and lines[0].startswith(("\x1b[36mray::", "ray::")) else " ".join(lines) or type(error).__name__)[:300]
