"""The words of ``vlprune eval`` made into a request, its progress shown, and its tables printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError
from vlprune.evals.asking import Frames
from vlprune.evals.benchmark import Source, get_benchmark, list_benchmarks
from vlprune.evals.evaluate import Request, evaluate
from vlprune.evals.judge import load_judge
from vlprune.evals.settings import parse_share
from vlprune.evals.worker import ModelSpec, Plan
from vlprune.registry import get_method

SAMPLINGS = ("uniform", "fps", "keyframes")


def names_in(text: str, what: str) -> tuple[str, ...]:
    """Words with commas between."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise OptionError(f"no {what} in {text!r}: give names with commas between")
    return found


def sources_in(given: Sequence[str], benchmarks: Sequence[str], split: str | None) -> dict[str, Source]:
    """``NAME=FOLDER``, ``NAME=hub:ID``, or one folder with a folder for each benchmark, or the only benchmark's folder."""
    found: dict[str, Source] = {}
    for text in given:
        name, mark, place = text.partition("=")
        if mark and name in benchmarks:
            if not place:
                raise OptionError(f"--data {text!r}: write {name}=FOLDER or {name}=hub:ID")
            found[name] = Source(hub=place[4:], split=split) if place.startswith("hub:") else Source(Path(place), split=split)
        elif mark and "/" not in name and not Path(text).exists():
            raise OptionError(f"--data {text!r}: {name!r} is not among the benchmarks {', '.join(benchmarks)}")
        else:
            folder = Path(text)
            if not folder.is_dir():
                raise OptionError(f"--data {text!r}: there is no such folder. Write FOLDER or NAME=FOLDER")
            for benchmark in benchmarks:
                if not get_benchmark(benchmark).embedded:
                    inside = folder / benchmark
                    found.setdefault(benchmark, Source(inside if inside.is_dir() else folder, split=split))
    if split is not None:
        for card in map(get_benchmark, benchmarks):
            if card.embedded:
                raise OptionError(f"--split {split!r}: {card.name} makes its own samples and has none")
            found.setdefault(card.name, Source(hub=card.default_hub, split=split))
    return found


def options_in(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``METHOD.KEY=VALUE``; values are JSON where they can be."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        left, _, value = text.partition("=")
        name, _, key = left.partition(".")
        if not key or not value:
            raise OptionError(f"--option {text!r}: write METHOD.KEY=VALUE, such as hiprune.alpha=0.2")
        try:
            found.setdefault(name, {})[key] = json.loads(value)
        except ValueError:
            found.setdefault(name, {})[key] = value
    return found


def request_from(
    *, model: str, benchmarks: str, methods: str, keep: str, frames: int, sampling: str, fps: float | None, resize: int | None, data: Sequence[str],
    split: str | None, out: Path, limit: int | None, draws: int, seed: int, batch: int, option: Sequence[str], costs: bool, batches: str,
    retry: bool, dtype: str, device: str, trust_remote_code: bool, gallery: int, judge: str | None = None,
) -> Request:  # fmt: skip
    """Check everything that can be checked before a model is loaded."""
    names = names_in(benchmarks, "benchmarks")
    for name in names:
        get_benchmark(name)
    chosen, given = names_in(methods, "methods"), options_in(option)
    for name in () if chosen == ("all",) else chosen:
        get_method(name)
    strange = sorted(name for name in given if chosen != ("all",) and name not in chosen)
    if strange:
        raise OptionError(f"--option {strange[0]}...: {strange[0]!r} is not among the methods {', '.join(chosen)}")
    for name in given:
        get_method(name)
    keeps = names_in(keep, "shares")
    for text in keeps:
        parse_share(text)
    if sampling not in SAMPLINGS:
        raise OptionError(f"--sampling {sampling!r}: one of {', '.join(SAMPLINGS)}")
    if (sampling == "fps") != (fps is not None):
        raise OptionError("--sampling fps and --fps N go together")
    sizes = names_in(batches, "batch sizes")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise OptionError(f"--batches {batches!r}: whole numbers with commas between, such as 1,8,32")
    if load_judge(judge) is not None and not any(get_benchmark(name).judge for name in names):
        takers = [name for name in list_benchmarks() if get_benchmark(name).judge]
        raise OptionError(f"--judge {judge!r}: only open answers go to a judge, those of {', '.join(takers) or 'no benchmark that is registered'}")
    spec = ModelSpec(model, dtype, device, trust_remote_code)
    plan = Plan(spec, chosen, keeps, draws, given, Frames(frames, sampling, fps, resize), batch, judge)
    return Request(plan, names, sources_in(data, names, split), out, limit, seed, retry, costs, tuple(sorted({1, *map(int, sizes)})), gallery)


def run(request: Request, console: Any, engine: Any = None, worker: Any = None, command: str = "") -> dict[str, Any]:
    """Evaluate with bars on a terminal, or a line now and then; print the tables. See `vlprune.evals.evaluate`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from vlprune.evals.console_table import show

    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    live = sys.stderr.isatty()
    told, tasks, since = [0.0], {}, {}
    # an hour to judge the speed by: a large model may need minutes for an answer
    with Progress(*columns, console=Console(stderr=True), disable=not live, speed_estimate_period=3600) as progress:
        loading = progress.add_task("samples and model are being loaded", total=None)

        def tell(done: int, total: int, words: str) -> None:
            bar = words if ": cost at batch" in words else words.partition(":")[0]
            if bar not in tasks:
                progress.update(loading, visible=False)
                tasks[bar] = progress.add_task(words, total=total, completed=done)       # what was answered before is no speed
                since[bar] = time.monotonic(), done
            progress.update(tasks[bar], completed=done, total=total, description=words)
            if not live and (time.monotonic() - told[0] > 30 or done == total):
                told[0] = time.monotonic()
                print(f"{words} ({done} of {total}{time_left(*since[bar], done, total)})", file=sys.stderr, flush=True)

        found = evaluate(request, progress=tell, engine=engine, worker=worker, command=command)
    show(found, console)
    files = ", ".join(str(request.out / name) for name in ("results.md", "results.json", "index.html") if (request.out / name).exists())
    console.print(files, highlight=False, markup=False, soft_wrap=True)
    return found


def time_left(begun: float, there: int, done: int, total: int) -> str:
    """In words, from the mean speed since ``begun``, when ``there`` of it were done before; nothing where it is not known."""
    if not there < done < total:
        return ""
    seconds = (time.monotonic() - begun) / (done - there) * (total - done)
    return f", about {timedelta(seconds=round(seconds))} left"


def rows_of_benchmarks() -> list[tuple[str, str, str, str]]:
    """For ``vlprune eval --list``: name, kind of input, what it needs, source."""
    cards = [get_benchmark(name) for name in list_benchmarks()]
    return [(card.name, card.modality, "nothing" if card.embedded else card.layout, card.source) for card in cards]
