"""Distil SwiftKV's projections for a small language model from the model itself, and compare: dense, its own projections, and the distilled ones.

    python examples/train_swiftkv.py --work out/swiftkv --minutes 6
    python examples/train_swiftkv.py --model FOLDER --work out/swiftkv_stories --minutes 6

Without ``--model`` the embedded decoder for associative recall is taken, with its texts; a model in a folder is distilled on texts that it writes itself.
Only the projections train (`vlprune.skipping.early_keys.EarlyKeys`); the loss is the paper's, KL at temperature 2 and the squared difference of the states
that enter the last layer, against the untouched model on the same texts.

Stopped, the same command goes on from its checkpoint. Written to ``--work``: ``weights.safetensors``, ready for
``vlprune.apply(model, "swiftkv", keep=START, weights=...)``, and ``results.json`` and ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import train_tiny_recall  # noqa: E402

import vlprune  # noqa: E402
from vlprune.adapter import find_adapter  # noqa: E402
from vlprune.api import build_method  # noqa: E402
from vlprune.evals import recall, text_quality  # noqa: E402
from vlprune.registry import get_method  # noqa: E402
from vlprune.skipping.early_keys import EarlyKeys  # noqa: E402
from vlprune.skipping.layers import decoder_layers  # noqa: E402

TEMPERATURE = 2.0
Texts = Callable[[int], Tensor]                                           # step -> token ids (B, L)


def load(folder: Path) -> Any:
    """A causal language model, frozen."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval().requires_grad_(False)


def recall_texts(batch: int, length: int) -> Texts:
    """Texts of the recall task with questions and answers."""
    return lambda step: train_tiny_recall.batch("train", step * batch, batch, length, min(recall.PAIRS, length // 6))[0]


def written_texts(model: Any, batch: int, folder: Path, stories: int) -> Texts:
    """Texts that the model writes, kept in a file."""
    path = folder / "stories.json"
    if not path.exists():
        path.write_text(json.dumps(torch.cat([text_quality.tell_stories(model, 32, seed=1000 + part) for part in range(-(-stories // 32))]).tolist()))
    told = torch.tensor(json.loads(path.read_text()))
    return lambda step: told[np.random.default_rng((3, step)).integers(0, len(told), batch)]


def losses(model: Any, net: EarlyKeys, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL from the untouched model at a temperature, and squared difference of the states before the last layer."""
    with torch.no_grad():
        teacher = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    with vlprune.apply(model, "swiftkv", keep=net.start, weights=net, everywhere=True):
        student = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    wanted, got = ((out.logits.flatten(0, 1) / TEMPERATURE).log_softmax(-1) for out in (teacher, student))
    divergence = TEMPERATURE**2 * F.kl_div(got, wanted, log_target=True, reduction="batchmean")
    return divergence, F.mse_loss(student.hidden_states[-2], teacher.hidden_states[-2])


def train(model: Any, net: EarlyKeys, texts: Texts, args: argparse.Namespace) -> list[dict[str, float]]:
    """Until the time, or the number of steps, is over; goes on from the checkpoint."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    path, step, spent, curve = args.work / "checkpoint.pt", 0, 0.0, []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, curve = saved["step"], saved["spent"], saved["curve"]
    start, shown, recent = time.time() - spent, time.time(), []

    def keep_checkpoint() -> None:
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": time.time() - start, "curve": curve}, path)

    while (share := (time.time() - start) / (60 * args.minutes)) < 1.0 and (not args.steps or step < args.steps):
        divergence, difference = losses(model, net, texts(step))
        (divergence + difference).backward()
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 20) * max(0.05, 1.0 - share)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append((float(divergence.detach()), float(difference.detach())))
        step += 1
        if step % 50 == 0:
            kl, mse = np.mean(recent, axis=0)
            curve.append({"step": step, "minutes": round((time.time() - start) / 60, 2), "kl": round(float(kl), 4), "mse": round(float(mse), 4)})
            print(curve[-1], flush=True)
            recent = []
        if time.time() - shown > 60:
            shown = time.time()
            keep_checkpoint()
    keep_checkpoint()
    return curve


def measure(model: Any, net: EarlyKeys, untrained: EarlyKeys, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense first, then the prompt stopped at the same layer with the model's own projections, the start of training, and what training gave."""
    rows: list[dict[str, Any]] = []
    facts = find_adapter(model).facts
    stories = None if args.model is None else text_quality.tell_stories(model, args.n, seed=0)
    texts = [recall.text("heldout", number, length=args.length) for number in range(args.n)]
    likely: Tensor | None = None
    for name, options in (("dense", None), ("own projections", {}), ("untrained", {"weights": untrained}), ("distilled", {"weights": net})):
        method = None if options is None else build_method(get_method("swiftkv"), facts, net.start, options)[0]
        row: dict[str, Any] = {"what": name}
        if stories is None:
            right, report = text_quality.recall_answers(model, texts, 3, method)
            row["first answer"], row["later answers"] = float(right[:, 0].float().mean()), float(right[:, 1:].float().mean())
        else:
            nll, told, report = text_quality.follow(model, stories, method)
            likely = told if likely is None else likely
            row["perplexity"], row["agreement"] = float(nll.mean().exp()), float((told == likely).float().mean())
        row["flops"] = 1.0 if report is None else report.flops_pruned / report.flops_dense
        row["kv"] = 1.0 if report is None else report.kv_bytes_pruned / report.kv_bytes_dense
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; the embedded recall model if not given")
    parser.add_argument("--work", type=Path, default=Path("out/swiftkv"), help="folder for checkpoint, weights and results")
    parser.add_argument("--start", type=int, help="layer at which the prompt stops; half of them if not given")
    parser.add_argument("--group", type=int, default=1, help="layers that share keys and values")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps, if given")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a recall text")
    parser.add_argument("--stories", type=int, default=256, help="texts that a model in a folder writes to be distilled on")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--n", type=int, default=64, help="held-out texts to measure on")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load(args.model or train_tiny_recall.ASSETS)
    layers = decoder_layers(model)
    net, untrained = (EarlyKeys.of(layers, args.start or len(layers) // 2, args.group) for _ in range(2))
    texts = recall_texts(args.batch, args.length) if args.model is None else written_texts(model, args.batch, args.work, args.stories)
    curve = train(model, net.train(), texts, args)
    net.eval().save(args.work / "weights.safetensors", steps=curve[-1]["step"] if curve else 0)
    rows = measure(model, net, untrained, args)
    (args.work / "results.json").write_text(json.dumps({"rows": rows, "curve": curve, "n": args.n}, indent=1) + "\n")
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row[key] if isinstance(row[key], str) else f"{row[key]:.3f}" for key in head) + " |" for row in rows]
    (args.work / "results.md").write_text("\n".join([f"{args.n} held-out texts; the prompt stops at layer {net.start} of {net.depth}.", "", *lines, ""]))


if __name__ == "__main__":
    main()
