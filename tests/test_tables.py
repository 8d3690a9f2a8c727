"""The table of methods says what the cards say, and parity is counted, not written by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vlprune
from vlprune import tables

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
COUNTER = ROOT / "tests" / "reference" / "count_parity.py"


def row(name: str) -> dict[str, str]:
    (found,) = [cells for cells in tables.method_rows() if cells[0] == name]
    return dict(zip(tables.METHOD_COLUMNS, found, strict=True))


def test_rows_are_the_cards() -> None:
    assert [cells[0] for cells in tables.method_rows()] == vlprune.list_methods()
    assert row("evs")["video"] == "only"
    assert row("cls_attention")["video"] == "no"
    assert row("fastv") | {"what stays": ""} == {
        "name": "fastv", "what stays": "", "paper": "arXiv:2403.06764", "where": "llm:2", "signals": "last_row", "drop, merge or recycle": "drop",
        "tokens": "visual", "video": "yes", "text-aware": "yes", "keep": "0.5", "parity (cases)": tables.parity("fastv"),
    }  # fmt: skip
    assert row("visionzip")["drop, merge or recycle"] == "merge"
    assert row("dense")["drop, merge or recycle"] == "-"


def test_parity_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that pass are a number; failures show."""
    counts = {"a": {"functions": [3, 3], "models": [1, 1]}, "b": {"functions": [1, 1], "models": [1, 2]}, "c": {"functions": [0, 4]}}
    monkeypatch.setattr(tables, "counted", lambda: counts)
    assert tables.parity("a") == "3 functions, 1 model"
    assert tables.parity("b") == "1 function, 1 of 2 models"
    assert tables.parity("c") == "0 of 4 functions"
    assert tables.parity("unheard_of") == "-"


def test_the_committed_counts_are_those_of_the_cases() -> None:
    """As many cases found as there are files for the methods' cards and checkers (whether they pass: tests/test_parity.py)."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside the checkout")
    counts = json.loads(tables.PARITY.read_text())
    folders = {folder for name in vlprune.list_methods() for folder in vlprune.get_method(name).golden}
    files = sum(len(list((SHARED / "golden" / folder).glob("*.safetensors"))) for folder in folders)
    assert sum(entry.get("functions", (0, 0))[1] for entry in counts.values()) == files, "run: make tables"
    known = {path.stem for path in (ROOT / "tests" / "reference" / "models").glob("[!_]*.py")}
    metas = [json.loads(path.read_text()) for path in (SHARED / "golden_e2e").glob("*/*/meta.json")]
    assert sum(entry.get("models", (0, 0))[1] for entry in counts.values()) == sum(meta["method"] in known for meta in metas), "run: make tables"
    assert all(passed == found for entry in counts.values() for passed, found in entry.values())


def test_counting(tmp_path: Path) -> None:
    """A spoilt case is counted as found, not as passed; a shared folder is divided among its methods."""
    if not SHARED.is_dir():
        pytest.skip("no shared folder beside the checkout")
    from safetensors.torch import load_file, save_file

    for name in ("prumerge", "fastv"):
        source, target = SHARED / "golden" / name, tmp_path / "golden" / name
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (tmp_path / "golden_e2e").mkdir()
    spoilt = sorted((tmp_path / "golden" / "fastv").glob("*.safetensors"))[0]
    tensors = load_file(spoilt)
    save_file({name: tensor.flip(-1).contiguous() if name.startswith("out.") else tensor for name, tensor in tensors.items()}, spoilt)
    done = subprocess.run([sys.executable, COUNTER, tmp_path, tmp_path / "parity.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "parity.json").read_text())
    assert counts == {"fastv": {"functions": [2, 3]}, "prumerge": {"functions": [3, 3]}, "prumerge+": {"functions": [1, 1]}}
    assert subprocess.run([sys.executable, COUNTER, tmp_path / "nowhere"], capture_output=True).returncode == 2


def test_the_counter_reads_what_the_table_reads() -> None:
    sys.path.insert(0, str(COUNTER.parent))
    try:
        assert importlib.import_module("count_parity").TARGET == tables.PARITY
    finally:
        sys.path.remove(str(COUNTER.parent))
