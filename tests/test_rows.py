"""Annotation files in every form that benchmarks are published in."""

from __future__ import annotations

import base64
import io
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

from PIL import Image

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_at, letter_of, without_letters
from vlprune.evals.rows import base64_picture, find_files, first, read_file, read_rows

TWO = [{"id": "a", "n": 1}, {"id": "b", "n": 2}]


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("list.json", '[{"id": "a", "n": 1}, {"id": "b", "n": 2}]', TWO),
        ("ids.json", '{"a": {"n": 1}, "b": {"n": 2}}', TWO),
        ("inside.json", '{"version": 1, "questions": [{"id": "a", "n": 1}, {"id": "b", "n": 2}]}', TWO),
        ("lines.json", '{"id": "a", "n": 1}\n{"id": "b", "n": 2}\n', TWO),
        ("lines.jsonl", '{"id": "a", "n": 1}\n\n{"id": "b", "n": 2}\n', TWO),
        ("mapping.json", '{"a": 3, "b": 0}', [{"a": 3, "b": 0}]),
        ("mark.csv", '\ufeffid,n\na,1\n"b, and\nc",2\n', [{"id": "a", "n": "1"}, {"id": "b, and\nc", "n": "2"}]),
        ("tabs.tsv", "id\tn\na, b\t1\n", [{"id": "a, b", "n": "1"}]),
        ("tabs.csv", "id\tn\na, b\t1\n", [{"id": "a, b", "n": "1"}]),
    ],
)
def test_forms(name: str, text: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """One call for all of them."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_file(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '[{"id": 1}', "cannot read"), ("a.json", '["a"]', "list of objects"), ("a.jsonl", '{"id": 1}\n{"id"\n', "line 2"),
        ("a.parquet", "none", "cannot read"), ("a.txt", "x", "endings"), ("a.json", "\udcff", "cannot read"),
    ],
)  # fmt: skip
def test_broken_files_are_named(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionError, match=words) as caught:
        read_file(tmp_path / name)
    assert name in str(caught.value)


def test_first_pattern_that_fits_in_order_of_names(tmp_path: Path) -> None:
    """All files of one pattern, one after the other; the split goes into it."""
    for number in (1, 0):
        (tmp_path / f"test-{number}.jsonl").write_text(f'{{"n": {number}}}\n')
    (tmp_path / "val.json").write_text('[{"n": 9}]')
    assert read_rows(Source(tmp_path), ("{split}.json", "{split}-*.jsonl")) == [{"n": 0}, {"n": 1}]
    assert read_rows(Source(tmp_path, split="val"), ("{split}.json", "{split}-*.jsonl"), columns=("n",)) == [{"n": 9}]
    with pytest.raises(OptionError, match=r"dev\.json, dev-\*\.jsonl"):
        read_rows(Source(tmp_path, split="dev"), ("{split}.json", "{split}-*.jsonl"))
    with pytest.raises(OptionError, match="no splits"):
        read_rows(Source(tmp_path, split="dev"), ("val.json",))
    with pytest.raises(OptionError, match="row 1 has no 'question' or 'text'; it has 'n'"):
        read_rows(Source(tmp_path, split="val"), ("{split}.json",), columns=("question|text",))
    with pytest.raises(OptionError, match="none of the files"):
        find_files(tmp_path, ("x", "y"))


def test_pictures_in_parquet_and_data_sets_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures both ways; cells can be sent to another process."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures = [Image.new("RGB", (4, 4), (60 * number, 0, 0)) for number in range(4)]
    kinds = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": pictures, "answer": list("abcd")}, kinds)
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data" / "test-0.parquet", batch_size=2)
    for source in (Source(tmp_path), Source(hub=str(tmp_path))):
        rows = read_rows(source, ("data/{split}*.parquet",), columns=("image", "answer"))
        assert [row["answer"] for row in rows] == list("abcd")
        cells = pickle.loads(pickle.dumps([row["image"] for row in rows]))
        assert [cell().convert("RGB").getpixel((0, 0))[0] for cell in cells] == [0, 60, 120, 180]


def test_base64() -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(file, "PNG")
    assert base64_picture(base64.b64encode(file.getvalue()).decode())().getpixel((1, 1)) == (9, 8, 7)
    assert first({"b": 2, "c": 3}, "a", "b", "c") == 2
    assert first({}, "a") is None


def test_choices() -> None:
    """The prompt, the letters of right answers, and letters that files print themselves."""
    assert asked("Which?", ("x", "y"), before="Look.", after="Say.") == "Look.\nWhich?\nA. x\nB. y\nSay."
    assert asked("Which?", ("x",), form="({letter}) {choice}") == "Which?\n(A) x"
    assert (letter_at(1, "xyz"), letter_at("2", "xyz"), letter_of("y ", ("x", "y", "y"))) == ("B", "C", "B")
    for wrong in (3, -1, None, "B"):
        with pytest.raises(OptionError, match="here: the right choice"):
            letter_at(wrong, "xyz", "here")
    with pytest.raises(OptionError, match="none of the choices"):
        letter_of("w", ("x", "y"))
    assert without_letters(["A. I. Newton", "(B) you", "C) C"]) == ("I. Newton", "you", "C")
    assert without_letters(["A. one", "two"]) == ("A. one", "two")
    sample = Sample("1", "?", ("D",), choices=("C picks it up.", "no", "A", "C puts it down."))
    assert [choice_score(sample, answer) for answer in ("C puts it down.", "D", "C", "no", "A")] == [1, 1, 0, 0, 0]
