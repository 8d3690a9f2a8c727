"""What a searched plan for text is worth on texts that its search did not see: beside the method's default, one share for all layers, and random choices.

    python -m vlprune.evals.text_plans --plan recall.json
    python -m vlprune.evals.text_plans --model ../shared/data/weights/stories260K --texts search.jsonl
    python -m vlprune.evals.text_plans --model ../shared/data/weights/stories260K --plan stories.json

Without ``--model`` the embedded decoder answers held-out texts of the recall task; a model in a folder tells stories, as in `vlprune.evals.text_quality`.
``--texts`` writes stories of another seed, for ``vlprune tune --samples``. All rows keep the plan's share on average.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprune.adapter import find_adapter
from vlprune.api import build_method
from vlprune.evals import text_quality
from vlprune.evals.journal import write_whole
from vlprune.evals.random_twins import random_like
from vlprune.evals.statistics import mean_of, paired
from vlprune.method import PruningMethod
from vlprune.plan import Plan, load_plan
from vlprune.registry import get_method

OTHER_STORIES = 1000            # seed of stories to search on; those that are measured on have seed 0


def methods(model: Any, plan: Plan) -> dict[str, PruningMethod]:
    """By name, all at the plan's ``keep``: the default, even shares, the plan, and both schedules with random choices."""
    facts, card = find_adapter(model).facts, get_method(plan.method)
    fixed = {name: value for name, value in plan.options.items() if name != "budgets"}
    even = {"budgets": (plan.keep,) * facts.decoder_layers}
    options = {"default": fixed, "uniform": {**fixed, **even}, "searched": dict(plan.options)}
    found = {name: build_method(card, facts, plan.keep, one)[0] for name, one in options.items()}
    for name in ("uniform", "searched"):
        chance = random_like(found[name])
        assert chance is not None, "it chooses tokens"
        found[f"{name}, random tokens"] = chance
    return found


def table(study: text_quality.Study, rows: dict[str, dict[str, list[float]]]) -> str:
    """Means with standard errors, and how far ahead of uniform each is on the same texts."""
    measures = list(study.dense)
    head = ["", *measures, *(f"{key}: ahead of uniform" for key in measures), "FLOPs of the prompt", "KV"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines.append("| dense | " + " | ".join(_value(key, study.dense[key]) for key in measures) + " |" + " |" * len(measures) + " 1.000 | 1.000 |")
    for name, row in rows.items():
        ahead = [_ahead(row[key], rows["uniform"][key], study.higher[key]) for key in measures]
        costs = [f"{row[key][0]:.3f}" for key in ("flops share", "kv share")]
        lines.append(f"| {name} | " + " | ".join([*(_value(key, row[key]) for key in measures), *ahead, *costs]) + " |")
    return "\n".join(lines) + "\n"


def _value(key: str, values: Sequence[float]) -> str:
    mean = mean_of(values)
    return f"{mean.value:.4f} ± {mean.error:.4f} nats" if key == "loss" else f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


def _ahead(values: Sequence[float], uniform: Sequence[float], higher: bool) -> str:
    one = paired(values, uniform) if higher else paired(uniform, values)
    return f"{100 * one.change:+.1f} ± {100 * one.error:.1f} points" if higher else f"{one.change:+.4f} ± {one.error:.4f} nats"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m vlprune.evals.text_plans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; the embedded recall model if not given")
    parser.add_argument("--plan", type=Path, help="what vlprune tune wrote; FILE.md and FILE.measured.json are written beside it")
    parser.add_argument("--texts", type=Path, help="write stories to search on to this .jsonl file, and measure nothing")
    parser.add_argument("--count", type=int, help="texts to measure on, or stories to write; 100 recall texts or 32 stories if not given")
    parser.add_argument("--questions", type=int, default=8, help="of each recall text")
    given = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    if given.texts is not None:
        from transformers import AutoModelForCausalLM

        if given.model is None:
            parser.error("--texts needs --model")
        told = text_quality.tell_stories(AutoModelForCausalLM.from_pretrained(given.model).float().eval(), given.count or 32, OTHER_STORIES)
        write_whole(given.texts, "".join(json.dumps({"input_ids": row}) + "\n" for row in told.tolist()))
        return
    if given.plan is None:
        parser.error("--plan or --texts is needed")
    if given.model is None:
        study = text_quality.recall_study(given.count or 100, given.questions)
    else:
        study = text_quality.stories_study(given.model, given.count or 32, 0)
    plan = load_plan(given.plan)
    plan.check(study.model, find_adapter(study.model).facts)
    rows = {}
    for name, method in methods(study.model, plan).items():
        rows[name] = study.run(method)
        print(name, {key: round(mean_of(values).value, 4) for key, values in rows[name].items()}, file=sys.stderr, flush=True)
    command = shlex.join(["python", "-m", "vlprune.evals.text_plans", *words])
    write_whole(given.plan.with_suffix(".measured.json"), json.dumps({"command": command, "dense": study.dense, "rows": rows}) + "\n")
    write_whole(given.plan.with_suffix(".md"), f"`{command}`\n\n{table(study, rows)}")
    print(table(study, rows))


if __name__ == "__main__":
    main()
