"""The accuracy table on a handful of questions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

import vlprune


def test_rows_of_a_small_table() -> None:
    pytest.importorskip("sklearn")
    if not (Path(vlprune.__file__).parent / "assets" / "tiny_vlm" / "model.safetensors").exists():
        pytest.skip("the embedded model is not there")
    from vlprune.evals import embedded

    rows = embedded.measure(24, [Fraction(1, 3)], ["random", "hiprune"], progress=lambda row: None)
    assert [row["method"] for row in rows] == ["dense", "random", "hiprune"]
    assert [row["kept_last"] for row in rows] == [256, 85, 85]
    assert rows[0]["accuracy"] > 0.8
    assert all(row["accuracy"] == pytest.approx(rows[0]["accuracy"] + (row["gained"] - row["lost"]) / 24) for row in rows)
    assert "random" in embedded.markdown(rows)
