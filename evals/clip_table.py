"""``results.md`` of `vlprune.evals.clips`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(found: Mapping[str, Any]) -> str:
    """The table: a line a file, and below it what could not be read and why."""
    config, summary, labels = found["config"], found["summary"], found["settings"]
    counts = ", ".join(f"{count} by {name}" for name, count in summary["backends"].items())
    codecs = ", ".join(f"{count} {name}" for name, count in sorted(summary["codecs"].items(), key=lambda entry: -entry[1]))
    lines = [
        "# Real clips", "", f"`{found['command']}`", "",
        f"{config['model']} on {config['device']}; vlprune {config['vlprune']}, torch {config['torch']}, decord {config['decord']}, PyAV {config['av']}.", "",
        f"{summary['read']} of {summary['files']} files could be read ({counts or 'none'}). Codecs: {codecs}; {summary['silent']} without sound.",
    ]  # fmt: skip
    if summary["per_second"]:
        lines.append(f"Median while reading up to {config['frames']} frames: {summary['per_second']:.0f} frames/s, with opening and indexing the file.")
    known = [f"{label} {value:.2f} times" for label, value in summary["speedup"].items() if value]
    if known:
        lines.append(f"Median speed of the first token against dense: {', '.join(known)}.")
    if summary["load"] is not None:
        busy = "; others were at work, so only CPU times and ratios compare" if summary["load"] > summary["cores"] else ""
        lines.append(f"Median load of the machine while measuring: {summary['load']:.1f} on {summary['cores']} cores, this run included{busy}.")
    head = ["file", "codec", "sound", "frames", "size", "read by", "read ms", "read CPU ms", "frames/s", "read peak MB", "tokens"]
    head += [f"{label} ms" for label in labels] + [f"{label} peak MB" for label in labels]
    lines += ["", "| " + " | ".join(head) + " |", "|---|---|---|---:|---:|---|" + "---:|" * (len(head) - 6)]
    for row in found["clips"]:
        cells = [row["id"], row.get("codec", ""), {True: "yes", False: "no"}.get(row.get("sound"), "")]      # type: ignore[call-overload]
        cells += [str(row.get("frames", "")), f"{row['width']}x{row['height']}" if "width" in row else ""]
        cells += [row.get("backend", "**cannot be read**"), _number(row.get("read_ms")), _number(row.get("read_cpu_ms"))]
        cells += [_number(row.get("per_second"), 0), _mega(row.get("read_peak_bytes"))]
        runs = row.get("runs", {})
        cells += [_tokens(runs)]
        cells += [_number(runs.get(label, {}).get("ttft_ms")) for label in labels]
        cells += [_mega(runs.get(label, {}).get("peak_bytes")) for label in labels]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in found["clips"]:
        if "error" in row:
            lines.append(f"- {row['id']}: {row['error']}")
        if row.get("note"):
            lines.append(f"- {row['id']}: {row['note']}")
        lines += [f"- {row['id']} under {label}: {one['error']}" for label, one in row.get("runs", {}).items() if "error" in one]
        for label, one in row.get("runs", {}).items():
            if "asked" in one and one["asked"] != one["kept"]:
                lines.append(f"- {row['id']} under {label}: {one['kept']} tokens stayed where {one['asked']} were asked for")
    return "\n".join(lines).rstrip() + "\n"


def _tokens(runs: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [one["kept"] for one in runs.values() if "kept" in one]
    visual = [one["visual"] for one in runs.values() if "visual" in one]
    return f"{visual[0]} to {counts[-1]}" if counts else ""


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mega(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"
