"""Videos by their ids, as benchmarks name them: in one of the official folders, with any of the usual endings, or as a folder of frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Sample, Source
from vlprune.evals.hub_files import hub_folders

ENDINGS = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".mpg", ".flv", ".wmv", ".3gp", ".ts")


class VideoFiles:
    """The videos of a benchmark.

    Args:
        source: a folder; or a data set on the hub, whose files are downloaded and unpacked.
        places: folders in it where the videos may be, in this order; ``"."``: itself.
    """

    def __init__(self, source: Source, places: Sequence[str] = ("videos", ".")) -> None:
        self.roots = [source.folder] if source.folder is not None else hub_folders(source.hub or "")
        self.places = tuple(places)
        self._known: dict[str, Path] = {}

    def find(self, name: str) -> Path:
        """The file (or folder of frames) of a video, or where it was expected: opening that is the failure of its sample, not of the benchmark.

        Args:
            name: id, with or without an ending; may hold folders.
        """
        if name not in self._known:
            self._known[name] = next((path for place in self._there for path in _candidates(place / name) if path.exists()), self._expected(name))
        return self._known[name]

    def check(self, samples: Iterable[Sample]) -> None:
        """Some of the videos have to be there.

        Raises:
            OptionError: not one of them is.
        """
        wanted = list(dict.fromkeys(sample.video for sample in samples if isinstance(sample.video, Path)))
        if wanted and not any(path.exists() for path in wanted):
            places = ", ".join(repr(str(root / place)) for root in self.roots for place in self.places)
            raise OptionError(f"not one of {len(wanted)} videos is there, such as {wanted[0].name!r}. Looked in {places} for the endings {', '.join(ENDINGS)}")

    @cached_property
    def _there(self) -> list[Path]:
        return [root / place for place in self.places for root in self.roots if (root / place).is_dir()]

    def _expected(self, name: str) -> Path:
        path = (self._there or self.roots)[0] / name
        return path if path.suffix in ENDINGS else path.with_name(f"{path.name}.mp4")


def _candidates(path: Path) -> Iterable[Path]:
    """The path as it is where that is a video's, then with other endings in place of its own or behind it."""
    yield path
    stem = path.with_suffix("") if path.suffix in ENDINGS else path
    for ending in ENDINGS:
        yield stem.with_name(stem.name + ending)
