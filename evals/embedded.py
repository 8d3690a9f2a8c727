"""Held-out digit questions under every method that fits the embedded model: accuracy, agreement with dense, FLOPs; dense and random first.

    python -m vlprune.evals.embedded --n 600 --keep 1/3,2/9,1/9 --out evals/results/embedded

Every method answers the same questions with its defaults. ``--keep`` is what each method is asked for: the share that is left behind its last stage
(`sparsevlm`: of its published schedules' kind), so a method that drops inside the decoder lets more tokens pass the layers before. Beside `random`
before the language model there is, for every set of points and counts among the methods, `random` at the same points with the same counts (``--draws``
of them), and each method is compared with its own, question by question.

Standard errors are over the questions. Gained and lost count the questions on which a method and dense differ, which is what a paired test looks at.
Rows are written as they come, and a second call skips those that are there with the same settings (``--fresh`` does not).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.errors import VlpruneError
from vlprune.evals import digits
from vlprune.fitting import Fit, fitting, reason
from vlprune.loading import load_embedded
from vlprune.method import PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.reducers import Drop
from vlprune.selectors import TopK

TOKENS = 256
BATCH = 30
Rows = list[dict[str, Any]]
Plan = tuple[dict[str, Any], list[PruningMethod]]       # settings of a row, and what is run for it


@torch.no_grad()
def answers(loaded: Any, pairs: list[tuple[Any, Any]], batch: int = BATCH) -> list[str]:
    """One answer a question; the answer counts only with the end token behind it, so two tokens are generated."""
    said: list[str] = []
    processor, model = loaded.processor, loaded.model
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        texts = [f"USER: <image> {question.text} ASSISTANT:" for _, question in part]
        inputs = processor(images=[scene.pil() for scene, _ in part], text=texts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        ends = out[:, -1] == model.generation_config.eos_token_id
        words = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said.extend(word.strip() if end else "" for word, end in zip(words, ends.tolist(), strict=True))
    return said


# plans


def places(method: PruningMethod) -> list[list[Any]]:
    """Point, tokens left and layer of return of every stage that acts whatever it sees: methods that agree in them share their random baseline."""
    found: list[list[Any]] = [[stage.point.label, stage.budget.num_keep(TOKENS), stage.restore] for stage in method.stages if acts(stage)]
    return [place for number, place in enumerate(found) if not number or place[1] < found[number - 1][1]]      # others have nothing to do


def acts(stage: Stage) -> bool:
    """Whether a stage drops something from every picture."""
    return stage.gate is None and not stage.budget.is_everything


def random_like(method: PruningMethod, seed: int) -> PruningMethod:
    """Random drops at the same points with the same counts."""
    stages = (Stage(stage.point, RandomScore(seed), TopK(), Drop(), stage.budget, restore=stage.restore) for stage in method.stages if acts(stage))
    return PruningMethod("random", tuple(stages))


def make_plans(model: Any, keeps: Sequence[Fraction], names: Sequence[str], draws: int) -> tuple[list[Plan], dict[str, str]]:
    """Settings of every row with what is to be run for it, `random` first for each keep; and why the others are left out."""
    plans: list[Plan] = []
    left_out: dict[str, str] = {}
    for keep in keeps:
        fits, refused = fitting(model, [name for name in names if name != "dense"], float(keep))
        left_out.update(refused)
        here: list[Plan] = []
        baseline = vlprune.get_method("random")
        for one in (Fit(baseline, baseline.build(None, float(keep))), *fits):
            common = {"keep": str(keep), "places": places(one.method)}
            chance = {"method": "random", **common, "options": "", "draws": draws}
            if chance not in [settings for settings, _ in here]:
                here.append((chance, [random_like(one.method, seed) for seed in range(draws)]))
            if one.name != "random":
                here.append(({"method": one.name, **common, "options": one.options, "draws": 1}, [one.method]))
        plans += sorted(here, key=lambda plan: plan[0]["method"] != "random")
    return plans, left_out


# measuring


def measure(
    n: int,
    keeps: list[Fraction],
    methods: Sequence[str] | None = None,
    *,
    draws: int = 2,
    seed: int = 0,
    known: Rows | None = None,
    progress: Callable[[dict[str, Any]], None] = print,
    left_out: dict[str, str] | None = None,
) -> Rows:
    """A row for each method and keep, `dense` first.

    Args:
        n: questions.
        keeps: shares asked for.
        methods: names; ``None`` for all that are registered.
        draws: runs of `random`, whose mean counts.
        seed: of the questions.
        known: rows of an earlier call; those with the same settings are not measured again.
        progress: called with each row as it is finished.
        left_out: filled with the methods that do not fit, and why.
    """
    loaded = load_embedded()
    pairs = digits.heldout_questions(n, seed)
    truth = [question.answer for _, question in pairs]
    plans, refused = make_plans(loaded.model, keeps, methods or vlprune.list_methods("visual"), draws)
    left_out = {} if left_out is None else left_out
    left_out.update(refused)
    plans.insert(0, ({"method": "dense", "keep": "1", "places": [], "options": "", "draws": 1}, [PruningMethod("dense")]))
    before = {json.dumps(settings_of(row)): row for row in known or []}
    rows: Rows = []
    dense: list[str] = []
    for settings, runs in plans:
        row = before.get(json.dumps(settings))
        if row is None and settings["method"] not in left_out:
            dense = dense or answers(loaded, pairs)
            try:
                row = {**settings, **numbers(loaded, pairs, truth, dense, runs)}
            except VlpruneError as error:
                left_out[settings["method"]] = reason(error)
            else:
                progress(row)
        if row is not None:
            rows.append(row)
    used = [row["places"] for row in rows if row["method"] != "random"]
    return [row for row in rows if row["method"] != "random" or row["places"] in used or [place[0] for place in row["places"]] == ["before_llm"]]


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row was measured with."""
    return {name: row[name] for name in ("method", "keep", "places", "options", "draws")}


def numbers(loaded: Any, pairs: list[tuple[Any, Any]], truth: list[str], dense: list[str], runs: list[PruningMethod]) -> dict[str, Any]:
    """Means over the runs."""
    right, same = [0] * len(pairs), [0] * len(pairs)
    for method in runs:
        with vlprune.apply(loaded.model, method) as handle:
            said = dense if not method.stages else answers(loaded, pairs)
            report = handle.report()
        right = [count + (a == t) for count, a, t in zip(right, said, truth, strict=True)]
        same = [count + (a == d) for count, a, d in zip(same, said, dense, strict=True)]
    accuracy, error = mean_and_error([count / len(runs) for count in right])
    agreement, agreement_error = mean_and_error([count / len(runs) for count in same])
    dense_right = [a == t for a, t in zip(dense, truth, strict=True)]
    last = report.points[-1:]
    return {
        "points": [record.point for record in report.points],
        "kept_last": sum(record.visual_kept for record in last) / max(sum(len(record.items) for record in last), 1) if last else float(TOKENS),
        "accuracy": accuracy,
        "error": error,
        "agreement": agreement,
        "agreement_error": agreement_error,
        "gained": sum(count for count, before in zip(right, dense_right, strict=True) if not before) / len(runs),
        "lost": sum(len(runs) - count for count, before in zip(right, dense_right, strict=True) if before) / len(runs),
        "flops_share": report.flops_pruned / report.flops_dense if report.flops_dense else 1.0,
        "n": len(pairs),
        "right": "".join(map(str, right)),                               # of how many runs each question is right
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def ahead(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """By how much a row is more often right than another, question by question, with the standard error of that."""
    return mean_and_error([int(a) / row["draws"] - int(b) / other["draws"] for a, b in zip(row["right"], other["right"], strict=True)])


def random_for(row: dict[str, Any], rows: Rows) -> dict[str, Any] | None:
    """The random drops at the same points with the same counts."""
    if row["method"] in ("dense", "random"):
        return None
    return next((other for other in rows if other["method"] == "random" and (other["keep"], other["places"]) == (row["keep"], row["places"])), None)


# results


def markdown(rows: Rows, left_out: dict[str, str] | None = None) -> str:
    """The table of a results folder."""
    lines = [
        "| method | keep | points | tokens at the end | accuracy % | ahead of random, same points | agreement with dense % | gained / lost | FLOPs |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        other, places = random_for(r, rows), r["places"]
        labels = [place[0] + (" (then back)" if place[2] is not None else "") for place in places]
        where = ", ".join(labels) if len(labels) < 4 else f"{labels[0]} ... {labels[-1]}, {len(labels)} points"
        difference = "" if other is None else "{:+.1f} ± {:.1f}".format(*(100 * value for value in ahead(r, other)))
        kept = TOKENS if places and places[-1][2] is not None else r["kept_last"]
        lines.append(
            f"| {r['method']} | {r['keep']} | {where} | {kept:.0f} | {100 * r['accuracy']:.1f} ± {100 * r['error']:.1f} | {difference} "
            f"| {100 * r['agreement']:.1f} | {r['gained']:g} / {r['lost']:g} | {r['flops_share']:.3f} |"
        )
    options = {r["method"]: r["options"] for r in rows if r["options"]}
    notes = [f"- {name}: {text}" for name, text in options.items()] + [f"- {name} left out: {why}" for name, why in (left_out or {}).items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def plot(rows: Rows, path: Path) -> None:
    """Accuracy of each method at each keep, the best on top, beside random at the same points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    keeps = list(dict.fromkeys(row["keep"] for row in rows if row["method"] != "dense"))
    named = [row for row in rows if row["method"] not in ("dense", "random")]
    mean = {name: [row["accuracy"] for row in named if row["method"] == name] for name in dict.fromkeys(row["method"] for row in named)}
    order = sorted(mean, key=lambda name: sum(mean[name]) / len(mean[name]))
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.27 * len(order)), layout="constrained")
    for keep, colour in zip(keeps, ("#1f6fb4", "#e08214", "#b2182b", "#4d9221", "#762a83"), strict=False):
        line = [row for row in named if row["keep"] == keep]
        heights = [order.index(row["method"]) for row in line]
        means, errors = ([100 * r[key] for r in line] for key in ("accuracy", "error"))
        axis.errorbar(means, heights, xerr=errors, fmt="o", ms=5, lw=1, color=colour, label=f"keep {keep}")
        chance = [(100 * other["accuracy"], height) for r, height in zip(line, heights, strict=True) if (other := random_for(r, rows))]
        axis.scatter([x for x, _ in chance], [y for _, y in chance], marker="|", s=70, color=colour, alpha=0.6)
    axis.scatter([], [], marker="|", s=70, color="0.4", label="random, same points and counts")
    axis.axvline(100 * next(row["accuracy"] for row in rows if row["method"] == "dense"), color="0.3", linestyle=":", label="dense")
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(-0.7, len(order) - 0.3)
    axis.set_xlabel(f"right answers, % of {rows[0]['n']} held-out questions")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(keeps) + 2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m vlprune.evals.embedded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--keep", default="1/3,2/9,1/9")
    parser.add_argument("--methods", help="names; by default every method that fits")
    parser.add_argument("--draws", type=int, default=2, help="runs of random, whose mean counts")
    parser.add_argument("--out", type=Path, default=Path("out/embedded"))
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"vlprune": vlprune.__version__, "torch": torch.__version__, "device": "CPU, float32", "questions": given.n, "seed": 0}
    left_out: dict[str, str] = {}
    known = [] if given.fresh else read(given.out / "results.json", facts)

    def save(rows: Rows) -> None:
        write(given.out / "results.json", json.dumps({"facts": facts, "left_out": left_out, "rows": rows}, indent=1) + "\n")

    def progress(row: dict[str, Any]) -> None:
        known.append(row)
        save(known)
        print(f"{row['method']:<16} keep {row['keep']:<4} {100 * row['accuracy']:5.1f} %  {', '.join(row['points'])}", file=sys.stderr, flush=True)

    methods = given.methods.split(",") if given.methods else None
    keeps = [Fraction(part) for part in given.keep.split(",")]
    rows = measure(given.n, keeps, methods, draws=given.draws, known=list(known), progress=progress, left_out=left_out)
    save(rows)
    arguments = [argument for argument in (sys.argv[1:] if argv is None else argv) if argument != "--fresh"]
    text = [f"`{' '.join(['python -m vlprune.evals.embedded', *arguments])}`", ", ".join(f"{name} {value}" for name, value in facts.items())]
    write(given.out / "results.md", "\n\n".join([*text, markdown(rows, left_out), "![accuracy](accuracy.png)"]) + "\n")
    plot(rows, given.out / "accuracy.png")
    print((given.out / "results.md").read_text())


def read(path: Path, facts: dict[str, Any]) -> Rows:
    """Rows of an earlier call on the same things; none if there is no such file."""
    found = json.loads(path.read_text()) if path.exists() else None
    return list(found["rows"]) if isinstance(found, dict) and found.get("facts") == facts else []


if __name__ == "__main__":
    main()
