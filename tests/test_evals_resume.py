"""`vlprune eval` killed with SIGKILL at random moments goes on where it was, and ends with the numbers of a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from vlprune.cli import app
from vlprune.evals.journal import Journal
from vlprune.loading import ASSETS

if not (ASSETS / "model.safetensors").exists():
    pytest.skip("the embedded model is not there", allow_module_level=True)
if not hasattr(signal, "SIGKILL"):
    pytest.skip("no SIGKILL on this system", allow_module_level=True)

SHORT = ["eval", "--methods", "hiprune,fastv", "--keep", "1/9", "--limit", "16", "--batch", "2", "--no-costs", "--gallery", "0"]
LONG = ["eval", "--methods", "hiprune,fastv,todre", "--keep", "1/3,1/9", "--limit", "24", "--batch", "3", "--batches", "1,2", "--gallery", "1", "--draws", "2"]
CLOCK = {"seconds", "cost", "speedup", "slower_than_dense", "efficiency", "command"}


def finish(arguments: list[str], out: Path) -> None:
    """In this process: the model is loaded, the modules are there."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output


def kill(arguments: list[str], out: Path, seconds: float, from_first_answer: bool) -> tuple[bool, float]:
    """Start the command as a user does, and kill it. Whether that was in time, and how long it had run."""
    file = out / "answers" / "digits.jsonl"
    known = file.stat().st_size if file.exists() else 0
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "vlprune.cli", *arguments, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while from_first_answer and process.poll() is None and (not file.exists() or file.stat().st_size == known):
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        alive = process.poll() is None
        process.kill()
        process.wait()
    return alive, time.monotonic() - begun


def numbers(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items() if key not in CLOCK}
    return [numbers(entry) for entry in value] if isinstance(value, list) else value


def same(one: Path, other: Path) -> None:
    """Numbers, answers one for one, no key twice, and whole files."""
    found = [json.loads((out / "results.json").read_text()) for out in (one, other)]
    assert json.dumps(numbers(found[0]), sort_keys=True) == json.dumps(numbers(found[1]), sort_keys=True)
    records = [[json.loads(line) for line in (out / "answers" / "digits.jsonl").read_text().splitlines()] for out in (one, other)]
    keys = [[(record["setting"], record["id"]) for record in lines] for lines in records]
    assert len(keys[0]) == len(set(keys[0]))
    assert set(keys[0]) == set(keys[1])
    by_key = [{(record["setting"], record["id"]): numbers(record) for record in lines} for lines in records]
    assert by_key[0] == by_key[1]
    assert not list(one.rglob("*.part"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finish(SHORT, out)
    return out


def test_a_killed_run_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """Killed between two answers at a random moment, a process of its own."""
    out, moment = tmp_path / "out", random.uniform(0, 0.8)
    alive, _ = kill(SHORT, out, moment, from_first_answer=True)
    assert alive, f"it was done {moment:.2f} s after its first answer: the test needs more samples"
    before = (out / "answers" / "digits.jsonl").read_bytes()
    assert before
    finish(SHORT, out)
    whole = before[: before.rfind(b"\n") + 1]
    assert (out / "answers" / "digits.jsonl").read_bytes().startswith(whole), "what was answered is kept as it is"
    same(out, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_a_torn_line_is_asked_again(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """The file of answers cut at any byte, with nothing else written yet but the config."""
    out, whole = tmp_path / "out", (undisturbed / "answers" / "digits.jsonl").read_bytes()
    (out / "answers").mkdir(parents=True)
    (out / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    cut = random.Random(seed).randrange(len(whole) // 2, len(whole))
    (out / "answers" / "digits.jsonl").write_bytes(whole[:cut])
    finish(SHORT, out)
    same(out, undisturbed)


def test_a_journal_cut_at_every_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    lines = [json.dumps({"setting": "dense", "id": f"ä{number}", "answer": "\u2028ß"}, ensure_ascii=False).encode() + b"\n" for number in range(3)]
    whole, path = b"".join(lines), tmp_path / "j.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        known = whole[:cut].count(b"\n")
        assert [record["id"] for record in journal.records()] == [f"ä{number}" for number in range(known)]
        for line in lines:
            journal.add(json.loads(line))
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    """Half of them between answers, half anywhere in its life: while it loads, answers, measures, draws. Run with -s to see when."""
    calm, out = tmp_path / "calm", tmp_path / "killed"
    alive, life = kill(LONG, calm, 0, from_first_answer=True)            # how long it loads
    assert alive
    load, begun = life, time.monotonic()
    subprocess.run([sys.executable, "-m", "vlprune.cli", *LONG, "--out", str(calm)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    life, kills, file = time.monotonic() - begun, 0, out / "answers" / "digits.jsonl"
    for number in range(30):
        before = file.read_bytes().count(b"\n") if file.exists() else 0
        between = number < 5
        alive, ran = kill(LONG, out, random.uniform(0, (life - load) / 10 if between else life), from_first_answer=between)
        after = file.read_bytes().count(b"\n") if file.exists() else 0
        kills += alive
        print(f"after {ran:.1f} s, {before} -> {after} answers: {'killed' if alive else 'it was done before'}")
        assert after >= before
        if not alive:
            life = ran                                                   # what is left is short
        if kills == 10:
            break
    assert kills == 10
    finish(LONG, out)
    same(out, calm)
    known = json.loads((out / "costs.jsonl").read_text().splitlines()[-1])
    assert set(known["costs"]) == set(known["of"]["settings"])
