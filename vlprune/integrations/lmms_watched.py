"""A model that is watched while a class of lmms-eval uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlprune.api import PruneHandle
from vlprune.errors import VlpruneError
from vlprune.integrations.lmms_counts import Counts


class Watched:
    """The model as lmms-eval's classes use it: calls are counted, errors remembered (some of these classes go on after any error)."""

    def __init__(self, model: nn.Module, handle: PruneHandle | None, counts: Counts) -> None:
        self._model, self._handle, self._counts = model, handle, counts
        self.refusal: VlpruneError | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        with self._watching(kwargs):
            return self._model.generate(*args, **kwargs)  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._watching(kwargs):
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def _watching(self, given: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._counts.failed += 1
            self._counts.error = self._counts.error or f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
            if isinstance(error, VlpruneError):
                self.refusal = error
            raise
        self._counts.add(given.get("input_ids"), self._handle)
