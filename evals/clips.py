"""Real clips through the whole of it: what each file is, who reads it and how fast, and the time to the first token dense and pruned.

    cd data && python -m vlprune.evals.clips --data videos --frames 16 --out out/clips

For each video below the folder: codec, sound, frames and size; which library reads it (decord, or PyAV and why), frames a second and memory while
reading, each the median of a few times; then, with the embedded video model or another one, visual tokens, time to the first token and peak memory under
dense, random and the methods, measured in turns (`vlprune.evals.costs`). A file that cannot be read is listed with the error. One line a file is written
as it is measured, and the same command goes on where it was stopped. The folder is written as it was given, so call it from the folder's parent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vlprune
from vlprune.errors import OptionError, VlpruneError
from vlprune.evals.asking import Frames
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.clip_reading import facts, read
from vlprune.evals.clip_table import markdown
from vlprune.evals.costs import Meter
from vlprune.evals.evaluate import check_folder
from vlprune.evals.journal import Journal, write_whole
from vlprune.evals.video_files import ENDINGS
from vlprune.evals.worker import ModelSpec, Plan, Worker

QUESTION = "which digit moves ?"                                          # the embedded model's words; its answers about real clips mean nothing


def measure(
    folder: Path, out: Path, plan: Plan, *, worker: Worker | None = None, question: str = QUESTION, progress: Callable[[int, int, str], None] | None = None,
    command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Measure every video below a folder that is not measured yet, and write ``results.json`` and ``results.md``.

    Args:
        folder: with the videos, at any depth.
        out: the results folder.
        plan: model, methods, keeps, frames.
        worker: with the model of the plan; made if not given.
        question: asked about each.
        progress: called with every file.
        command: for the results.

    Raises:
        OptionError: no videos, or the results folder is of something else.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {ending.lower() for ending in ENDINGS} and path.is_file())
    if not files:
        raise OptionError(f"--data {str(folder)!r}: no videos there, none with the ending {', '.join(ENDINGS)}")
    config = check_folder(out, describe(plan, question, folder))
    worker = Worker(plan) if worker is None else worker
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(config, indent=1) + "\n")
    journal, meter = Journal(out / "clips.jsonl"), Meter(out / "costs.jsonl", worker, (1,))
    labels: list[str] = []
    try:
        for number, file in enumerate(files):
            name = file.relative_to(folder).as_posix()
            if progress is not None:
                progress(number, len(files), name)
            if ("clip", name) not in journal:
                known = {**facts(file), **read(file, plan.frames), **ask(worker, meter, file, name, question)}
                journal.add({"setting": "clip", "id": name, **known, "load": load()})
        wanted = {file.relative_to(folder).as_posix() for file in files}
        rows = sorted((record for record in journal.records() if record["id"] in wanted), key=lambda record: record["id"])
        labels = list(dict.fromkeys(label for row in rows for label in row.get("runs", {})))
        found = {"command": command, "config": config, "settings": labels, "summary": summary(rows, labels), "clips": rows}
        write_whole(out / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_whole(out / "results.md", markdown(found))
        return found
    finally:
        journal.close()
        meter.close()


def ask(worker: Worker, meter: Meter, file: Path, name: str, question: str) -> dict[str, Any]:
    """Tokens and costs under every setting; nothing of a file that cannot be read."""
    sample = Sample(name, question, (), video=file)
    card = Benchmark(name, name, "video", lambda source: [sample], lambda sample, answer: 0.0, source="", max_new_tokens=1)
    settings = [setting for setting in worker.settings(card)[0] if setting.draw == 0]
    records = {record["setting"]: record for record in worker.answer(card, [sample], {name: [setting.label for setting in settings]})}
    if any(record.get("failed") == "open" for record in records.values()):
        return {}
    costs = meter.measure(card, [sample], settings, lambda done, total, words: None)
    runs: dict[str, dict[str, Any]] = {}
    for setting in settings:
        record, cost = records[setting.label], costs.get(setting.label, {})
        wrong = record.get("error") or cost.get("failed")
        counts: dict[str, Any] = {key: record[key] for key in ("visual", "kept", "asked", "kv_bytes") if key in record}
        runs[setting.label] = {**counts, **cost, **({"error": wrong} if wrong else {})}
    return {"runs": runs}


def summary(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Counts, and medians over the files that could be read."""
    sound = [row for row in rows if "error" not in row]
    speedups = {}
    for label in labels[1:]:
        pairs = [(row["runs"][labels[0]].get("ttft_ms"), row["runs"][label].get("ttft_ms")) for row in sound if label in row.get("runs", {})]
        ratios = [dense / pruned for dense, pruned in pairs if dense and pruned]
        speedups[label] = statistics.median(ratios) if ratios else None
    return {
        "files": len(rows), "read": len(sound), "backends": dict(Counter(row["backend"] for row in sound)),
        "codecs": dict(Counter(row.get("codec", "unknown") for row in rows)), "silent": sum(row.get("sound") is False for row in rows),
        "per_second": statistics.median(row["per_second"] for row in sound) if sound else None, "speedup": speedups, "cores": os.cpu_count(),
        "load": statistics.median(row["load"] for row in rows) if all(row.get("load") is not None for row in rows) else None,
    }  # fmt: skip


def load() -> float | None:
    """Processes that wanted a core during the last minute: timings on a busy machine are no speeds of it, only their ratios are fair."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe(plan: Plan, question: str, folder: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch
    import transformers

    cpu = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    return {
        "model": plan.spec.name, "methods": list(plan.methods), "keep": list(plan.keeps), "frames": plan.frames.count, "resize": plan.frames.resize,
        "question": question, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "data": {"clips": str(folder)}, "vlprune": vlprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), **{name: _version(name) for name in ("decord", "av")},
    }  # fmt: skip


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    import shlex

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from vlprune.evals.command import names_in, time_left
    from vlprune.evals.settings import parse_share
    from vlprune.registry import get_method

    parser = argparse.ArgumentParser(prog="python -m vlprune.evals.clips", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with videos, at any depth")
    parser.add_argument("--frames", type=int, default=16, help="of a clip, at most")
    parser.add_argument("--model", default="embedded-video", help="folder or hub id of a vision-language model")
    parser.add_argument("--methods", default="vidcom2", help="names with commas between; dense and random always run, and first")
    parser.add_argument("--keep", default="1/4", help="share or number of visual tokens")
    parser.add_argument("--resize", type=int, help="longest side of a frame in pixels")
    parser.add_argument("--out", type=Path, default=Path("out/clips"), help="results folder")
    given = parser.parse_args(arguments)
    words = shlex.join(["python", "-m", "vlprune.evals.clips", *(sys.argv[1:] if arguments is None else arguments)])
    live = sys.stderr.isatty()
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        if given.frames < 1:
            raise OptionError(f"--frames {given.frames}: at least one")
        methods, keeps = names_in(given.methods, "methods"), names_in(given.keep, "shares")
        for name in methods:
            get_method(name)
        for text in keeps:
            parse_share(text)
        plan = Plan(ModelSpec(given.model), methods, keeps, frames=Frames(given.frames, resize=given.resize))
        with Progress(*columns, console=Console(stderr=True), disable=not live, speed_estimate_period=3600) as progress:
            bar = progress.add_task("clips", total=None)
            begun = time.monotonic()

            def tell(done: int, total: int, name: str) -> None:
                progress.update(bar, completed=done, total=total, description=name[-40:])
                if not live:
                    print(f"{name} ({done} of {total}{time_left(begun, 0, done, total)})", file=sys.stderr, flush=True)

            found = measure(given.data, given.out, plan, progress=tell, command=words)
            progress.update(bar, completed=len(found["clips"]), total=len(found["clips"]))
    except VlpruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{found['summary']['read']} of {found['summary']['files']} files could be read: {given.out / 'results.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
