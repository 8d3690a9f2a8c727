"""Pictures by their names, as benchmarks name them: in one of the official folders, with any of the usual endings, or a cell of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Sample, Source

ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".JPEG", ".PNG", ".webp")


class PictureFiles:
    """The pictures of a benchmark.

    Args:
        source: a folder; or a data set on the hub, whose rows bring their pictures along.
        places: folders in it where the pictures may be, in this order; ``"."``: itself.
    """

    def __init__(self, source: Source, places: Sequence[str] = ("images", ".")) -> None:
        self.root = source.folder
        self.places = tuple(places)
        self._known: dict[str, Path] = {}

    def of(self, row: Mapping[str, Any], name: Any, column: str = "image") -> Any:
        """The picture of a row: the cell where that is a picture, the file of this name otherwise.

        Raises:
            OptionError: there is no folder, and the cell is no picture.
        """
        cell = row.get(column)
        return cell if callable(cell) else self.find(str(name))

    def find(self, name: str) -> Path:
        """The file of a picture, or where it was expected: opening that is the failure of its sample, not of the benchmark.

        Args:
            name: with or without an ending; may hold folders.
        """
        if self.root is None:
            raise OptionError(f"the data set has no column with the picture {name!r}; a folder with the official files is needed")
        if name not in self._known:
            found = (path for place in self._there for path in _candidates(place / name) if path.is_file())
            self._known[name] = next(found, (self._there or [self.root])[0] / name)
        return self._known[name]

    def check(self, samples: Iterable[Sample]) -> None:
        """Some of the pictures have to be there.

        Raises:
            OptionError: not one of them is.
        """
        wanted = list(dict.fromkeys(picture for sample in samples for picture in sample.pictures if isinstance(picture, Path)))
        if wanted and not any(path.is_file() for path in wanted):
            places = ", ".join(repr(str((self.root or Path()) / place)) for place in self.places)
            looked = f"Looked in {places} for the endings {', '.join(ENDINGS)}"
            raise OptionError(f"not one of {len(wanted)} pictures is there, such as {wanted[0].name!r}. {looked}")

    @cached_property
    def _there(self) -> list[Path]:
        return [] if self.root is None else [self.root / place for place in self.places if (self.root / place).is_dir()]


def _candidates(path: Path) -> Iterable[Path]:
    """The path as it is where that is a picture's, then with other endings in place of its own or behind it."""
    yield path
    stem = path.with_suffix("") if path.suffix in ENDINGS else path
    for ending in ENDINGS:
        yield stem.with_name(stem.name + ending)
