"""``index.html`` of a results folder: tables, plots and, for chosen samples, the pictures or frames with what stayed, in one file that needs no other.

The text is laid out by ``page.html.jinja`` beside this file, which escapes everything that it is given.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.errors import VlpruneError
from vlprune.evals import pareto, plots
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.evaluate import Request
from vlprune.evals.gallery import Album, choose_samples, choose_settings, exhibit, read_records
from vlprune.evals.journal import write_whole
from vlprune.evals.settings import DENSE, RANDOM, Setting
from vlprune.evals.worker import Worker

MOST_BYTES = 9_000_000                      # of pictures; the text comes on top
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """Of a table: what is read, what is sorted by (``None``: always last), and small print."""

    text: str = ""
    value: float | None = None
    small: str = ""
    mark: str = ""


def write(
    request: Request, found: Mapping[str, Any], worker: Worker, cards: Sequence[Benchmark], samples: Mapping[str, Sequence[Sample]],
    settings: Mapping[str, tuple[list[Setting], dict[str, str]]],
) -> None:  # fmt: skip
    """Write the page. What cannot be drawn is said on it.

    Args:
        request: how many samples are shown, and the folder, where the plots of `vlprune.evals.plots` and the answers lie.
        found: what is in ``results.json``.
        worker: has the model, to draw with.
        cards: the benchmarks, in the order of the page.
        samples: by benchmark.
        settings: by benchmark, with the reasons for what is left out.

    Raises:
        VlpruneError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise VlpruneError("the page needs jinja2, which is not installed: pip install 'vlprune[evals]'. Tables and plots are written.") from error
    room = MOST_BYTES
    parts = []
    for card in cards:
        part = section(found, card.name)
        part["plots"] = []
        for file, words in plots.files(found, card.name):
            url, wide = embedded(request.out / file)
            url = url if len(url) <= room else ""
            room -= len(url)
            part["plots"].append({"file": file, "words": words, "url": url, "wide": wide})
        parts.append(part)
    for number, (card, part) in enumerate(zip(cards, parts, strict=True)):
        album = Album(room // (len(cards) - number))                    # what one leaves the next may have
        before = album.left
        part |= gallery(request, worker, card, samples[card.name], settings[card.name][0], found["benchmarks"][card.name]["rows"], album)
        room -= before - album.left
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("page.html.jinja").render(
        model=found["config"]["model"], command=found["command"], limit=found["limit"], facts=facts(found["config"]), date=date(request.out),
        parts=parts, average=found["average"] if len(parts) > 1 else [], significant=SIGNIFICANT,
    )  # fmt: skip
    write_whole(request.out / "index.html", text)


def section(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A benchmark's tables and notes."""
    one = found["benchmarks"][name]
    rows = one["rows"]
    front = {point.row for point in pareto.members(plots.tables(found)[name].points)}
    columns = dict(_columns(one))
    kinds = sorted({kind for row in rows for kind in row.get("kinds", {})})
    return {
        "name": name, "title": one["title"], "metric": one["metric"], "source": one["source"], "samples": one["samples"], "counted": one["counted"],
        "left_out": one["left_out"], "failed": one["failed"], "columns": list(columns),
        "rows": [
            {
                "row": row["row"], "kind": row["method"] if row["method"] in (DENSE, RANDOM) else "", "draws": row["draws"],
                "slower": bool(row.get("slower_than_dense")), "front": row["row"] in front, "cells": [cells[number] for cells in columns.values()],
            }
            for number, row in enumerate(rows)
        ],
        "kinds": kinds,
        "kind_rows": [(row["row"], [_number(100 * row["kinds"].get(kind, math.nan)) for kind in kinds]) for row in rows if row.get("kinds")],
        "notes": list(_notes(one)),
    }  # fmt: skip


def _columns(one: Mapping[str, Any]) -> Iterator[tuple[str, list[Cell]]]:
    """Everything in the table of ``results.md``, by the name of the column."""
    rows = one["rows"]
    yield f"{one['metric']}, %", [_cell(100 * row["score"], small=f"± {100 * row['error']:.1f}") for row in rows]
    yield "change against dense", [_change(row.get("change")) for row in rows]
    yield "gained / lost", [_lost(row.get("change")) for row in rows]
    yield "visual tokens", [_tokens(row.get("tokens")) for row in rows]
    yield "FLOPs, % of dense", [_flops(row.get("flops")) for row in rows]
    yield "KV cache, MB", [_cell(row["kv_bytes"] / 1e6 if "kv_bytes" in row else None, 2) for row in rows]
    if any(row["cost"].get("ttft_ms") for row in rows):
        yield "first token, ms", [_cell(row["cost"].get("ttft_ms"), mark="worse" if row.get("slower_than_dense") else "") for row in rows]
        yield "speed-up", [_cell(row.get("speedup"), 2) for row in rows]
        yield "decode, ms a token", [_cell(row["cost"].get("decode_ms")) for row in rows]
        batches = sorted({int(name.removeprefix("per_second_")) for row in rows for name in row["cost"] if name.startswith("per_second_")})
        for batch in batches:
            yield f"samples/s at batch {batch}", [_cell(row["cost"].get(f"per_second_{batch}")) for row in rows]
        yield "peak memory, MB", [_cell(row["cost"]["peak_bytes"] / 1e6 if "peak_bytes" in row["cost"] else None) for row in rows]
    for name in sorted({name for row in rows for name in row.get("summary", {})}):
        yield name, [_cell(row.get("summary", {}).get(name), 2) for row in rows]


def _cell(value: float | None, digits: int = 1, small: str = "", mark: str = "") -> Cell:
    text = _number(value, digits)
    return Cell(text, value if text else None, small if text else "", mark)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _change(change: Mapping[str, Any] | None) -> Cell:
    if change is None or math.isnan(change["change"]):
        return Cell()
    tested = not math.isnan(change["p"])
    mark = "" if not tested or change["p"] >= SIGNIFICANT else "better" if change["change"] > 0 else "worse"
    small = f"± {100 * change['error']:.1f}" + (f", p {change['p']:.2g}" if tested else "")
    return Cell(f"{100 * change['change']:+.1f}", 100 * change["change"], small, mark)


def _lost(change: Mapping[str, Any] | None) -> Cell:
    return Cell() if change is None else Cell(f"{change['gained']} / {change['lost']}", change["gained"] - change["lost"])


def _tokens(tokens: Mapping[str, Any] | None) -> Cell:
    if not tokens or math.isnan(tokens["mean"]):
        return Cell()
    same = tokens["mean"] == tokens["most"]
    return _cell(tokens["mean"], 0 if same else 1, "" if same else f"p50 {tokens['median']:.0f}, max {tokens['most']:.0f}")


def _flops(flops: Mapping[str, Any] | None) -> Cell:
    if not flops:
        return Cell()
    return _cell(100 * flops["share"], small=" + ".join(f"{flops[name] / 1e9:.3g}" for name in ("vision", "scorer", "decoder")) + " G")


def _notes(one: Mapping[str, Any]) -> Iterator[str]:
    for row in one["rows"]:
        if row["failed"]:
            some = "; ".join(f"{sample}: {why}" for sample, why in list(row["failed"].items())[:5])
            yield f"{row['row']} failed on {len(row['failed'])} samples, which count as wrong: {some}"
        if not row.get("tokens", {}).get("as_asked", True):
            yield f"{row['row']} was not left with the tokens asked for on {', '.join(row['tokens']['not_as_asked'])}"
        if row["cost"].get("failed"):
            yield f"{row['row']}: costs were not measured to the end: {row['cost']['failed']}"
        if row["options"]:
            yield f"{row['row']}: {row['options']}"


def gallery(
    request: Request, worker: Worker, card: Benchmark, samples: Sequence[Sample], settings: Sequence[Setting], rows: Sequence[Mapping[str, Any]], album: Album
) -> dict[str, Any]:
    """The chosen samples, drawn, and in words which settings are not shown."""
    records = read_records(request.out / "answers" / f"{card.name}.jsonl")
    shown, hidden = choose_settings(settings, rows)
    chosen = choose_samples(samples, shown, records, request.gallery)
    return {"exhibits": [exhibit(worker, card, sample, shown, records, album, settings) for sample in chosen], "hidden": hidden}


def embedded(path: Path) -> tuple[str, bool]:
    """A plot as a data URL, in fewer colours, or nothing if it is not there; and whether it wants the whole width."""
    from PIL import Image

    if not path.exists():
        return "", False
    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64).save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), picture.width > 1300


def facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was made with, in words."""
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        if value not in (None, "") and name != "model":
            found.append((name, str(value)))
    return found


def date(out: Path) -> str:
    """When the last answer came."""
    times = [path.stat().st_mtime for path in (out / "answers").glob("*.jsonl")]
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(times))) if times else "unknown"
