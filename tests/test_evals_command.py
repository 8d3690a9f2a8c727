"""`vlprune eval`: the list, one clear line for each mistake before a model is loaded, a small run, and what is shown while it runs."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from vlprune.cli import app
from vlprune.evals import benchmark, command, plots, worker
from vlprune.evals.benchmark import Benchmark, list_benchmarks
from vlprune.evals.evaluate import Request
from vlprune.evals.worker import ModelSpec, Plan
from vlprune.loading import ASSETS

TRAINED = (ASSETS / "model.safetensors").exists()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A benchmark that needs data and takes a judge, and an empty folder to work in."""
    card = Benchmark("own", "Own", "image", lambda source: [], lambda sample, answer: 0.0, source="a paper", layout="own.json and pictures/", judge=True)
    known = {**benchmark._found(), "own": card}
    monkeypatch.setattr(benchmark, "_found", lambda: known)
    monkeypatch.chdir(tmp_path)


# mistakes


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ModelSpec) -> Any:
        raise AssertionError("a model is loaded before the mistake is told")

    monkeypatch.setattr(worker.ModelSpec, "load", load)


MISTAKES = {
    "benchmark": (["--benchmarks", "digit"], ["unknown benchmark 'digit'", "Did you mean 'digits'"]),
    "no benchmark": (["--benchmarks", ","], ["no benchmarks in ','"]),
    "method": (["--methods", "hiprun"], ["unknown method 'hiprun'", "Did you mean 'hiprune'"]),
    "keep": (["--keep", "1/3,many"], ["keep 'many'", "a share such as 1/3"]),
    "keep above all": (["--keep", "1.5"], ["keep '1.5'", "at most 1"]),
    "keep nothing": (["--keep", "0"], ["keep '0'", "above 0"]),
    "no data": (["--benchmarks", "own"], ["own needs its files: --data own=FOLDER with own.json and pictures/"]),
    "folder": (["--benchmarks", "own", "--data", "own=nowhere"], ["there is no folder 'nowhere'", "own.json and pictures/"]),
    "folder of all": (["--benchmarks", "own", "--data", "nowhere"], ["'nowhere': there is no such folder"]),
    "name of data": (["--benchmarks", "own", "--data", "gqa=x"], ["'gqa' is not among the benchmarks own"]),
    "empty data": (["--benchmarks", "own", "--data", "own=."], ["own: no samples in ."]),
    "split": (["--split", "train"], ["digits makes its own samples"]),
    "sampling": (["--sampling", "all"], ["'all': one of uniform, fps, keyframes"]),
    "fps": (["--fps", "2"], ["--sampling fps and --fps N go together"]),
    "batches": (["--batches", "1,x"], ["--batches '1,x': whole numbers"]),
    "option": (["--option", "alpha=1"], ["write METHOD.KEY=VALUE"]),
    "option of none": (["--methods", "hiprune", "--option", "fastv.layer=2"], ["'fastv' is not among the methods hiprune"]),
    "judge": (["--judge", "nothing", "--benchmarks", "own"], ["--judge 'nothing': write MODULE:FUNCTION"]),
    "judge that is not there": (["--judge", "nothing.here:judge", "--benchmarks", "own"], ["--judge 'nothing.here:judge': ModuleNotFoundError"]),
    "judge that is none": (["--judge", "math:pi", "--benchmarks", "own"], ["it is no function, but float"]),
    "judge without open answers": (["--judge", "math:sqrt"], ["only open answers go to a judge, those of ", "own"]),
    "cluster": (["--ray", "nearby"], ["one of local, auto, HOST:PORT"]),
}


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, tmp_path: Path) -> None:
    """Exit code 2, nothing written."""
    arguments, words = MISTAKES[name]
    if name == "cluster":
        pytest.importorskip("ray")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in words:
        assert part in line
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_model")
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file, and a folder is needed" in run("--out", "file").stderr
    (tmp_path / "config.json").write_text("[]")
    assert "is not of vlprune eval" in run("--out", ".").stderr
    (tmp_path / "config.json").unlink()
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "digits.jsonl").write_text("{}\n")
    assert "holds answers, but no config.json" in run("--out", ".").stderr


# what works


def test_list() -> None:
    """Every benchmark with what it needs."""
    result = run("--list")
    assert result.exit_code == 0
    for name in [*list_benchmarks(), "own"]:
        assert name in result.stdout
    words = " ".join(result.stdout.split())
    assert "nothing" in words
    assert "own.json" in words


def test_sources() -> None:
    """One folder each, one for all, or the hub."""
    Path("all/own").mkdir(parents=True)
    assert command.sources_in(["own=x/y"], ["own"], None)["own"].folder == Path("x/y")
    assert command.sources_in(["own=hub:a/b"], ["own"], "dev")["own"].hub == "a/b"
    assert command.sources_in(["own=hub:a/b"], ["own"], "dev")["own"].split == "dev"
    assert command.sources_in(["all"], ["own"], None)["own"].folder == Path("all/own")
    assert command.sources_in(["all/own"], ["own", "digits"], None) == {"own": command.Source(Path("all/own"))}


@pytest.mark.skipif(not TRAINED, reason="the embedded model is not there")
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is printed and written, the folder named, the options of a method are used; lines instead of bars where no one looks."""
    monkeypatch.setattr(plots, "write", lambda out, found: None)
    arguments = ["--methods", "hiprune", "--keep", "64", "--limit", "4", "--no-costs", "--gallery", "1", "--option", "hiprune.alpha=0.2", "--draws", "2"]
    result = run(*arguments, "--out", "out")
    assert result.exit_code == 0, result.output
    for words in ("Digit scenes", "hiprune@64", "random: mean of 2 draws", "not comparable with full runs", "out/results.md, out/results.json, out/index.html"):
        assert words in " ".join(result.stdout.split())
    assert result.stderr.splitlines()[-1] == "Digit scenes: hiprune@64 (16 of 16)"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["tokens"]["mean"] for row in found["benchmarks"]["digits"]["rows"]] == [256, 64, 64]
    assert "- hiprune@64: alpha=0.2" in (tmp_path / "out" / "results.md").read_text()
    again = run(*arguments, "--out", "out")
    assert again.exit_code == 0
    assert again.stderr.splitlines() == ["Digit scenes (16 of 16)"]


def test_a_judge_beside_you_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the folder where the command is called; the path is left as it was."""
    (tmp_path / "my_judge_here.py").write_text("def says(sample, answer):\n    return 1.0 if 'yes' in answer else 0.25\n")
    from vlprune.evals.judge import judged, load_judge

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = list(sys.path)
    judge = load_judge("my_judge_here:says")
    assert judge is not None
    assert judged(judge, benchmark.Sample("a", "?", ("b",)), "oh yes") == 1.0
    assert sys.path == before


def test_the_printed_table_fits_a_terminal(tmp_path: Path) -> None:
    """Eighty columns, no cell broken; what is slower than dense and what failed is said."""
    from vlprune.evals.console_table import show

    def row(name: str, **more: Any) -> dict[str, Any]:
        change = {"change": -0.1234, "error": 0.02, "gained": 1, "lost": 5, "p": more.pop("p", 0.0312)}
        return {
            "row": name, "method": name.partition("@")[0], "keep": "2/9", "draws": 1, "options": "", "score": 0.876, "error": 0.0271, "failed": {},
            "kv_bytes": 1e6, **({} if name == "dense" else {"change": change}), "tokens": {"mean": 1024.0, "median": 1024, "most": 1024}, "speedup": 1.25,
            "flops": {"share": 0.812, "vision": 1e9, "scorer": 1e6, "decoder": 1e9, "total": 2e9}, "cost": {"ttft_ms": 1234.5}, **more,
        }  # fmt: skip

    rows = [row("dense"), row("random@2/9", draws=3, p=float("nan")), row("vflowopt@2/9", slower_than_dense=True, failed={"s": "too [big]"})]
    one = {"title": "T", "metric": "accuracy", "counted": 9, "samples": 10, "source": "s", "failed": {"x": "no file"}, "left_out": {"y": "why"}, "rows": rows}
    config = {"model": "m", "device": "CPU"}
    with (tmp_path / "printed").open("w") as file:
        average = [{"row": "random@2/9", "relative": 0.77, "benchmarks": 2}]
        show({"config": config, "command": "c", "limit": 10, "benchmarks": {"t": one, "u": one}, "average": average}, Console(file=file, width=80))
    lines = (tmp_path / "printed").read_text().splitlines()
    assert any(re.search(r"vflowopt@2/9 .* 87\.6 ± 2\.7 .* -12\.3 \(0\.031\) .* 1024 .* 81\.2 % .* 1234\.5 .* 1\.25", line) for line in lines), lines
    assert any("random@2/9 " in line and "-12.3 " in line and "nan" not in line for line in lines)
    text = "\n".join(lines)
    wanted = ["All together", "77.0 %", "not comparable", "9 of 10 samples", "slower than dense", "mean of 3 draws"]
    for words in [*wanted, "- failed to open: x: no file", "- y left out: why", "too [big]"]:
        assert words in text


# progress


def test_lines_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was answered in this run, not by what was there."""
    monkeypatch.setattr(command.time, "monotonic", lambda: 1000.0)
    assert command.time_left(900.0, 50, 60, 70) == ", about 0:01:40 left"
    assert command.time_left(1000.0, 50, 50, 70) == ""
    assert command.time_left(900.0, 50, 70, 70) == ""


class Slow:
    """An engine that is done in a moment, with answers that were made up."""

    def run(self, tasks: Any) -> Iterator[dict[str, Any]]:
        import time

        for task in tasks:
            for sample in task.samples:
                for label in task.lacking[sample.id]:
                    time.sleep(0.06)
                    yield {"setting": label, "id": sample.id, "answer": "1", "score": 1.0}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A terminal to write to, and a call that closes it and tells all that arrived there."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                return
            if not part:
                return
            seen.append(part)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stream = os.fdopen(theirs, "w", encoding="utf-8")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def close() -> str:
        stream.close()
        thread.join(30)
        assert not thread.is_alive(), "the terminal's reader met no end"
        return b"".join(seen).decode("utf-8")

    yield stream, close
    close()
    os.close(ours)


@pytest.mark.skipif(not TRAINED, reason="the embedded model is not there")
def test_a_terminal_gets_bars_with_the_time_left(terminal: tuple[Any, Callable[[], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Description, bar, count, time gone, time left; numbers that come nearer; and no lines in between."""
    monkeypatch.setattr(plots, "write", lambda out, found: None)
    plan = Plan(ModelSpec("embedded"), ("hiprune",), ("1/9",))
    request = Request(plan, ("digits",), out=tmp_path / "out", limit=12, costs=False, gallery=0)
    with (tmp_path / "printed").open("w") as file, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal[0])
        command.run(request, Console(file=file, width=150), engine=Slow())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal[1]())
    counts = [int(number) for number in re.findall(r"(\d+)/36", plain)]
    assert len(set(counts)) > 3, plain
    assert counts == sorted(counts)
    assert counts[-1] == 36
    assert "━" in plain
    assert re.search(r"Digit scenes: \S+ +[━╸╺ ]+ +\d+/36 0:00:0\d 0:00:0\d", plain), plain
    assert "are being loaded" in plain
    assert " of 36)" not in plain
    assert "Digit scenes" in (tmp_path / "printed").read_text()
