"""Samples over the workers of a Ray cluster: the same records as here, in order; killed workers cost no answer and no duplicate."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vlprune
from vlprune.errors import OptionError, VlpruneError

pytest.importorskip("ray")
pytest.importorskip("sklearn")
if not (Path(vlprune.__file__).parent / "assets" / "tiny_vlm" / "model.safetensors").exists():
    pytest.skip("the embedded model is not there", allow_module_level=True)

from vlprune.evals.benchmark import Benchmark, Sample, Source, get_benchmark, load_samples
from vlprune.evals.evaluate import Local, Request, Task, evaluate
from vlprune.evals.ray_engine import RayEngine, portable
from vlprune.evals.ray_work import TRIES, Work
from vlprune.evals.worker import ModelSpec, Plan, Worker

PLAN = Plan(ModelSpec("embedded"), ("hiprune",), ("1/9",), batch=2)
LABELS = ("dense", "random@1/9", "hiprune@1/9")


def tasks_of(card: Benchmark, samples: list[Sample], size: int = 2) -> list[Task]:
    parts = [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]
    return [Task(card, part, {sample.id: LABELS for sample in part}) for part in parts]


def digit_tasks(count: int) -> list[Task]:
    card = get_benchmark("digits")
    return tasks_of(card, load_samples(card, Source(count=count)))


def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a clock says."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(PLAN)


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    """Two workers on this machine."""
    made = RayEngine(PLAN, "local", 2)
    yield made
    made.close()


def test_a_killed_worker_costs_nothing(engine: RayEngine, worker: Worker) -> None:
    """Every record that this process would make, in its order, though workers are killed in the middle of their tasks."""
    tasks = digit_tasks(20)
    expected = plain(list(Local(worker).run(tasks)))
    found, killed = [], []
    for number, record in enumerate(engine.run(tasks)):
        found.append(record)
        if number in (4, 20):                                            # in turn, so both have something to do
            victim = next(pid for pid in engine.pids.values() if pid not in killed)
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
    assert plain(found) == expected
    assert len(found) == 20 * len(LABELS)
    assert not set(killed) & set(engine.pids.values())
    assert len(engine.pids) + len(engine._starting) == 2                 # replaced


class Deadly:
    """A picture that kills who opens it. It is a class of this module, which a worker need not find."""

    def __call__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)




@pytest.mark.slow
def test_a_sample_that_kills_its_workers_fails_by_name(engine: RayEngine) -> None:
    """It alone: its neighbour in the batch and everything else are answered. The benchmark is registered nowhere."""
    digits = load_samples(get_benchmark("digits"), Source(count=6))
    samples = [replace(sample, pictures=(Deadly(),)) if place == 3 else sample for place, sample in enumerate(digits)]
    card = Benchmark("own", "Own", "image", lambda source: samples, lambda sample, answer: float(answer in sample.answers), source="here", max_new_tokens=2)
    records = list(engine.run(tasks_of(card, samples)))
    keys = [(record["id"], record["setting"]) for record in records]
    assert sorted(keys) == sorted((sample.id, label) for sample in samples for label in LABELS)
    failed = [record for record in records if record.get("failed")]
    assert {record["id"] for record in failed} == {samples[3].id}
    assert [record["failed"] for record in failed] == ["open"] * 3
    assert f"{TRIES} workers in a row died over this" in failed[0]["error"]
    places = [next(number for number, task in enumerate(tasks_of(card, samples)) if record["id"] in task.lacking) for record in records]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_folder_written_through_ray_is_that_of_one_process(tmp_path: Path, worker: Worker, engine: RayEngine) -> None:
    """The answers byte for byte but for the seconds, and a second call asks nothing."""
    request = Request(PLAN, ("digits",), out=tmp_path / "ray", limit=12, costs=False, gallery=0)
    found = evaluate(request, worker=worker, engine=engine, command="x")
    here = evaluate(replace(request, out=tmp_path / "here"), worker=worker, command="x")
    for one in (found, here):
        for row in one["benchmarks"]["digits"]["rows"]:
            row.pop("seconds")
    assert str(found) == str(here)                                       # by their words: NaN is not NaN
    evaluate(request, worker=worker, engine=RayEngine(PLAN, "local", 99), command="x")        # is not even started


def test_what_becomes_of_a_task_whose_workers_die() -> None:
    """Blame narrows down: answers one by one, samples one by one, then the question that is next fails; without a dense answer the whole sample."""
    sample = [Sample(name, "?", ("a",)) for name in "xy"]
    work = Work.of(Task(get_benchmark("digits"), tuple(sample), dict.fromkeys("xy", LABELS)))
    answer = {"answer": "a", "score": 1.0}
    work.took([{"setting": "dense", "id": "x", **answer}])
    work.died("lightning")
    assert work.careful
    assert work.samples() == sample
    work.took([{"setting": "dense", "id": "x", **answer}, {"setting": "dense", "id": "y", **answer}])          # the first for a second time
    for _ in range(TRIES):
        work.died("lightning")
    assert work.samples() == sample[:1]
    for _ in range(TRIES):
        assert "random@1/9" in work.lacking["x"]
        work.died("lightning")
    assert work.lacking["x"] == ["hiprune@1/9"]
    late = [("hiprune@1/9", "x"), ("random@1/9", "y"), ("hiprune@1/9", "y")]
    work.took([{"setting": setting, "id": name, **answer} for setting, name in late])
    assert work.done
    keys = [(record["id"], record["setting"], record.get("failed")) for record in work.records]
    assert len(keys) == len(set(keys)) == 6
    assert [key for key in keys if key[2]] == [("x", "random@1/9", "run")]

    work = Work.of(Task(get_benchmark("digits"), (sample[0],), {"x": LABELS}))
    for _ in range(TRIES):
        work.died("lightning")
    assert work.done
    assert [record["failed"] for record in work.records] == ["open"] * 3


def test_what_travels() -> None:
    """The name of a registered benchmark; of one's own what a worker uses."""
    card = get_benchmark("digits")
    assert portable(card) == "digits"
    own = portable(replace(card, name="own", load=lambda source: [Sample("a" * 10**6, "", ())]))
    assert isinstance(own, Benchmark)
    assert own.load(Source()) == []
    assert own.score is card.score


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once where Ray itself would try for minutes."""
    with pytest.raises(OptionError, match="one of local, auto, HOST:PORT"):
        RayEngine(PLAN, "nearby")
    with pytest.raises(OptionError, match="nothing answers there"):
        list(RayEngine(PLAN, "127.0.0.1:1").run(digit_tasks(2)))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    __import__("vlprune.evals.ray_engine").evals.ray_engine._ray.cache_clear()
    with pytest.raises(VlpruneError, match=r"pip install 'vlprune\[ray\]'"):
        RayEngine(PLAN)


@pytest.mark.slow
def test_a_model_that_workers_cannot_load_is_told(engine: RayEngine) -> None:
    """Once, not over and over."""
    engine.close()                                                       # its workers hold the cores that another one waits for
    made = RayEngine(replace(PLAN, spec=ModelSpec("nowhere/at/all")), "local", 1)
    try:
        with pytest.raises(VlpruneError, match="cannot load 'nowhere/at/all': there is no model folder"):
            list(made.run(digit_tasks(2)))
    finally:
        made.close()
