"""What `vlprune eval` prints at its end: the columns that decide, narrow enough for a terminal. ``results.md`` has all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprune.evals.results import markdown


def show(found: Mapping[str, Any], console: Any) -> None:
    """Print a table for each benchmark, then what failed or was left out."""
    from rich import box
    from rich.table import Table

    if found["limit"] is not None:
        console.print(f"[bold]At most {found['limit']} samples a benchmark: not comparable with full runs.[/]", highlight=False)
    for one in found["benchmarks"].values():
        measured = any(row["cost"].get("ttft_ms") for row in one["rows"])
        title = f"{one['title']}: {one['counted']} of {one['samples']} samples"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("run", no_wrap=True, overflow="fold")
        for name in (f"{one['metric']} %", "change (p)", "tokens", "FLOPs", *(("first ms", "speed-up") if measured else ())):
            table.add_column(name, justify="right")
        for row in one["rows"]:
            table.add_row(*_cells(row, measured), style="yellow" if row.get("slower_than_dense") else None)
        console.print(table)
        draws = max(row["draws"] for row in one["rows"])
        if draws > 1:
            console.print(f"random: mean of {draws} draws", highlight=False)
        if any(row.get("slower_than_dense") for row in one["rows"]):
            console.print("yellow: slower than dense", style="yellow", highlight=False)
    if len(found["benchmarks"]) > 1:
        table = Table(title="All together: score over dense score", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", no_wrap=True, overflow="fold")
        table.add_column("relative average", justify="right")
        for entry in found["average"]:
            table.add_row(entry["row"], f"{100 * entry['relative']:.1f} %")
        console.print(table)
    for line in markdown(found).splitlines():
        if line.startswith("- "):
            console.print(line, highlight=False, markup=False, style="dim")


def _cells(row: Mapping[str, Any], measured: bool) -> list[str]:
    change, tokens, flops, first = row.get("change"), row.get("tokens", {}), row.get("flops"), row["cost"].get("ttft_ms")
    words = ""
    if change is not None:
        words = f"{100 * change['change']:+.1f}" + (f" ({change['p']:.2g})" if change["p"] == change["p"] else "")           # not NaN
    cells = [
        row["row"], f"{100 * row['score']:.1f} ± {100 * row['error']:.1f}", words,
        f"{tokens['mean']:.0f}" if tokens.get("mean", float("nan")) == tokens.get("mean") else "", f"{100 * flops['share']:.1f} %" if flops else "",
    ]  # fmt: skip
    return [*cells, "" if first is None else f"{first:.1f}", f"{row['speedup']:.2f}" if "speedup" in row else ""] if measured else cells
