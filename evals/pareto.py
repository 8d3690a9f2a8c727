"""The Pareto front of a table: what no other setting beats in score and cost at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vlprune.evals.plots import COLOURS, GREY, INK, MARKERS, Point, Table, note, pyplot
from vlprune.evals.settings import DENSE, RANDOM

LABEL_PT = 8.5


def members(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is as good or better in both, and better in one. Cheapest first; NaN never is a member."""
    sound = [point for point in points if not math.isnan(point.cost + point.score)]
    found = [
        one
        for one in sound
        if not any(other.cost <= one.cost and other.score >= one.score and (other.cost < one.cost or other.score > one.score) for other in sound)
    ]
    return sorted(found, key=lambda point: (point.cost, point.score))


def front(table: Table) -> Any:
    """Score against cost. The front's names stand to its upper left, where by its definition nothing else lies."""
    plt = pyplot()
    sound = [point for point in table.points if not math.isnan(point.cost + point.score)]
    best = members(sound)
    longest = max((len(point.row) for point in best), default=0)
    figure, axis = plt.subplots(figsize=(8.4 + 0.08 * max(longest - 24, 0), max(4.8, 1.8 + 0.21 * len(best))), layout="constrained")
    keeps = list(dict.fromkeys(point.keep for point in sound if point.method != DENSE))
    for point in sound:
        on = point in best
        if point.method == DENSE:
            axis.plot(point.cost, point.score, "*", ms=13, color=INK, zorder=4, label=DENSE)
        elif point.method == RANDOM:
            axis.plot(point.cost, point.score, "x", ms=8, mew=2, color=_colour(keeps, point), zorder=4)
        else:
            face = _colour(keeps, point) if on else "white"
            marker = MARKERS[keeps.index(point.keep) % len(MARKERS)]
            axis.plot(point.cost, point.score, marker, ms=7 if on else 5.5, mec=_colour(keeps, point), mfc=face, mew=1.2, alpha=1 if on else 0.75, zorder=3)
    steps = ([point.cost for point in best], [point.score for point in best])
    axis.plot(*steps, drawstyle="steps-post", color=INK, lw=1.2, zorder=2, label="Pareto front: nothing beats it in both")
    for keep in keeps:
        axis.plot([], [], MARKERS[keeps.index(keep) % len(MARKERS)], color=COLOURS[keeps.index(keep) % len(COLOURS)], label=f"keep {keep}, on the front")
        axis.plot([], [], MARKERS[keeps.index(keep) % len(MARKERS)], mec=COLOURS[keeps.index(keep) % len(COLOURS)], mfc="white", label=f"keep {keep}, beaten")
    axis.plot([], [], "x", ms=8, mew=2, color=GREY, label="random, in the colour of its keep")
    axis.set(title=f"{table.title}: {table.metric} against {table.cost.partition(',')[0]}", xlabel=table.cost_axis, ylabel=f"{table.metric}, %")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    note(figure, table.facts + ". Differences within the noise decide who is on the front as well.")
    if best:
        _label(figure, axis, best, sound)
    return figure


def _colour(keeps: Sequence[str], point: Point) -> str:
    return COLOURS[keeps.index(point.keep) % len(COLOURS)]


def _label(figure: Any, axis: Any, best: Sequence[Point], sound: Sequence[Point]) -> None:
    """Names in a column left of everything, in the order of the front, each at the height of its point or above, with a line to it."""
    left, right = min(point.cost for point in sound), max(point.cost for point in sound)
    low, high = min(point.score for point in sound), max(point.score for point in sound)
    width, height = (right - left) or left or 1.0, (high - low) or 1.0
    names = [f"{point.row}  {point.score:.1f}" for point in best]
    figure.draw_without_rendering()                                      # only then the axis has its size
    across, upwards = (length * 72 / figure.dpi for length in axis.bbox.size)
    share = min(0.62 * LABEL_PT * max(map(len, names)) / across, 0.6)    # of the axis, for the longest name
    start = left - (0.05 + share / (1 - share) * 1.1) * width
    top = high
    for _ in range(4):                                                   # a line's height depends on how far the names reach up, and the other way round
        step = 1.3 * LABEL_PT / upwards * (top - low + 0.12 * height)
        heights: list[float] = []
        for point in best:
            heights.append(max(point.score, heights[-1] + step) if heights else point.score)
        top = max(high, heights[-1])
    axis.set_xlim(start - 0.02 * width, right + 0.05 * width)
    axis.set_ylim(low - 0.06 * height, top + 0.06 * height)
    axis.set_xticks([tick for tick in axis.get_xticks() if left - 0.1 * width <= tick <= right + 0.05 * width])       # none under the names
    for point, name, y in zip(best, names, heights, strict=True):
        axis.annotate(
            name, (point.cost, point.score), (start, y), fontsize=LABEL_PT, va="center", color=INK,
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.7, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


__all__ = ["front", "members"]
