"""``vlprune bench --text`` on the smallest shape: what the rows count, not how long they took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlprune
from vlprune import bench_text
from vlprune.bench import SHAPES
from vlprune.cli import app
from vlprune.errors import OptionError

LENGTH = 96


@pytest.fixture(scope="module")
def measured() -> tuple[list[bench_text.TextRow], dict[str, str]]:
    return bench_text.run(shape="tiny", lengths=[LENGTH], rounds=1, decode_steps=2, device="cpu")


def test_every_method_is_measured_or_left_out(measured: tuple[list[bench_text.TextRow], dict[str, str]]) -> None:
    rows, left_out = measured
    assert [row.method for row in rows][:2] == ["dense", "random_text"]
    assert {row.method for row in rows} | set(left_out) == {"dense", *vlprune.list_methods("text"), *vlprune.list_methods("all")}


def test_what_is_counted(measured: tuple[list[bench_text.TextRow], dict[str, str]]) -> None:
    """The cache holds what is computed for it; half of the text is half of the bytes."""
    rows, shape = {row.method: row for row in measured[0]}, SHAPES["tiny"]
    assert rows["dense"].kv_bytes == 2 * 4 * shape.decoder * LENGTH * shape.width
    assert rows["random_text"].kv_bytes == rows["dense"].kv_bytes // 2
    assert rows["random_text"].flops_ratio > 1.9
    for row in rows.values():
        assert row.kv_bytes == row.kv_bytes_expected, row.method
        assert row.efficiency == pytest.approx(row.speedup / row.flops_ratio)


def test_command(tmp_path: Path) -> None:
    """A table a length, both files; what is slower than dense is marked by name."""
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    asked = ["bench", "--text", "--shape", "tiny", "--lengths", "32,48", "--rounds", "1", "--methods", "recent", "--device", "cpu", *files]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["length"], row["method"]) for row in found["rows"]] == [(length, name) for length in (32, 48) for name in ("dense", "random_text", "recent")]
    assert "## 48 tokens" in (tmp_path / "rows.md").read_text()
    slow = bench_text.TextRow(8, "slow", "1", "", 2.0, 0.5, 1.0, 0.5, 1.0, 1.0, 8, 8)
    assert "slow (slower than dense: prefill)" in bench_text.table([slow])[2]


def test_mistakes() -> None:
    with pytest.raises(OptionError, match="reduces visual tokens, and this prompt has none"):
        bench_text.run(["hiprune"], shape="tiny")
    with pytest.raises(OptionError, match="at least 8"):
        bench_text.run(shape="tiny", lengths=[4])
    told = CliRunner().invoke(app, ["bench", "--text", "--lengths", "many"])
    assert told.exit_code != 0
    assert "whole numbers" in told.output
