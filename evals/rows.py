"""Official annotation files as rows: JSON, JSON lines, CSV, TSV or Parquet in a local folder, or a data set through `datasets`.

A benchmark names the files that it is published in; the first of them that exists is read. Pictures inside Parquet files and data sets stay where they are
until they are asked for: such a cell is a function that returns the picture, as `Sample.pictures` takes it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError, VlpruneError
from vlprune.evals.benchmark import Source

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

Row = dict[str, Any]


def read_rows(source: Source, files: Sequence[str], *, columns: Sequence[str] = (), split: str = "test", config: str | None = None) -> list[Row]:
    """The rows of a benchmark, in the order of its files.

    Args:
        source: a folder, or a data set on the hub (or a folder in a layout that `datasets` loads), with the split that the user asked for.
        files: patterns below the folder, such as ``"videomme/{split}*.parquet"``; all files of the first pattern that fits are read, in the order of their
            names. ``{split}`` stands for the split.
        columns: that every row needs; ``"a|b"``: one of both.
        split: where the user names none.
        config: of the data set on the hub.

    Raises:
        OptionError: no such file, or one that cannot be read or lacks a column; it says which files were looked for.
    """
    wanted = source.split or split
    if source.folder is None:
        if source.hub is None:
            raise OptionError("a folder with the official files, or hub:ID, is needed")
        rows, where = _from_hub(source.hub, config, wanted), f"hub:{source.hub}, split {wanted}"
    else:
        if source.split is not None and not any("{split}" in pattern for pattern in files):
            raise OptionError(f"--split {source.split!r}: there are no splits in {', '.join(files)}")
        found = find_files(source.folder, [pattern.replace("{split}", wanted) for pattern in files])
        rows = [row for file in found for row in read_file(file)]
        where = ", ".join(str(file) for file in found)
    check_columns(rows, columns, where)
    return rows


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of the first pattern that any file fits.

    Raises:
        OptionError: none fits.
    """
    for pattern in patterns:
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if found:
            return found
    raise OptionError(f"in {str(folder)!r} there is none of the files {', '.join(patterns)}")


def read_file(path: Path) -> list[Row]:
    """The rows of one file, by its ending. Cells of CSV and TSV files are text.

    JSON files hold a list of rows, rows by their ids (which become the column ``"id"`` where there is none), a mapping with one list of rows, or a row a line.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _tabs, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{str(path)!r}: one of the endings {', '.join(ENDINGS)} is needed")
    try:
        return reader(path)
    except (OSError, ValueError, csv.Error, UnicodeError) as error:      # pyarrow's errors are ValueErrors
        raise OptionError(f"cannot read {str(path)!r}: {error}") from error


def check_columns(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], where: str) -> None:
    """One clear line where a row lacks a column."""
    for name in columns:
        known = name.split("|")
        for number, row in enumerate(rows):
            if not any(one in row for one in known):
                raise OptionError(f"{where}: row {number + 1} has no {' or '.join(map(repr, known))}; it has {', '.join(map(repr, row))}")


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The cell of the first of the columns that the row has, ``None`` without any."""
    return next((row[name] for name in names if name in row), None)


def base64_picture(text: str) -> Any:
    """A function that returns the picture in a base64 cell, as in TSV files."""
    return partial(_decoded, text)


@dataclass(frozen=True)
class PictureCell:
    """A picture in a Parquet file, as `datasets` writes them: called, it is read."""

    path: Path
    column: str
    group: int
    row: int

    def __call__(self) -> Any:
        """The picture."""
        return _opened(_column(self.path, self.column, self.group)[self.row].as_py()["bytes"])


def _opened(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data))


def _decoded(text: str) -> Any:
    return _opened(base64.b64decode(text))


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        return _json_lines(path)                                         # POPE and others call JSON lines JSON
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)]
        if whole and all(isinstance(value, dict) for value in whole.values()):
            whole = [{"id": key, **value} for key, value in whole.items()]
        elif len(lists) == 1:
            whole = lists[0]
        else:
            whole = [whole]
    return _rows(whole)


def _json_lines(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return _rows(found)


def _rows(whole: Any) -> list[Row]:
    if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
        raise ValueError("a list of objects is needed")
    return whole


def _table(path: Path, delimiter: str = ",") -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))                    # pictures in base64 are long
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        mark = "\t" if "\t" in head and "," not in head else delimiter  # TGIF-QA calls such files CSV
        return [dict(row) for row in csv.DictReader(file, delimiter=mark)]


def _tabs(path: Path) -> list[Row]:
    return _table(path, "\t")


def _parquet(path: Path) -> list[Row]:
    parquet = _module("pyarrow.parquet")
    file = parquet.ParquetFile(path)
    pictures = [field.name for field in file.schema_arrow if _is_picture(field.type)]
    plain = [field.name for field in file.schema_arrow if field.name not in pictures]
    rows: list[Row] = []
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        part = file.read_row_group(group, columns=plain).to_pylist() if plain else [{} for _ in range(count)]
        rows += [{**row, **{name: PictureCell(path, name, group, place) for name in pictures}} for place, row in enumerate(part)]
    return rows


def _is_picture(kind: Any) -> bool:
    types = _module("pyarrow").types
    return bool(types.is_struct(kind)) and {kind.field(place).name for place in range(kind.num_fields)} == {"bytes", "path"}


@lru_cache(maxsize=4)
def _column(path: Path, column: str, group: int) -> Any:
    return _module("pyarrow.parquet").ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def _from_hub(name: str, config: str | None, split: str) -> list[Row]:
    datasets = _module("datasets")
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:                                           # whatever the hub, the network or a script of the data set does
        line = " ".join(str(error).split())[:300]
        raise OptionError(f"cannot load the data set {name!r} (config {config!r}, split {split!r}) through datasets: {line}") from error
    lazy = [column for column, kind in data.features.items() if isinstance(kind, datasets.Image)]
    plain = data.remove_columns(lazy)
    return [{**row, **{column: partial(_cell, data, place, column) for column in lazy}} for place, row in enumerate(plain)]


def _cell(data: Any, place: int, column: str) -> Any:
    return data[place][column]


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise VlpruneError(f"reading this needs {error.name}, which is not installed: pip install 'vlprune[evals]'") from error
