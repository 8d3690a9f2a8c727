"""A bar for what takes long, fed by ``progress(done, total, what)``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlprune.skipping.running_sums import Progress


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """A bar on the error stream, one line for each thing that is counted."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def tell(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{title}: {what}", total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield tell
