"""From answers to ``results.json``: a row for each method and keep with its score, its change against dense, tokens, FLOPs and costs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any

from vlprune.evals import plots
from vlprune.evals.benchmark import Benchmark, Sample
from vlprune.evals.evaluate import Request
from vlprune.evals.journal import Journal, write_whole
from vlprune.evals.settings import DENSE, Setting
from vlprune.evals.statistics import mean_of, paired, relative_average
from vlprune.evals.worker import Worker

Settings = Mapping[str, tuple[list[Setting], dict[str, str]]]


def collect(
    request: Request,
    config: Mapping[str, Any],
    cards: Sequence[Benchmark],
    samples: Mapping[str, Sequence[Sample]],
    settings: Settings,
    journals: Mapping[str, Journal],
    costs: Mapping[str, Mapping[str, Any]],
    command: str,
) -> dict[str, Any]:
    """Everything that the tables, plots and the page are made from."""
    tables = {card.name: table(card, samples[card.name], settings[card.name][0], journals[card.name].records(), costs.get(card.name, {})) for card in cards}
    for card in cards:
        tables[card.name]["left_out"] = dict(settings[card.name][1])
        if card.judge and config.get("judge") is not None:
            tables[card.name]["metric"] = f"judged {card.metric}"
    return {"command": command, "config": dict(config), "limit": request.limit, "benchmarks": tables, "average": averages(tables)}


def table(
    card: Benchmark, samples: Sequence[Sample], settings: Sequence[Setting], records: Sequence[Mapping[str, Any]], costs: Mapping[str, Any]
) -> dict[str, Any]:
    """The rows of a benchmark.

    Samples whose files could not be opened are no one's fault and count nowhere; they are listed under ``failed``. A sample on which a setting failed counts
    as wrong for that setting, and is listed there.
    """
    by_key = {(record["setting"], record["id"]): record for record in records}
    labels = [setting.label for setting in settings]
    broken: dict[str, str] = {}
    for sample in samples:                                               # a file may break between two runs: then it is lost to all settings
        for label in labels:
            if by_key.get((label, sample.id), {}).get("failed") == "open":
                broken.setdefault(sample.id, by_key[label, sample.id]["error"])
    counted = [sample for sample in samples if sample.id not in broken and all((label, sample.id) in by_key for label in labels)]
    groups: dict[str, list[Setting]] = defaultdict(list)
    for setting in settings:
        groups[setting.row].append(setting)
    dense = [by_key[DENSE, sample.id]["score"] for sample in counted]
    visual, whole = _dense_numbers(by_key, counted, settings)
    rows = [_row(card, counted, members, by_key, dense, costs.get(members[0].label, {}), costs.get(DENSE, {}), whole) for members in groups.values()]
    rows[0]["tokens"] = {"visual": visual, "mean": visual, "median": visual, "most": visual, "as_asked": True}
    return {
        "title": card.title, "metric": card.metric, "modality": card.modality, "source": card.source, "samples": len(samples), "counted": len(counted),
        "failed": broken, "rows": rows,
    }  # fmt: skip


def _row(
    card: Benchmark, samples: Sequence[Sample], members: Sequence[Setting], by_key: Any, dense: Sequence[float], cost: Any, dense_cost: Any, whole: Any
) -> dict[str, Any]:
    first = members[0]
    records = [[by_key[member.label, sample.id] for sample in samples] for member in members]
    scores = [sum(draw[place]["score"] for draw in records) / len(records) for place in range(len(samples))]
    mean = mean_of(scores)
    row: dict[str, Any] = {
        "row": first.row, "method": first.method, "keep": first.keep, "draws": len(members), "options": first.options,
        "score": mean.value, "error": mean.error, "count": mean.count,
        "failed": {sample.id: entry["error"] for draw in records for sample, entry in zip(samples, draw, strict=True) if entry.get("failed")},
        "scores": "".join(f"{score:.3f}," for score in scores),
    }  # fmt: skip
    if first.method != DENSE and len(members) == 1:
        row["change"] = asdict(paired(scores, dense))
    elif first.method != DENSE:
        one = paired(scores, dense)
        row["change"] = {**asdict(one), "p": math.nan, "gained": one.gained, "lost": one.lost}
    kinds: dict[str, list[float]] = defaultdict(list)
    for sample, score in zip(samples, scores, strict=True):
        kinds[sample.kind].append(score)
    row["kinds"] = {kind: mean_of(values).value for kind, values in sorted(kinds.items())} if len(kinds) > 1 else {}
    if card.summary is not None and samples:
        given = [samples, scores, [entry["answer"] for entry in records[0]]][: len(signature(card.summary).parameters)]
        row["summary"] = dict(card.summary(*given))
    answered = [entry for draw in records for entry in draw if "kept" in entry]
    if answered:
        row["tokens"] = _tokens(answered)
        row["flops"] = _flops(answered)
        row["kv_bytes"] = mean_of([entry["kv_bytes"] for entry in answered]).value
    elif first.method == DENSE and whole:
        row |= whole
    row["seconds"] = mean_of([entry["seconds"] for draw in records for entry in draw if "seconds" in entry]).value
    row["cost"] = dict(cost)
    if cost.get("ttft_ms") and dense_cost.get("ttft_ms"):
        row["speedup"] = dense_cost["ttft_ms"] / cost["ttft_ms"]
        row["slower_than_dense"] = first.method != DENSE and row["speedup"] < 0.98
        if row.get("flops", {}).get("share"):
            row["efficiency"] = row["speedup"] * row["flops"]["share"]
    return row


def _tokens(answered: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept = sorted(entry["kept"] for entry in answered)
    missed = [entry["id"] for entry in answered if "asked" in entry and entry["asked"] != entry["kept"]]
    return {
        "visual": mean_of([entry["visual"] for entry in answered]).value, "mean": mean_of(kept).value, "median": kept[len(kept) // 2], "most": kept[-1],
        "as_asked": not missed, "not_as_asked": missed[:20],
    }  # fmt: skip


def _flops(answered: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the samples, in FLOPs of one prefill: vision tower, scorer, language model; and their share of dense."""
    parts = {name: mean_of([entry["flops"].get(name, 0.0) for entry in answered]).value for name in ("vision", "scorer", "decoder")}
    total = sum(parts.values())
    dense = sum(mean_of([entry["flops"].get(f"{name}_dense", 0.0) for entry in answered]).value for name in ("vision", "decoder"))
    return {**parts, "total": total, "share": total / dense if dense else 1.0}


def _dense_numbers(by_key: Any, samples: Sequence[Sample], settings: Sequence[Setting]) -> tuple[float, dict[str, Any]]:
    """Tokens, FLOPs and bytes of the untouched model, read off what the first pruned run says of it."""
    other = next((setting.label for setting in settings if setting.built is not None), None)
    found = [by_key[other, sample.id] for sample in samples if "flops" in by_key.get((other, sample.id), {})]
    if not found:
        return math.nan, {}
    parts = {name: mean_of([entry["flops"].get(f"{name}_dense", 0.0) for entry in found]).value for name in ("vision", "decoder")}
    flops = {"vision": parts["vision"], "scorer": 0.0, "decoder": parts["decoder"], "total": sum(parts.values()), "share": 1.0}
    return mean_of([entry["visual"] for entry in found]).value, {"flops": flops, "kv_bytes": mean_of([entry["kv_bytes_dense"] for entry in found]).value}


def averages(tables: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Score over dense score, averaged over the benchmarks, for rows that are in all of them."""
    common = [row["row"] for row in next(iter(tables.values()))["rows"]] if tables else []
    found = []
    for name in common:
        rows = [next((row for row in one["rows"] if row["row"] == name), None) for one in tables.values()]
        if all(rows):
            dense = [one["rows"][0]["score"] for one in tables.values()]
            found.append({"row": name, "relative": relative_average([row["score"] for row in rows if row], dense), "benchmarks": len(rows)})
    return found


def write(
    request: Request, found: dict[str, Any], worker: Worker, cards: Sequence[Benchmark], samples: Mapping[str, Sequence[Sample]], settings: Settings
) -> None:
    """The files of the results folder."""
    write_whole(request.out / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(request.out / "results.md", markdown(found))
    from vlprune.evals import page

    plots.write(request.out, found)
    page.write(request, found, worker, cards, samples, settings)


# the table in words


def markdown(found: Mapping[str, Any]) -> str:
    """``results.md``."""
    config = found["config"]
    told = [name for name in ("device", "dtype", "vlprune", "torch", "transformers", "seed", "judge") if config.get(name) is not None]
    lines = [
        f"# {config['model']} under pruning", "", f"`{found['command']}`", "",
        ", ".join(f"{name} {config[name]}" for name in told), "",
    ]  # fmt: skip
    if found["limit"] is not None:
        lines += [f"**At most {found['limit']} samples a benchmark: not comparable with full runs.**", ""]
    for key, one in found["benchmarks"].items():
        lines += [f"## {one['title']}", "", f"{one['counted']} of {one['samples']} samples. {one['source']}", "", *_lines(one), ""]
        lines += [f"- failed to open: {name}: {why}" for name, why in one["failed"].items()]
        for row in one["rows"]:
            if row["failed"]:
                lines.append(f"- {row['row']} failed on {len(row['failed'])} samples, which count as wrong: {next(iter(row['failed'].values()))}")
            if not row.get("tokens", {}).get("as_asked", True):
                lines.append(f"- {row['row']} was not left with the tokens asked for: {', '.join(row['tokens']['not_as_asked'])}")
            if row["cost"].get("failed"):
                lines.append(f"- {row['row']}: costs were not measured to the end: {row['cost']['failed']}")
        lines += [f"- {name} left out: {why}" for name, why in one["left_out"].items()]
        lines += [f"- {row['row']}: {row['options']}" for row in one["rows"] if row["options"]]
        lines += ["", *(f"![{words}]({file})" for file, words in plots.files(found, key)), ""]
    if len(found["benchmarks"]) > 1:
        lines += ["## All together", "", "Score over dense score, mean over the benchmarks.", "", "| run | relative average |", "|---|---:|"]
        lines += [f"| {entry['row']} | {100 * entry['relative']:.1f} % |" for entry in found["average"]]
    return "\n".join(lines).rstrip() + "\n"


def _lines(one: Mapping[str, Any]) -> list[str]:
    measured = any(row["cost"].get("ttft_ms") for row in one["rows"])
    batches = sorted({int(name.removeprefix("per_second_")) for row in one["rows"] for name in row["cost"] if name.startswith("per_second_")})
    extra = sorted({name for row in one["rows"] for name in row.get("summary", {})})
    head = ["run", f"{one['metric']} %", "change (p)", "gained / lost", "visual tokens", "FLOPs (ViT + scorer + LLM)", "KV MB"]
    head += ["first token ms", "speed-up", "decode ms", *(f"samples/s at {batch}" for batch in batches), "peak MB"] if measured else []
    head += extra
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in one["rows"]:
        change, flops, tokens, cost = row.get("change"), row.get("flops", {}), row.get("tokens", {}), row["cost"]
        cells = [
            row["row"] + (f" (mean of {row['draws']})" if row["draws"] > 1 else "") + (" **slower than dense**" if row.get("slower_than_dense") else ""),
            f"{100 * row['score']:.1f} ± {100 * row['error']:.1f}",
            "" if change is None else _change(change),
            "" if change is None else f"{change['gained']} / {change['lost']}",
            _count(tokens),
            f"{100 * flops['share']:.1f} % ({_giga(flops['vision'])} + {_giga(flops['scorer'])} + {_giga(flops['decoder'])} G)" if flops else "",
            f"{row['kv_bytes'] / 1e6:.3g}" if "kv_bytes" in row else "",
        ]
        if measured:
            cells += [_number(cost.get("ttft_ms")), _number(row.get("speedup"), 2), _number(cost.get("decode_ms"))]
            cells += [*(_number(cost.get(f"per_second_{batch}")) for batch in batches), _number(cost["peak_bytes"] / 1e6 if "peak_bytes" in cost else None)]
        cells += [_number(row.get("summary", {}).get(name), 2) for name in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _change(change: Mapping[str, float]) -> str:
    return f"{100 * change['change']:+.1f} ± {100 * change['error']:.1f}" + ("" if math.isnan(change["p"]) else f" ({change['p']:.2g})")


def _count(tokens: Mapping[str, Any]) -> str:
    if not tokens or math.isnan(tokens["mean"]):
        return ""
    same = tokens["mean"] == tokens["most"]
    return f"{tokens['mean']:.0f}" if same else f"{tokens['mean']:.1f} (p50 {tokens['median']:.0f}, max {tokens['most']:.0f})"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


__all__ = ["averages", "collect", "markdown", "table", "write"]
