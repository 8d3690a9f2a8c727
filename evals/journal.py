"""Answers as they come, a line each, in a file that survives being killed at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError


class Journal:
    """A JSON Lines file of answers. One process writes it; a second one that tries is refused.

    A line is written in one piece. What a killed process left of a line at the end is cut off when the file is opened again, so that the answer is
    asked for once more and there is neither a gap nor a duplicate.

    Args:
        path: of the file; its folder must exist.

    Raises:
        OptionError: another process writes the file, or a line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._file = _opened(path)
        whole = path.read_bytes()
        sound = whole.rfind(b"\n") + 1
        if sound < len(whole):
            os.ftruncate(self._file, sound)
        for number, line in enumerate(whole[:sound].splitlines(), 1):
            try:
                record = json.loads(line)
                self._records[record["setting"], record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(f"{path}:{number} is no answer of vlprune eval. Remove the line, or choose another --out.") from error

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether ``(setting, sample id)`` is answered."""
        return key in self._records

    def add(self, record: dict[str, Any]) -> None:
        """Write an answer; one that is there already is not written again."""
        key = (record["setting"], record["id"])
        if key not in self._records:
            left = memoryview(_line(record))
            while left:                                                  # a full disk may take a part of it first, and then fail
                left = left[os.write(self._file, left) :]
            self._records[key] = record

    def forget(self, keys: Iterable[tuple[str, str]]) -> None:
        """Drop answers, such as failures that are to be tried again; the file is written anew, whole or not at all."""
        for key in keys:
            self._records.pop(key, None)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_bytes(b"".join(map(_line, self._records.values())))
        part.replace(self.path)
        os.close(self._file)
        self._file = _opened(self.path)

    def records(self) -> list[dict[str, Any]]:
        """Every answer."""
        return list(self._records.values())

    def close(self) -> None:
        """Nothing more is written."""
        os.close(self._file)


def _opened(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        import fcntl
    except ImportError:                                                  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                 # gone with the process, however it ends
    except BlockingIOError:
        os.close(file)
        raise OptionError(f"another vlprune eval is writing {str(path)!r}. Wait for it, or choose another --out.") from None
    except OSError:                                                      # a file system without locks
        pass
    return file


def _line(record: dict[str, Any]) -> bytes:
    return encoded(json.dumps(record, ensure_ascii=False) + "\n")


def encoded(text: str) -> bytes:
    """UTF-8; what has no place in it, such as the odd bytes of a file's name, as JSON's escapes."""
    return text.encode("utf-8", "backslashreplace")


def write_whole(path: Path, text: str) -> None:
    """A file with this text, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(encoded(text))
    part.replace(path)
