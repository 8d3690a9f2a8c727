"""The results folder of `vlprune.evals.imagenet`: rows found again by their settings, a table and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BASELINES = ("dense", "random")
ASKED = ("command", "keep", "threads", "draws")                          # facts of a call, not of its numbers
YARDSTICK = "cls_attention"                                              # what the others are to beat


class Results:
    """``config.json``, ``results.json`` and what was begun (``partial.json``); everything is written as soon as it is known."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config: dict[str, Any] = {} if fresh else self._read("config.json", {})
        known = {"rows": [], "left_out": {}} if fresh else self._read("results.json", {"rows": [], "left_out": {}})
        self.left_out: dict[str, dict[str, str]] = known["left_out"]
        self.rows = {self.key(row): row for row in known["rows"]}
        self.partial: dict[str, list[int]] = {} if fresh else self._read("partial.json", {})

    def begin(self, library: str, facts: dict[str, Any]) -> None:
        """Rows of the library are used again where they were measured on the same things."""
        before, now = ({name: value for name, value in part.items() if name not in ASKED} for part in (self.config.get(library, {}), facts))
        if before != now:
            self.rows = {key: row for key, row in self.rows.items() if row["library"] != library}
            self.partial = {key: found for key, found in self.partial.items() if json.loads(key)["library"] != library}
        self.config[library] = facts
        self.save()

    @staticmethod
    def key(row: dict[str, Any]) -> str:
        """A later row with the same key takes an earlier one's place."""
        return json.dumps([row["library"], row["method"], row["keep"], row["places"] if row["method"] == "random" else ""])

    def row(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The row that was measured with exactly these settings."""
        row = self.rows.get(self.key(settings))
        return row if row is not None and all(row[name] == value for name, value in settings.items()) else None

    def classes(self, settings: dict[str, Any], draw: int) -> list[int]:
        """Predicted classes so far of a row that was begun; to be extended, then `keep` them."""
        return self.partial.setdefault(json.dumps({**settings, "draw": draw}), [])

    def keep(self) -> None:
        """Write what was begun."""
        self._write("partial.json", self.partial)

    def add(self, settings: dict[str, Any], measured: dict[str, Any]) -> None:
        """A row is done."""
        row = {**settings, **measured}
        self.rows[self.key(row)] = row
        self.save()
        self.partial = {key: found for key, found in self.partial.items() if {**json.loads(key), "draw": 0} != {**settings, "draw": 0}}
        self.keep()

    def save(self) -> None:
        """Write what is known."""
        self._write("config.json", self.config)
        self._write("results.json", {"rows": self.ordered(), "left_out": self.left_out})

    def finish(self) -> None:
        """Table and plot; nothing is begun any more."""
        self.save()
        if not self.partial:
            (self.folder / "partial.json").unlink(missing_ok=True)
        (self.folder / "results.md").write_text(markdown(self))
        plot(self, self.folder / "plot.png")

    def _read(self, name: str, default: Any) -> Any:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else default

    def _write(self, name: str, value: Any) -> None:
        """Whole or not at all."""
        part = self.folder / f".{name}.part"
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(self.folder / name)

    def ordered(self, library: str | None = None) -> list[dict[str, Any]]:
        """Dense, then for each keep `random` and the methods; a `random` that belongs to no method any more is left out."""
        rows = [row for row in self.rows.values() if library in (None, row["library"])]
        used = [(row["library"], row["keep"], row["places"]) for row in rows if row["method"] != "random"]
        found = [row for row in rows if row["method"] != "random" or (row["library"], row["keep"], row["places"]) in used]
        return sorted(found, key=lambda row: (row["library"], -row["keep"], row["method"] not in BASELINES, row["method"], len(row["places"])))

    def random_for(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The random drops at the same points with the same counts."""
        return self.rows.get(self.key({**row, "method": "random"})) if row["method"] not in BASELINES else None

    def yardstick_for(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Plain dropping by CLS attention that leaves as many in the end."""
        other = self.rows.get(self.key({**row, "method": YARDSTICK}))
        return other if other is not None and row["method"] not in (*BASELINES, YARDSTICK) and other["patches"] == row["patches"] else None


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over the pictures and its standard error."""
    return float(values.mean()), float(values.std(correction=0) / math.sqrt(len(values)))


def ahead(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """By how much a row's top-1 is higher than another's, picture by picture, with the standard error of that."""
    one, two = (torch.tensor([int(digit) for digit in r["right"]]) / r["draws"] for r in (row, other))
    return mean_and_error(one - two)


def markdown(results: Results) -> str:
    """The page of a results folder."""
    lines: list[str] = []
    for library, facts in results.config.items():
        lines += [f"## {library}", "", f"`{facts['command']}`", "", ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command"), ""]
        if facts["limit"]:
            lines += [f"**{facts['pictures']} pictures only (`--limit`): not comparable with full runs.**", ""]
        lines += [*_table(results, library), ""]
        options = {row["method"]: row["options"] for row in results.ordered(library) if row["options"]}
        lines += [*(f"- {name}: {text}" for name, text in sorted(options.items()))]
        lines += [*(f"- {name} left out: {why}" for name, why in sorted(results.left_out.get(library, {}).items())), ""]
    head = [
        "# Pruning inside a ViT-tiny, on real pictures", "",
        "keep: what each stage leaves of what reached it. patches left: at the end; mean tokens: CLS and patches a block runs on, mean over the blocks.",
        f"ahead of random: top-1 minus that of `random` at the same points with the same counts; ahead of {YARDSTICK}: the same against plain dropping of",
        "what CLS attends to least, where it leaves as many patches in the end (their FLOPs may differ). Both picture by picture. ± is one standard error",
        "over the pictures. FLOPs: share of dense, scoring included. speed: pictures a second against dense, in alternating batches.", "",
        "![accuracy against FLOPs and against patches left](plot.png)", "",
    ]  # fmt: skip
    return "\n".join([*head, *lines]).rstrip() + "\n"


def _table(results: Results, library: str) -> list[str]:
    lines = [
        f"| keep | method | points | patches left | mean tokens | top-1 % | agreement with dense % | ahead of random | ahead of {YARDSTICK} | FLOPs | speed |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results.ordered(library):
        where = list(dict.fromkeys(row["points"]))
        points = ", ".join(where) if len(where) < 4 else f"{where[0]} ... {where[-1]}, {len(where)} points"
        gaps = ["" if other is None else "{:+.1f} ± {:.1f}".format(*(100 * x for x in ahead(row, other))) for other in _others(results, row)]
        lines.append(
            f"| {row['keep']:g} | {row['method']} | {points} | {row['patches']} | {row['tokens']:.0f} | {percent(row['top1'], row['error'])} "
            f"| {percent(row['agreement'], row['agreement_error'])} | {gaps[0]} | {gaps[1]} | {row['flops_share']:.3f} | {row['speed']:.2f} |"
        )
    return lines


def _others(results: Results, row: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    return results.random_for(row), results.yardstick_for(row)


def percent(value: float, error: float) -> str:
    """Of a share and its standard error."""
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def plot(results: Results, path: Path) -> None:
    """Top-1 against FLOPs and against patches left at the end; a row of panels for each library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    libraries = list(dict.fromkeys(row["library"] for row in results.ordered()))
    names = list(dict.fromkeys(row["method"] for row in results.ordered() if row["method"] not in BASELINES))
    colours = {name: plt.get_cmap("tab20")((2 * number % 20 + number // 10) % 20) for number, name in enumerate(names)}
    figure, axes = plt.subplots(len(libraries), 2, figsize=(13, 5.2 * len(libraries)), sharey=True, squeeze=False, layout="constrained")
    for panels, library in zip(axes, libraries, strict=True):
        rows = results.ordered(library)
        dense = 100 * next(row["top1"] for row in rows if row["method"] == "dense")
        for axis, key, label in zip(panels, ("flops_share", "patches"), ("FLOPs, share of dense", "patches left at the end"), strict=True):
            for name in names:
                line = sorted((row for row in rows if row["method"] == name), key=lambda row: row[key])
                if line:
                    heights, errors = ([100 * row[height] for row in line] for height in ("top1", "error"))
                    axis.errorbar(
                        [row[key] for row in line], heights, errors, marker="o", ms=4, lw=1.4, elinewidth=0.8, capsize=2, color=colours[name], label=name
                    )
            chance = [row for row in rows if row["method"] == "random"]
            axis.scatter([row[key] for row in chance], [100 * row["top1"] for row in chance], color="0.35", marker="x", zorder=3, label="random, same points")
            axis.axhline(dense, color="0.3", linestyle=":", label="dense")
            axis.set(xlabel=label, title=library)
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("top-1, %")
        panels[1].set_xscale("log")
        panels[1].set_xticks(ticks := sorted({row["patches"] for row in rows if row["method"] in ("dense", YARDSTICK)}) or [1], [str(tick) for tick in ticks])
        panels[1].minorticks_off()
        panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    facts = results.config[libraries[0]]
    figure.suptitle(f"{facts['weights'].removesuffix('.safetensors')}, {facts['pictures']} ImageNet pictures, keep {facts['keep']} a stage", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
