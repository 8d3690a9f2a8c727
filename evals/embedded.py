"""Held-out digit questions under every method that fits the embedded model: accuracy against kept tokens, dense and random first.

    python -m vlprune.evals.embedded --n 600 --keep 1/3,2/9,1/9 --out evals/results/embedded

Every method answers the same questions. Standard errors are binomial. The change against dense counts the questions on which the
two differ (gained and lost), which is what a paired test looks at.
"""

from __future__ import annotations

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.errors import VlpruneError
from vlprune.evals import digits
from vlprune.loading import load_embedded


@torch.no_grad()
def answers(loaded: Any, pairs: list[tuple[Any, Any]], batch: int = 30) -> list[str]:
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


def measure(n: int, keeps: list[Fraction], methods: list[str], seed: int = 0, progress: Any = print) -> list[dict[str, Any]]:
    """A row for each method and budget."""
    loaded = load_embedded()
    pairs = digits.heldout_questions(n, seed)
    truth = [question.answer for _, question in pairs]
    dense = [a == t for a, t in zip(answers(loaded, pairs), truth, strict=True)]
    rows = [row("dense", Fraction(1), dense, dense, 256.0)]
    progress(rows[-1])
    for keep in keeps:
        for name in methods:
            try:
                handle = vlprune.apply(loaded.model, name, keep=float(keep))
            except VlpruneError as error:
                progress(f"{name} left out: {error}")
                continue
            with handle:
                right = [a == t for a, t in zip(answers(loaded, pairs), truth, strict=True)]
                last = handle.report().points
                kept = sum(record.visual_kept for record in last[-1:]) / max(len(last[-1].items), 1)
            rows.append(row(name, keep, right, dense, kept))
            progress(rows[-1])
    return rows


def row(method: str, keep: Fraction, right: list[bool], dense: list[bool], kept: float) -> dict[str, Any]:
    """Accuracy with its standard error, and the questions gained and lost against dense."""
    n = len(right)
    accuracy = sum(right) / n
    gained = sum(a and not b for a, b in zip(right, dense, strict=True))
    lost = sum(b and not a for a, b in zip(right, dense, strict=True))
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    return {"method": method, "keep": str(keep), "kept_last": kept, "accuracy": accuracy, "error": error, "gained": gained, "lost": lost, "n": n}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of a results folder."""
    lines = ["| method | keep | tokens at the end | accuracy | gained / lost against dense |", "|---|---:|---:|---:|---:|"]
    for r in rows:
        lines.append(f"| {r['method']} | {r['keep']} | {r['kept_last']:.0f} | {r['accuracy']:.3f} ± {r['error']:.3f} | {r['gained']} / {r['lost']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--keep", default="1/3,2/9,1/9")
    parser.add_argument("--methods", default="random,uniform,hiprune,todre,fastv,transprune")
    parser.add_argument("--out", type=Path, default=Path("out/embedded"))
    given = parser.parse_args()
    rows = measure(given.n, [Fraction(part) for part in given.keep.split(",")], given.methods.split(","))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    command = f"python -m vlprune.evals.embedded --n {given.n} --keep {given.keep} --methods {given.methods}"
    facts = f"vlprune {vlprune.__version__}, torch {torch.__version__}, CPU, float32, {given.n} held-out questions, seed 0"
    (given.out / "results.md").write_text(f"`{command}`\n\n{facts}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
