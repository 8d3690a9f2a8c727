"""What methods for text cost in quality: perplexity and agreement on stories, recall over 2,048 tokens; dense first, `random` at the same places beside each.

    python -m vlprune.evals.text_quality --stories FOLDER --keep 0.75,0.5,0.25 --out evals/results/text

*Stories*: a language model tells stories of 512 tokens, sampled from itself. The first half is the prompt; the second half is given token by token while
decoding. Perplexity is over the second half, agreement is how often the likeliest next token is the untouched model's.
*Recall* (`vlprune.evals.recall`): the embedded decoder is asked for values in a text of 2,048 tokens, once at the end of the prompt and then again and again
while decoding. A method that looks at the prompt's last tokens knows the first question when it chooses, and none of the later ones.

Beside each method that chooses tokens runs its random twin (`vlprune.evals.random_twins`): the same points, the same counts. Layer schedules choose no
tokens and have none. Where a default is not the paper's and that matters for later questions, the paper's is measured, too (`VARIANTS`). Rows are written as
they come; a second call measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import vlprune
from vlprune.errors import VlpruneError
from vlprune.evals import recall
from vlprune.evals.journal import write_whole
from vlprune.evals.random_twins import twin_of
from vlprune.evals.statistics import mean_of, paired
from vlprune.fitting import Fit, fitting
from vlprune.method import PruningMethod

ASSETS = Path(vlprune.__file__).parent / "assets" / "tiny_recall"
CONTEXT, PROMPT = 512, 256
#: Options that a method is measured with beside its defaults.
VARIANTS: dict[str, dict[str, Any]] = {"spts": {"queries": 1}}


# stories


@torch.no_grad()
def tell_stories(model: Any, count: int, seed: int = 0) -> Tensor:
    """(count, CONTEXT) token ids, sampled from the model at temperature 1; stories that end are begun anew behind their end."""
    generator = torch.Generator().manual_seed(seed)
    start = int(model.config.bos_token_id)
    ids = torch.full((count, 1), start)
    cache = None
    while ids.shape[1] < CONTEXT:
        out = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = torch.cat([ids, torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return ids


@torch.no_grad()
def follow(model: Any, ids: Tensor, method: PruningMethod | None) -> tuple[Tensor, Tensor, Any]:
    """(B, CONTEXT - PROMPT) minus log probability of each token of the second half, and the likeliest token there; and the report of the prompt."""
    with nullcontext() if method is None else vlprune.apply(model, method) as handle:
        out = model(input_ids=ids[:, :PROMPT], use_cache=True)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        report = None if handle is None else handle.report()
        for place in range(PROMPT, CONTEXT - 1):
            logits.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    stacked = torch.stack(logits, dim=1).float()
    losses = F.cross_entropy(stacked.transpose(1, 2), ids[:, PROMPT:], reduction="none")
    return losses, stacked.argmax(-1), report


# recall


@torch.no_grad()
def recall_answers(model: Any, texts: Sequence[recall.Recall], questions: int, method: PruningMethod | None) -> tuple[Tensor, Any]:
    """(texts, questions) whether each answer is right: the first asked in the prompt, the others while decoding; and the report of the prompt."""
    keys = torch.from_numpy(np.stack([one.keys[:questions] for one in texts]))
    values = torch.from_numpy(np.stack([one.values[:questions] for one in texts]))
    prompts = torch.from_numpy(np.stack([recall.prompt(one) for one in texts]))
    right = []
    with nullcontext() if method is None else vlprune.apply(model, method) as handle:
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        report = None if handle is None else handle.report()
        right.append(out.logits[:, -1].argmax(-1) == values[:, 0])
        cache = out.past_key_values
        for number in range(1, questions):
            for token in (values[:, number - 1], torch.full((len(texts),), recall.QUESTION), keys[:, number]):
                out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            right.append(out.logits[:, -1].argmax(-1) == values[:, number])
    return torch.stack(right, dim=1), report


# measuring


@dataclass
class Study:
    """A model with its task: ``measure(method)`` gives per-sample numbers by name, dense's among them under ``None``."""

    name: str
    model: Any
    run: Callable[[PruningMethod | None], dict[str, list[float]]]
    dense: dict[str, list[float]]
    higher: dict[str, bool]


def stories_study(folder: Path, count: int, seed: int) -> Study:
    """Stories of the language model in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ids = tell_stories(model, count, seed)
    losses, said, _ = follow(model, ids, None)

    def run(method: PruningMethod | None) -> dict[str, list[float]]:
        loss, words, report = follow(model, ids, method)
        return {"loss": loss.mean(1).tolist(), "agreement": (words == said).float().mean(1).tolist(), **_costs(report)}

    return Study("stories", model, run, {"loss": losses.mean(1).tolist(), "agreement": [1.0] * count}, {"loss": False, "agreement": True})


def recall_study(count: int, questions: int, batch: int = 10) -> Study:
    """The embedded decoder and held-out texts."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(ASSETS, dtype=torch.float32, local_files_only=True).eval()
    texts = [recall.text("heldout", index) for index in range(count)]

    def run(method: PruningMethod | None) -> dict[str, list[float]]:
        parts = [recall_answers(model, texts[start : start + batch], questions, method) for start in range(0, count, batch)]
        right = torch.cat([part for part, _ in parts]).float()
        return {"in prompt": right[:, 0].tolist(), "decoding": right[:, 1:].mean(1).tolist(), **_costs(parts[-1][1])}

    dense = run(None)
    return Study("recall", model, run, dense, {"in prompt": True, "decoding": True})


def _costs(report: Any) -> dict[str, list[float]]:
    if report is None or not report.flops_dense:
        return {}
    return {"flops share": [report.flops_pruned / report.flops_dense], "kv share": [report.kv_bytes_pruned / report.kv_bytes_dense]}


def label_of(name: str, extra: Mapping[str, Any]) -> str:
    """A row's name: the method and its options."""
    return " ".join([name, *(f"{key}={value}" for key, value in extra.items())])


def measure(
    study: Study, keeps: Sequence[Fraction], names: Sequence[str], known: list[dict[str, Any]], tell: Callable[[dict[str, Any]], None]
) -> dict[str, str]:
    """Add the rows that are missing; the reasons why methods are left out."""
    left_out: dict[str, str] = {}
    there = {(row["study"], row["method"], row["keep"]) for row in known}
    for keep in keeps:
        fits, refused = fitting(study.model, names, float(keep), "text")
        left_out.update(refused)
        variants: list[tuple[Fit, dict[str, Any]]] = [(one, extra) for one in fits for extra in ({}, VARIANTS.get(one.name)) if extra is not None]
        for one, extra in variants:
            label = label_of(one.name, extra)
            if (study.name, label, str(keep)) in there:
                continue
            try:
                method, twin = twin_of(study.model, one, float(keep), extra)
                numbers = study.run(method)
                chance = twin()
                beside = None if chance is None else study.run(chance)
            except VlpruneError as error:
                left_out[label] = str(error)
                continue
            tell({"study": study.name, "method": label, "keep": str(keep), "options": one.options, "numbers": numbers, "random": beside})
    return left_out


# results


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = ["# Text under pruning: quality", "", f"`{found['command']}`", "", ", ".join(f"{name} {value}" for name, value in found["facts"].items()), ""]
    for name, dense in found["dense"].items():
        rows = [row for row in found["rows"] if row["study"] == name]
        measures = [key for key in dense if "share" not in key]
        head = ["method", "keep", *measures, *(f"{key}: ahead of random" for key in measures), "FLOPs of the prompt", "KV"]
        lines += [f"## {name}", "", "| " + " | ".join(head) + " |", "|---|---:|" + "---:|" * (len(head) - 2)]
        lines.append("| dense | 1 | " + " | ".join(_value(key, dense[key]) for key in measures) + " |" + " |" * len(measures) + " 1.000 | 1.000 |")
        for row in rows:
            numbers, chance = row["numbers"], row["random"]
            cells = [_value(key, numbers[key]) for key in measures]
            cells += ["" if chance is None else _ahead(key, numbers[key], chance[key]) for key in measures]
            cells += [f"{numbers[key][0]:.3f}" if key in numbers else "" for key in ("flops share", "kv share")]
            lines.append(f"| {row['method']} | {row['keep']} | " + " | ".join(cells) + " |")
        lines += ["", *(f"- {method} left out: {why}" for method, why in found["left_out"].get(name, {}).items()), ""]
        behind = [f"{row['method']} at {row['keep']}, {key}" for row in rows for key in measures if row["random"] is not None and _behind(key, row)]
        lines += [f"Behind the same with random choices by more than two standard errors: {'; '.join(behind) or 'none'}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _value(key: str, values: Sequence[float]) -> str:
    mean = mean_of(values)
    if key == "loss":
        return f"perplexity {math.exp(mean.value):.3f}"
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f} %"


def _ahead(key: str, values: Sequence[float], chance: Sequence[float]) -> str:
    if key == "loss":
        one = paired(chance, values)
        return f"{one.change:+.3f} ± {one.error:.3f} nats"
    one = paired(values, chance)
    return f"{100 * one.change:+.1f} ± {100 * one.error:.1f}"


def _behind(key: str, row: dict[str, Any]) -> bool:
    ours, chance = row["numbers"][key], row["random"][key]
    one = paired(chance, ours) if key == "loss" else paired(ours, chance)
    return one.change < -2 * one.error


def plot(found: dict[str, Any], path: Path) -> None:
    """Quality against keep, one panel a measure, a line a method, random at the same places dotted in its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(name, key) for name, dense in found["dense"].items() for key in dense if "share" not in key]
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab20")
    names = list(dict.fromkeys(row["method"] for row in found["rows"]))
    for axis, (study, key) in zip(axes[0], panels, strict=True):
        read = (lambda values: math.exp(mean_of(values).value)) if key == "loss" else (lambda values: 100 * mean_of(values).value)
        axis.axhline(read(found["dense"][study][key]), color="0.3", linestyle=":", label="dense")
        for place, name in enumerate(names):
            rows = [row for row in found["rows"] if row["study"] == study and row["method"] == name]
            keeps = [float(Fraction(row["keep"])) for row in rows]
            axis.plot(keeps, [read(row["numbers"][key]) for row in rows], "o-", ms=4, lw=1.2, color=colours(place % 20), label=name)
            if rows and all(row["random"] for row in rows):
                axis.plot(keeps, [read(row["random"][key]) for row in rows], "x:", ms=4, lw=0.8, color=colours(place % 20))
        axis.set_title(f"{study}: {'perplexity' if key == 'loss' else key + ', %'}")
        axis.set_xlabel("keep")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), title="x: the same with random choices", title_fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m vlprune.evals.text_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="folder of a causal language model; without it only recall is measured")
    parser.add_argument("--count", type=int, default=32, help="stories")
    parser.add_argument("--texts", type=int, default=100, help="texts of the recall task")
    parser.add_argument("--questions", type=int, default=8, help="of each text, the first in the prompt")
    parser.add_argument("--keep", default="0.75,0.5,0.25")
    parser.add_argument("--methods", help="names; by default every method for text")
    parser.add_argument("--out", type=Path, default=Path("out/text"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.methods.split(",") if given.methods else [*vlprune.list_methods("text"), *vlprune.list_methods("all")]
    counts = {"stories": given.count, "texts": given.texts, "questions": given.questions}
    facts = {"vlprune": vlprune.__version__, "torch": torch.__version__, "device": "CPU, float32", **counts}
    path = given.out / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: list[dict[str, Any]] = before.get("rows", []) if before.get("facts") == facts else []
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "vlprune.evals.text_quality", *words])
    found: dict[str, Any] = {"command": command, "facts": facts, "dense": {}, "left_out": {}, "rows": rows}
    keeps = [Fraction(part) for part in given.keep.split(",")]

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        write_whole(path, json.dumps(found) + "\n")
        said = ", ".join(f"{key} {mean_of(values).value:.3f}" for key, values in row["numbers"].items())
        print(f"{row['study']:<8} {row['method']:<24} keep {row['keep']:<4} {said}", file=sys.stderr, flush=True)

    studies = [lambda: recall_study(given.texts, given.questions)] if ASSETS.is_dir() else []
    if given.stories is not None:
        studies.insert(0, lambda: stories_study(given.stories, given.count, 0))
    for make in studies:
        study = make()
        found["dense"][study.name] = study.dense
        found["left_out"][study.name] = measure(study, keeps, names, rows, tell)
    rows.sort(key=lambda row: (row["study"], names.index(row["method"].split()[0]), row["method"], -float(Fraction(row["keep"]))))
    write_whole(path, json.dumps(found) + "\n")
    write_whole(given.out / "results.md", markdown(found))
    plot(found, given.out / "quality.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
