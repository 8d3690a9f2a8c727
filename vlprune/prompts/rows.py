"""Rows: a JSONL file that is written line by line and goes on where it was stopped, also by force."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError


class Rows:
    """Rows in order, in memory and in a file.

    What the file was made with is kept beside it in a hidden file (`setup_file`), so that two runs never mix. A last line that was not finished is cut off.

    Args:
        path: of the file; ``None``: in memory.
        setup: plain values; a file made with others is refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, setup: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is None:
            return
        wanted = json.loads(json.dumps(dict(setup)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = setup_file(self.path)
        if self.path.exists() and self.path.stat().st_size:
            if not beside.exists():
                raise OptionError(f"{str(self.path)!r} exists and was not written here (no {beside.name} beside it); give another file")
            there = json.loads(beside.read_text())
            other = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
            if other:
                raise OptionError(f"{str(self.path)!r} was made with other {', '.join(other)}; give another file, or delete this one to begin anew")
            whole = self.path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(self.path, end)
            self.rows = [json.loads(line) for line in whole[:end].splitlines()]
        else:
            partial = beside.with_name(beside.name + ".part")
            partial.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
            partial.replace(beside)

    def __len__(self) -> int:
        return len(self.rows)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; they are in the file when this returns."""
        new = [dict(row) for row in rows]
        if self.path is not None and new:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
        self.rows += new


def setup_file(path: Path) -> Path:
    """Where the setup of a file is kept; hidden, so that `datasets` does not take it for data."""
    return path.with_name(f".{path.name}.setup.json")


def digest(value: Any) -> str:
    """A short fingerprint of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
