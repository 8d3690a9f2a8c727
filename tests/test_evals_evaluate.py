"""A run of `vlprune.evals.evaluate`: what is asked in which order, what becomes of what fails, the numbers, and the files that are left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from vlprune.errors import OptionError
from vlprune.evals import plots, statistics, worker
from vlprune.evals.benchmark import Benchmark, Sample, Source, get_benchmark, load_samples
from vlprune.evals.evaluate import Request, evaluate
from vlprune.evals.settings import make_settings
from vlprune.evals.worker import ModelSpec, Plan, Worker
from vlprune.loading import ASSETS
from vlprune.video import write_video

if not (ASSETS / "model.safetensors").exists():
    pytest.skip("the embedded model is not there", allow_module_level=True)

PLAN = Plan(ModelSpec("embedded"), ("hiprune",), ("1/9",), batch=2)
LABELS = ["dense", "random@1/9", "hiprune@1/9"]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return ModelSpec("embedded").load()


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each."""
    if "files" not in request.node.name:
        monkeypatch.setattr(plots, "write", lambda out, found: None)


def samples_of(count: int) -> list[Sample]:
    return load_samples(get_benchmark("digits"), Source(count=count))


def benchmark(samples: list[Sample], score: Callable[[Sample, str], float] | None = None, **extra: Any) -> Benchmark:
    return Benchmark(
        "own", "Own", extra.pop("modality", "image"), lambda source: samples, score or get_benchmark("digits").score, source="here", max_new_tokens=2,
        embedded=True, **extra,
    )  # fmt: skip


def run(loaded: Any, out: Path, card: str | Benchmark, plan: Plan = PLAN, **options: Any) -> dict[str, Any]:
    request = Request(plan, (card,), out=out, costs=options.pop("costs", False), gallery=options.pop("gallery", 0), **options)
    return evaluate(request, worker=Worker(plan, loaded), command="the command")


def answers(out: Path, name: str = "own") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]


# order


@pytest.mark.parametrize("methods", [("hiprune",), ("hiprune", "random", "dense")])
def test_dense_and_random_are_first_asked_for_or_not(loaded: Any, tmp_path: Path, methods: tuple[str, ...]) -> None:
    """In the table and in time: each sample is asked under all settings before the next batch."""
    found = run(loaded, tmp_path, benchmark(samples_of(4)), replace(PLAN, methods=methods, keeps=("1/3", "1/9"), draws=2))
    rows = [row["row"] for row in found["benchmarks"]["own"]["rows"]]
    assert rows == ["dense", "random@1/3", "hiprune@1/3", "random@1/9", "hiprune@1/9"]
    asked = [record["setting"] for record in answers(tmp_path)]
    batch = ["dense", "random@1/3", "random@1/3#1", "hiprune@1/3", "random@1/9", "random@1/9#1", "hiprune@1/9"]
    assert asked == [label for _ in range(2) for label in batch for _ in range(2)]


def test_a_method_that_does_not_fit_is_listed_with_its_reason(loaded: Any, tmp_path: Path) -> None:
    found = run(loaded, tmp_path, benchmark(samples_of(2)), replace(PLAN, methods=("hiprune", "dycoke")))
    assert list(found["benchmarks"]["own"]["left_out"]) == ["dycoke"]
    assert "dycoke left out: " in (tmp_path / "results.md").read_text()


# failures


def test_a_broken_picture_is_that_samples_failure(loaded: Any, tmp_path: Path) -> None:
    """Named in the table, no one's wrong answer; the rest is asked. A mended file is asked again with retry."""
    samples = samples_of(5)
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\nnot much of a picture")
    samples[1] = replace(samples[1], pictures=(file,))
    samples[3] = replace(samples[3], pictures=(tmp_path / "gone.png",))
    out = tmp_path / "out"
    found = run(loaded, out, benchmark(samples))["benchmarks"]["own"]
    assert set(found["failed"]) == {samples[1].id, samples[3].id}
    assert "broken.png" in found["failed"][samples[1].id]
    assert "gone.png" in found["failed"][samples[3].id]
    assert (found["samples"], found["counted"]) == (5, 3)
    assert all(row["count"] == 3 and not row["failed"] for row in found["rows"])
    assert f"failed to open: {samples[1].id}: " in (out / "results.md").read_text()
    assert len(answers(out)) == 5 * 3

    samples_of(5)[1].pictures[0]().save(file)
    assert set(run(loaded, out, benchmark(samples))["benchmarks"]["own"]["failed"]) == {samples[1].id, samples[3].id}
    again = run(loaded, out, benchmark(samples), retry=True)["benchmarks"]["own"]
    assert set(again["failed"]) == {samples[3].id}
    assert again["counted"] == 4
    keys = [(record["setting"], record["id"]) for record in answers(out)]
    assert len(keys) == len(set(keys)) == 5 * 3


def test_a_broken_video_is_that_samples_failure(loaded: Any, tmp_path: Path) -> None:
    """Its file is named; its neighbour in the batch is answered."""
    pytest.importorskip("av")
    whole = write_video(tmp_path / "whole.avi", [np.full((64, 64, 3), 20 * number, np.uint8) for number in range(6)])
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[:400])
    samples = [Sample(name, "how many digits are there ?", ("0",), video=tmp_path / f"{name}.avi") for name in ("whole", "cut")]
    found = run(loaded, tmp_path / "out", benchmark(samples, modality="video"))["benchmarks"]["own"]
    assert list(found["failed"]) == ["cut"]
    assert "cut.avi" in found["failed"]["cut"]
    assert [row["count"] for row in found["rows"]] == [1, 1, 1]


def test_a_method_that_fails_on_a_sample_is_wrong_there_and_nowhere_else(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, whole = samples_of(4), Worker._generate

    def sometimes(self: Worker, card: Benchmark, setting: Any, part: Any, inputs: Any) -> Any:
        if setting.label == "hiprune@1/9" and any(entry.sample.id == samples[2].id for entry in part):
            raise RuntimeError("no room\nfor this")
        return whole(self, card, setting, part, inputs)

    monkeypatch.setattr(Worker, "_generate", sometimes)
    found = run(loaded, tmp_path, benchmark(samples, lambda sample, answer: 1.0))["benchmarks"]["own"]
    assert found["failed"] == {}
    assert [row["score"] for row in found["rows"]] == [1.0, 1.0, 0.75]
    assert [row["failed"] for row in found["rows"]] == [{}, {}, {samples[2].id: "RuntimeError: no room for this"}]
    assert "hiprune@1/9 failed on 1 samples, which count as wrong: RuntimeError: no room for this" in (tmp_path / "results.md").read_text()


# counts


def test_the_kept_number_is_that_asked_for(loaded: Any, tmp_path: Path) -> None:
    run(loaded, tmp_path, benchmark(samples_of(2)), replace(PLAN, keeps=("1/9", "64")))
    kept = {record["setting"]: record["kept"] for record in answers(tmp_path) if "kept" in record}
    assert kept == {"random@1/9": 28, "hiprune@1/9": 28, "random@64": 64, "hiprune@64": 64}


def test_a_method_that_keeps_another_number_is_reported(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one sample only: it is named."""
    samples, real = samples_of(3), worker._counts
    calls = iter(range(100))

    def wrong(handle: Any, setting: Any, rows: int) -> list[dict[str, Any]]:
        found = real(handle, setting, rows)
        if setting.method == "hiprune" and next(calls) == 0:
            found[1]["kept"] += 1
        return found

    monkeypatch.setattr(worker, "_counts", wrong)
    found = run(loaded, tmp_path, benchmark(samples))["benchmarks"]["own"]
    assert [row["tokens"]["as_asked"] for row in found["rows"]] == [True, True, False]
    assert found["rows"][2]["tokens"]["not_as_asked"] == [samples[1].id]
    assert f"hiprune@1/9 was not left with the tokens asked for: {samples[1].id}" in (tmp_path / "results.md").read_text()


def test_what_is_counted_is_what_the_decoder_sees(loaded: Any) -> None:
    """The number in the record is that of keys in the cache of the last layer, less the words."""
    import vlprune

    card = get_benchmark("digits")
    one = Worker(PLAN, loaded)
    (sample,) = samples_of(1)
    records = {record["setting"]: record for record in one.answer(card, [sample], {sample.id: LABELS})}
    setting = next(setting for setting in make_settings(loaded.model, ["hiprune"], ["1/9"], "image")[0] if setting.method == "hiprune")
    inputs = loaded.inputs(sample.question, [sample.pictures[0]()])
    with torch.no_grad(), vlprune.apply(loaded.model, setting.built):
        cache = loaded.model(**inputs, use_cache=True).past_key_values
    words = int((inputs["input_ids"] != loaded.model.config.image_token_id).sum())
    assert cache.layers[-1].keys.shape[-2] - words == records["hiprune@1/9"]["kept"]


# the folder


def test_another_config_is_refused_in_words(loaded: Any, tmp_path: Path) -> None:
    """And nothing is changed or asked."""
    card = benchmark(samples_of(2))
    run(loaded, tmp_path, card)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="holds answers to something else: seed was 0 and is 1") as refused:
        run(loaded, tmp_path, card, seed=1)
    assert "Choose another --out" in str(refused.value)
    with pytest.raises(OptionError, match="batch was 2 and is 1"):
        run(loaded, tmp_path, card, replace(PLAN, batch=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_methods_and_keeps_may_be_added(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is new is asked, and the numbers are those of one whole run."""
    card, more = benchmark(samples_of(3)), replace(PLAN, keeps=("1/3", "1/9"))
    run(loaded, tmp_path / "a", card)
    before = answers(tmp_path / "a")
    run(loaded, tmp_path / "a", card, more)
    after = answers(tmp_path / "a")
    assert after[: len(before)] == before
    assert {record["setting"] for record in after[len(before) :]} == {"random@1/3", "hiprune@1/3"}
    run(loaded, tmp_path / "b", card, more)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")


def timeless(out: Path) -> Any:
    found = json.loads((out / "results.json").read_text())
    for row in found["benchmarks"]["own"]["rows"]:
        row.pop("seconds")
    return json.dumps(found)


def test_limit_is_marked_and_spread(loaded: Any, tmp_path: Path) -> None:
    samples = samples_of(6)
    found = run(loaded, tmp_path, benchmark(samples), limit=2)
    assert found["limit"] == 2
    assert {record["id"] for record in answers(tmp_path)} == {samples[0].id, samples[3].id}
    for file in ("results.md", "index.html"):
        assert "not comparable with full runs" in (tmp_path / file).read_text()
    run(loaded, tmp_path / "full", benchmark(samples))
    for file in ("results.md", "index.html"):
        assert "not comparable with full runs" not in (tmp_path / "full" / file).read_text()


def test_the_files_of_a_folder(loaded: Any, tmp_path: Path) -> None:
    """All of them; numbers in the JSON are those in the table; costs at the batch sizes; the page needs no other file and shows samples."""
    found = run(loaded, tmp_path, benchmark(samples_of(2)), costs=True, batches=(1, 2), gallery=1)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pictures = {"own_score.png", "own_latency.png", "own_pareto.png"}
    assert names == {"config.json", "costs.jsonl", "results.json", "results.md", "index.html", "answers/own.jsonl", *pictures}
    assert json.dumps(json.loads((tmp_path / "results.json").read_text())) == json.dumps(found)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"model", "dtype", "device", "seed", "frames", "vlprune", "torch", "transformers", "python"} <= set(config)
    table = (tmp_path / "results.md").read_text()
    for row in found["benchmarks"]["own"]["rows"]:
        cost = row["cost"]
        assert {"ttft_ms", "decode_ms", "per_second_1", "per_second_2", "kv_bytes_stored", "peak_bytes"} <= set(cost)
        assert f"| {row['row']}" in table
        assert f"{cost['ttft_ms']:.1f} |" in table
        assert cost["kv_bytes_stored"] == pytest.approx(row["kv_bytes"])
    for picture in pictures:
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
        assert f"]({picture})" in table
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/png;base64,") == 3
    assert text.count("data:image/jpeg;base64,") >= 3                    # a sample under every setting


# statistics


def test_errors_and_changes_are_those_of_scipy(loaded: Any, tmp_path: Path) -> None:
    """Scores of a real run, with made-up verdicts that depend on the answers and the setting alike."""
    stats = pytest.importorskip("scipy.stats")
    samples = samples_of(12)
    found = run(loaded, tmp_path, benchmark(samples), replace(PLAN, keeps=("1/16",)))["benchmarks"]["own"]
    scores = {label: [next(record["score"] for record in answers(tmp_path) if (record["setting"], record["id"]) == (label, sample.id)) for sample in samples]
              for label in ("dense", "random@1/16", "hiprune@1/16")}  # fmt: skip
    assert len(set(scores["random@1/16"])) == 2, "all right or all wrong says nothing"
    for row in found["rows"]:
        own = scores[row["row"]]
        assert row["score"] == pytest.approx(np.mean(own))
        assert row["error"] == pytest.approx(stats.sem(own))
        if row["method"] != "dense":
            change = np.subtract(own, scores["dense"])
            assert row["change"]["change"] == pytest.approx(change.mean())
            assert row["change"]["error"] == pytest.approx(stats.sem(change))
            gained, lost = int((change > 0).sum()), int((change < 0).sum())
            assert (row["change"]["gained"], row["change"]["lost"]) == (gained, lost)
            assert row["change"]["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)


def test_sign_test_by_hand_and_by_scipy() -> None:
    assert statistics.sign_test(0, 5) == pytest.approx(2 * 0.5**5)
    assert statistics.sign_test(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert statistics.sign_test(3, 3) == 1.0
    assert statistics.sign_test(0, 0) == 1.0
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for gained, lost in rng.integers(0, 300, (60, 2)).tolist():
        if gained + lost:
            assert statistics.sign_test(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_averages_by_hand() -> None:
    assert statistics.relative_average([0.4, 0.9], [0.8, 0.9]) == pytest.approx(0.75)
    assert statistics.relative_average([0.4, 0.9], [0.8, 0.0]) == pytest.approx(0.5)
    assert math.isnan(statistics.relative_average([1.0], [0.0]))
    one = statistics.mean_of([0.0, 1.0, 1.0, 1.0])
    assert one.error == pytest.approx(math.sqrt(((0.75**2) + 3 * 0.25**2) / 3 / 4))


# a judge


def test_a_judge_has_the_last_word_on_open_answers(loaded: Any, tmp_path: Path) -> None:
    """Only where the benchmark says so; what matching says is kept, and another judge's answers are not mixed in."""
    seen: list[tuple[str, str]] = []

    def judge(sample: Sample, answer: str) -> float:
        seen.append((sample.id, answer))
        return 0.5

    samples = samples_of(2)
    plan = replace(PLAN, judge=judge)
    found = run(loaded, tmp_path / "a", benchmark(samples, judge=True), plan)
    assert [row["score"] for row in found["benchmarks"]["own"]["rows"]] == [0.5] * 3
    assert len(seen) == 2 * 3
    assert {record["matched"] for record in answers(tmp_path / "a")} <= {0.0, 1.0}
    table = (tmp_path / "a" / "results.md").read_text()
    assert "judged accuracy" in table
    assert "judge tests.test_evals_evaluate:" in table
    with pytest.raises(OptionError, match=r"judge was .* and is None"):
        run(loaded, tmp_path / "a", benchmark(samples, judge=True))
    seen.clear()
    run(loaded, tmp_path / "b", benchmark(samples), plan)
    assert not seen
    assert "judged" not in (tmp_path / "b" / "results.md").read_text()


@pytest.mark.parametrize("said", [7, None, math.nan])
def test_a_judge_that_says_no_share_fails_the_sample(loaded: Any, tmp_path: Path, said: Any) -> None:
    found = run(loaded, tmp_path, benchmark(samples_of(1), judge=True), replace(PLAN, judge=lambda sample, answer: said))
    assert all(f"the judge said {said!r}" in next(iter(row["failed"].values())) for row in found["benchmarks"]["own"]["rows"])


# bars


def test_progress_counts_every_answer_and_what_was_there(loaded: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def go(count: int) -> None:
        told.clear()
        request = Request(PLAN, (benchmark(samples_of(4)[:count]),), out=tmp_path, costs=False, gallery=0)
        evaluate(request, worker=Worker(PLAN, loaded), progress=lambda done, total, words: told.append((done, total)), command="x")

    go(2)
    assert told == [(done, 6) for done in range(7)]
    go(4)
    assert told == [(done, 12) for done in range(6, 13)]


def test_a_stopped_run_has_written_what_it_had(loaded: Any, tmp_path: Path) -> None:
    """An answer is on disk before the next one is asked for."""

    class Stops:
        def run(self, tasks: Any) -> Iterator[dict[str, Any]]:
            for task in tasks:
                for number, record in enumerate(Worker(PLAN, loaded).answer(task.benchmark, task.samples, task.lacking)):
                    assert len(answers(tmp_path)) == number
                    yield record
                    if number == 3:
                        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Request(PLAN, (benchmark(samples_of(4)),), out=tmp_path, costs=False), worker=Worker(PLAN, loaded), engine=Stops(), command="x")
    assert len(answers(tmp_path)) == 4
