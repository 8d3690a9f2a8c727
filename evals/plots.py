"""Plots of a results folder: score and latency against visual tokens, and the Pareto front (`vlprune.evals.pareto`); three PNG files a benchmark.

Dense is a dotted line, random a grey band or line, in every plot. Up to seven methods share a panel; more get a small panel each, or with a single keep a
row each. Where no latency was measured the FLOPs of a prefill take its place, and the axis says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlprune.errors import VlpruneError
from vlprune.evals.settings import DENSE, RANDOM

#: Told apart by everyone (Okabe and Ito), and by their markers in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C2A")
MARKERS = "os^DvPX"
FEW = len(COLOURS)
GREY, INK = "0.45", "0.15"
DPI = 130


@dataclass(frozen=True)
class Point:
    """A row of a table on its plots; NaN is what was not measured.

    Attributes:
        tokens: visual tokens behind the last pruning point, mean over the samples.
        score, error: in percent.
        cost: milliseconds, or GFLOPs.
    """

    row: str
    method: str
    keep: str
    tokens: float
    score: float
    error: float
    cost: float


@dataclass(frozen=True)
class Table:
    """A benchmark's points and the words around them."""

    title: str
    metric: str
    facts: str
    measured: bool
    points: tuple[Point, ...]

    @property
    def cost(self) -> str:
        """What the cost is."""
        return "time to first token, ms" if self.measured else "FLOPs of a prefill, G"

    @property
    def cost_axis(self) -> str:
        """What the cost is, and why."""
        return self.cost if self.measured else f"{self.cost} (latency was not measured)"

    def of(self, method: str) -> list[Point]:
        """A method's points, most tokens first."""
        return sorted((point for point in self.points if point.method == method), key=lambda point: -point.tokens)

    @property
    def methods(self) -> list[str]:
        """All but dense and random, in their order."""
        return list(dict.fromkeys(point.method for point in self.points if point.method not in (DENSE, RANDOM)))


@dataclass(frozen=True)
class View:
    """What is drawn upwards: the score with its error, or the cost."""

    name: str
    label: str
    better: int                                                          # 1: more is better
    errors: bool

    def at(self, point: Point) -> float:
        """The value of a point."""
        return point.score if self.errors else point.cost

    def spread(self, point: Point) -> float:
        """Its standard error, as far as it has one."""
        return point.error if self.errors and not math.isnan(point.error) else 0.0


def write(out: Path, found: Mapping[str, Any]) -> None:
    """Draw every plot into the folder; `files` says what they are called.

    Raises:
        VlpruneError: matplotlib is not installed.
    """
    from vlprune.evals import pareto

    for name, table in tables(found).items():
        score, cost = View(table.metric, f"{table.metric}, %", 1, True), View(table.cost.partition(",")[0], table.cost_axis, -1, False)
        draws = (partial(against_tokens, table, score), partial(against_tokens, table, cost), partial(pareto.front, table))
        for (file, _), draw in zip(files(found, name), draws, strict=True):
            figure = draw()
            figure.savefig(out / file, dpi=DPI)
            pyplot().close(figure)


def files(found: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """File names of a benchmark's plots, with what they show."""
    table = tables({**found, "benchmarks": {name: found["benchmarks"][name]}})[name]
    return [
        (f"{name}_score.png", f"{table.title}: {table.metric} against visual tokens"),
        (f"{name}_latency.png", f"{table.title}: {table.cost} against visual tokens"),
        (f"{name}_pareto.png", f"{table.title}: {table.metric} against {table.cost}, with the Pareto front"),
    ]


def tables(found: Mapping[str, Any]) -> dict[str, Table]:
    """What is drawn, by benchmark."""
    made = {}
    for name, one in found["benchmarks"].items():
        measured = any(row["cost"].get("ttft_ms") for row in one["rows"])
        limit = "" if found["limit"] is None else f", at most {found['limit']} asked: not comparable with full runs"
        facts = f"{found['config']['model']} on {found['config']['device']}, {one['counted']} samples{limit}"
        made[name] = Table(one["title"], one["metric"], facts, measured, tuple(_point(row, measured) for row in one["rows"]))
    return made


def _point(row: Mapping[str, Any], measured: bool) -> Point:
    cost = row["cost"].get("ttft_ms") if measured else row.get("flops", {}).get("total", math.nan) / 1e9
    tokens = row.get("tokens", {}).get("mean", math.nan)
    return Point(row["row"], row["method"], row["keep"], tokens, 100 * row["score"], 100 * row["error"], math.nan if cost is None else cost)


def pyplot() -> Any:
    """matplotlib, drawing into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise VlpruneError("plots need matplotlib, which is not installed: pip install 'vlprune[evals]'. The tables are written.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def against_tokens(table: Table, view: View) -> Any:
    """Score or cost against visual tokens: one panel, a panel for each method, or a row for each."""
    known = replace(table, points=tuple(point for point in table.points if not math.isnan(point.tokens + view.at(point))))
    if not known.points:
        figure, axis = pyplot().subplots(figsize=(7.8, 2), layout="constrained")
        axis.set(title=f"{table.title}: {view.name} against visual tokens", xticks=[], yticks=[])
        axis.text(0.5, 0.5, "nothing was measured", ha="center", va="center")
    elif len(known.methods) <= FEW:
        figure = _together(known, view)
    elif max(len(known.of(name)) for name in known.methods) > 1:
        figure = _apart(known, view)
    else:
        figure = _rows(known, view)
    missing = [point.row for point in table.points if point not in known.points]
    order = ". Panels: best on average first" if len(known.methods) > FEW else ""
    note(figure, table.facts + order + (f"\nnot measured: {', '.join(missing)}" if missing else ""))
    return figure


def note(figure: Any, words: str) -> None:
    """Small print below."""
    figure.supxlabel(words, fontsize=7.5, color=GREY, wrap=True)


def _together(table: Table, view: View) -> Any:
    figure, axis = pyplot().subplots(figsize=(7.8, 4.4), layout="constrained")
    _references(axis, table, view)
    names = table.methods
    for place, (name, colour, marker) in enumerate(zip(names, COLOURS, MARKERS, strict=False)):
        line = table.of(name)
        aside = 2 ** (0.045 * (place - (len(names) - 1) / 2))            # equal counts side by side
        axis.errorbar(
            [point.tokens * aside for point in line], [view.at(point) for point in line], [view.spread(point) for point in line] if view.errors else None,
            marker=marker, ms=5.5, lw=1.6, elinewidth=0.9, capsize=2, color=colour, label=name,
        )  # fmt: skip
    _token_axis(axis, table)
    if not view.errors:
        axis.set_ylim(bottom=0)
    side = ", equal counts side by side" if len(names) > 1 else ""
    axis.set(ylabel=view.label, title=f"{table.title}: {view.name} against visual tokens", xlabel=f"visual tokens behind the last pruning point{side}")
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _apart(table: Table, view: View) -> Any:
    names = sorted(table.methods, key=lambda name: _mean(view.at(point) for point in table.of(name)) * -view.better)
    columns = 6
    rows = math.ceil(len(names) / columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(11, 1.2 + 1.5 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    dense = table.of(DENSE)
    for axis, name in zip(panels, names, strict=False):
        line = table.of(name)
        worse = not view.errors and bool(dense) and any(0.98 * view.at(point) > view.at(dense[0]) for point in line)
        _references(axis, table, view)
        axis.errorbar(
            [point.tokens for point in line], [view.at(point) for point in line], [view.spread(point) for point in line] if view.errors else None,
            marker="o", ms=3.5, lw=1.4, elinewidth=0.9, color=COLOURS[1] if worse else COLOURS[0],
        )  # fmt: skip
        axis.set_title(name + (", slower" if worse else ""), fontsize=8.5, pad=3, color=COLOURS[1] if worse else INK)
        axis.tick_params(labelsize=7)
    if not view.errors:
        panels[0].set_ylim(bottom=0)
    _token_axis(panels[0], table, few=True)
    for axis in panels[len(names) :]:
        axis.set_axis_off()
    for axis in panels[max(len(names) - columns, 0) : len(names)]:
        axis.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    if not view.errors:
        (line,) = panels[0].plot([], [], marker="o", ms=3.5, lw=1.4, color=COLOURS[1])
        handles, labels = [*handles, line], [*labels, f"slower: {'takes longer' if table.measured else 'more FLOPs'} than dense at some keep"]
    unit = view.label.removeprefix(view.name).strip(" ,")
    head = 0.62 / figure.get_figheight()                                 # of the figure, for the title with the legend below
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head))
    title = f"{table.title}: {view.name} ({unit}) against visual tokens behind the last pruning point"
    figure.text(0.5, 1 - 0.1 * head, title, fontsize=10.5, ha="center", va="top")
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1 - 0.4 * head), ncols=3, fontsize=8.5, frameon=False)
    return figure


def _rows(table: Table, view: View) -> Any:
    line = sorted((point for name in table.methods for point in table.of(name)), key=lambda point: view.at(point) * view.better)
    figure, axis = pyplot().subplots(figsize=(8.2, 1.5 + 0.22 * len(line)), layout="constrained")
    for point in table.of(DENSE) + table.of(RANDOM):
        style = {"linestyle": ":", "color": INK} if point.method == DENSE else {"color": GREY}
        axis.axvline(view.at(point), lw=1.4, label=f"{point.row}, {point.tokens:.0f} tokens", **style)
        if point.method == RANDOM:
            axis.axvspan(view.at(point) - view.spread(point), view.at(point) + view.spread(point), color=GREY, alpha=0.18, lw=0)
    places = range(len(line))
    spreads = [view.spread(point) for point in line] if view.errors else None
    axis.errorbar([view.at(point) for point in line], places, xerr=spreads, fmt="o", ms=5, lw=1, color=COLOURS[0])
    axis.set_yticks(places, [f"{point.method}, {point.tokens:.0f}" for point in line], fontsize=8.5)
    keeps = ", ".join(dict.fromkeys(point.keep for point in line))
    axis.set(ylim=(-0.7, len(line) - 0.3), xlabel=view.label, title=f"{table.title}: {view.name}, keep {keeps}")
    axis.set_ylabel("method, visual tokens behind the last pruning point")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    return figure


def _references(axis: Any, table: Table, view: View) -> None:
    """Dense and random."""
    for point in table.of(DENSE):
        axis.axhline(view.at(point), color=INK, linestyle=":", lw=1.2)
        axis.plot([point.tokens], [view.at(point)], marker="*", ms=9, color=INK, linestyle=":", lw=1.2, label=DENSE)
    chance = table.of(RANDOM)
    if chance:
        x, y, spread = ([get(point) for point in chance] for get in (lambda p: p.tokens, view.at, view.spread))
        if view.errors:
            axis.fill_between(x, [a - b for a, b in zip(y, spread, strict=True)], [a + b for a, b in zip(y, spread, strict=True)], color=GREY, alpha=0.22, lw=0)
        if len(chance) == 1:
            axis.errorbar(x, y, spread if view.errors else None, color=GREY, lw=4, alpha=0.35)
        axis.plot(x, y, color=GREY, lw=1.2, marker="x", ms=4, label="random ± standard error" if view.errors else RANDOM)


def _token_axis(axis: Any, table: Table, few: bool = False) -> None:
    """Doubling steps; ticks at the counts of dense and random, where there is room."""
    axis.set_xscale("log", base=2)
    counts = sorted({round(point.tokens) for point in table.of(DENSE) + table.of(RANDOM) or table.points})
    ticks: list[int] = []
    for count in counts:
        if count and (not ticks or count / ticks[-1] > (1.6 if few else 1.15)):
            ticks.append(count)
    if ticks:
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    for one in axis.figure.axes:
        one.grid(alpha=0.25)


def _mean(values: Iterator[float] | Sequence[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
