"""Train FTP's router of tokens for a small language model, and compare it with rankings that need no training, at the same budgets.

    python examples/train_ftp_router.py --work out/ftp_router
    python examples/train_ftp_router.py --work out/ftp_router --plan plan.json
    python examples/train_ftp_router.py --model FOLDER --work out/ftp_router_stories

Without ``--model`` the embedded decoder for associative recall is taken, with its texts; for a model in a folder the texts are stories that it writes
itself. The model stays frozen; only the router trains (two layers, 64 hidden, shared by the blocks). The losses are those of
`vlprune.skipping.router_training`: guide, sparsity and distillation, whose formulas are ours. ``--plan`` takes the schedule of ``vlprune tune --method ftp``.

Stopped, the same command goes on from its checkpoint. Written to ``--work``: ``router.safetensors``, ready for
``vlprune.apply(model, "ftp", keep=KEEP, router=...)`` and ``vlprune tune --method ftp --option router=...``, and ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from vlprune.adapter import find_adapter  # noqa: E402
from vlprune.api import build_method  # noqa: E402
from vlprune.evals import text_quality  # noqa: E402
from vlprune.plan import load_plan  # noqa: E402
from vlprune.registry import get_method  # noqa: E402
from vlprune.scorers.token_router import TokenRouter, save_router  # noqa: E402
from vlprune.skipping import router_training as losses  # noqa: E402
from vlprune.skipping.embedded_texts import ASSETS, recall_texts  # noqa: E402

Texts = Callable[[int], tuple[Tensor, int]]                               # step -> token ids (B, L), how many of them are the prompt
QUESTIONS = 6


def load(folder: Path) -> Any:
    """A causal language model, frozen."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)


def asked_texts(batch: int, length: int) -> Texts:
    """Texts of the recall task; the prompt ends with the first question."""

    def draw(step: int) -> tuple[Tensor, int]:
        ids = torch.cat([text["input_ids"] for text in recall_texts("train", batch, QUESTIONS, length, first=step * batch)])
        return ids, ids.shape[1] - 3 * (QUESTIONS - 1)

    return draw


def written_texts(model: Any, batch: int, count: int) -> Texts:
    """Stories that the model writes; half of each is the prompt."""
    told = torch.cat([text_quality.tell_stories(model, 32, seed=1000 + part) for part in range(-(-count // 32))])
    return lambda step: (told[np.random.default_rng((5, step)).integers(0, len(told), batch)], told.shape[1] // 2)


def loss_of(model: Any, router: TokenRouter, ids: Tensor, prompt: int, budgets: Any, args: argparse.Namespace, step: int) -> dict[str, Tensor]:
    """The three losses on one batch."""
    features = losses.recorded(model, router, ids[:, :prompt], args.keep, budgets)
    logits = {layer: router(given) for layer, given in features.items()}
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 :]
    relaxed = losses.relaxed_logits(model, ids, logits, prompt, args.temperature, torch.Generator().manual_seed(step))[:, prompt - 1 :]
    sparsity, guide = losses.sparsity_loss(logits, features), losses.guide_loss(logits, features, args.guide_by)
    return {"distillation": losses.distillation_loss(dense, relaxed), "sparsity": sparsity, "guide": guide}


def train(model: Any, router: TokenRouter, texts: Texts, budgets: Any, args: argparse.Namespace) -> list[dict[str, float]]:
    """So many steps; goes on from the checkpoint."""
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.lr, weight_decay=0.0)
    path, step, curve, recent = args.work / "checkpoint.pt", 0, [], []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        router.load_state_dict(saved["router"])
        optimizer.load_state_dict(saved["optimizer"])
        step, curve = saved["step"], saved["curve"]
    shown = time.time()

    def keep_checkpoint() -> None:
        torch.save({"router": router.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "curve": curve}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=args.steps, completed=step)
        while step < args.steps:
            ids, prompt = texts(step)
            parts = loss_of(model, router, ids, prompt, budgets, args, step)
            guide = args.guide * max(0.0, 1.0 - 2.0 * step / args.steps)  # it leads at first and lets go halfway
            (parts["distillation"] + args.sparsity * parts["sparsity"] + guide * parts["guide"]).backward()
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 10) * max(0.05, 1.0 - step / args.steps)
            optimizer.step()
            optimizer.zero_grad()
            recent.append({name: float(part.detach()) for name, part in parts.items()})
            step += 1
            bar.update(task, completed=step)
            if step % args.every == 0 or step == args.steps:
                curve.append({"step": step, **{name: round(float(np.mean([one[name] for one in recent])), 4) for name in parts}})
                bar.console.print(curve[-1])
                recent = []
            if time.time() - shown > 30:
                shown = time.time()
                keep_checkpoint()
    keep_checkpoint()
    return curve


def measure(model: Any, router: TokenRouter, budgets: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense first, then random choices, the static order, the last token's attention, and the router, at the same budgets on held-out texts."""
    facts, rows = find_adapter(model).facts, []
    given = {} if budgets is None else {"budgets": budgets}
    study = text_quality.recall_study(args.n, 8) if args.model is None else text_quality.stories_study(args.model, args.n, 0)
    rankings: Sequence[tuple[str, dict[str, Any]]] = [
        ("random", {"ranking": "random"}), ("static", {}), ("attention", {"ranking": "attention"}), ("router", {"router": router}),
    ]  # fmt: skip
    rows.append({"what": "dense", **{key: float(np.mean(values)) for key, values in study.dense.items() if "share" not in key}})
    for name, options in rankings:
        numbers = study.run(build_method(get_method("ftp"), facts, args.keep, {**given, **options})[0])
        rows.append({"what": name, **{key: float(np.mean(values)) for key, values in numbers.items()}})
        print(rows[-1], flush=True)
    rows[0].update({key: 1.0 for key in rows[1] if key not in rows[0]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; the embedded recall model if not given")
    parser.add_argument("--work", type=Path, default=Path("out/ftp_router"), help="folder for checkpoint, router and results")
    parser.add_argument("--keep", type=float, default=0.5, help="share of token-block pairs that run")
    parser.add_argument("--plan", type=Path, help="a plan of `vlprune tune --method ftp`, for its schedule and its keep")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a recall text")
    parser.add_argument("--stories", type=int, default=128, help="texts that a model in a folder writes to train on")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--temperature", type=float, default=0.5, help="of the shares with which tokens run in training")
    parser.add_argument("--sparsity", type=float, default=10.0, help="weight of the sparsity loss")
    parser.add_argument("--guide", type=float, default=1.0, help="weight of the guide loss at the first step")
    parser.add_argument("--guide-by", choices=("static", "attention", "both"), default="static", help="the ranking that the router imitates at first")
    parser.add_argument("--every", type=int, default=25, help="steps between lines of the curve")
    parser.add_argument("--n", type=int, default=100, help="held-out texts to measure on")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    plan = None if args.plan is None else load_plan(args.plan)
    budgets = None if plan is None else plan.options.get("budgets")
    args.keep = args.keep if plan is None else plan.keep
    torch.manual_seed(0)
    model = load(args.model or ASSETS)
    if plan is not None:
        plan.check(model, find_adapter(model).facts)
    router = TokenRouter()
    texts = asked_texts(args.batch, args.length) if args.model is None else written_texts(model, args.batch, args.stories)
    curve = train(model, router.train(), texts, budgets, args)
    save_router(router.eval(), args.work / "router.safetensors", steps=args.steps, keep=args.keep)
    rows = measure(model, router, budgets, args)
    (args.work / "results.json").write_text(json.dumps({"rows": rows, "curve": curve, "n": args.n, "keep": args.keep}, indent=1) + "\n")
    head = list(rows[1])
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row[key] if isinstance(row[key], str) else f"{row[key]:.3f}" for key in head) + " |" for row in rows]
    (args.work / "results.md").write_text("\n".join([f"{args.n} held-out texts, {args.keep:.4g} of the token-block pairs run.", "", *lines, ""]))


if __name__ == "__main__":
    main()
