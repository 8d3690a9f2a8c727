"""Trains the small decoder in ``vlprune/assets/tiny_recall`` from random weights on associative recall over up to 2,048 tokens, on a CPU.

    python examples/train_tiny_recall.py --minutes 30
    python examples/train_tiny_recall.py --evaluate

Short texts first: a step's texts grow once the model answers most questions about shorter ones. Stopped runs go on from their checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_tiny_vlm import Muon, schedule

from vlprune.evals import recall

ASSETS = Path(__file__).resolve().parents[1] / "vlprune" / "assets" / "tiny_recall"
LENGTHS = (48, 64, 128, 256, 512, 1024, 2048)                            # the first of nothing but repeated pairs
STEP_TOKENS = 4096
WIDTH, LAYERS, HEADS = 64, 6, 2


def new_model() -> Any:
    """A Llama of width 64 with 6 layers and random weights; embeddings and head are separate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recall.VOCABULARY, hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=4096, pad_token_id=recall.PAD, bos_token_id=recall.BOS, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.5 if "embed" in name else 0.06)
    return model


def batch(split: str, first: int, count: int, length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L + 3 pairs): the text, then ``? key value`` as often as there are pairs; and targets, -100 but for the values.

    Pairs are asked for at random, some more than once: asked in turn, a model learns for a long time to exclude what was asked, and not to look.
    """
    ids, targets = [], []
    for index in range(first, first + count):
        drawn = recall.text(split, index, length=length, pairs=pairs)
        order = np.random.default_rng((79, index)).integers(0, pairs, pairs)
        keys, values = drawn.keys[order], drawn.values[order]
        asked = np.stack([np.full(pairs, recall.QUESTION), keys, values], axis=1).reshape(-1)
        row = np.concatenate([drawn.context, asked])
        target = np.full(row.size, -100)
        target[length + 1 :: 3] = values
        ids.append(row)
        targets.append(target)
    return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(targets))


def repeated(first: int, count: int, length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) of nothing but pairs, drawn again and again, and targets for every value whose key was there before: how looking is learned at all."""
    ids, targets = [], []
    for index in range(first, first + count):
        rng = np.random.default_rng((80, index))
        keys, values = recall.FIRST_KEY + rng.permutation(recall.KEYS)[:pairs], recall.FIRST_VALUE + rng.integers(0, recall.VALUES, pairs)
        order = rng.integers(0, pairs, length // 2)
        target = np.full(2 * len(order), -100)
        seen = [number in order[:place] for place, number in enumerate(order)]
        target[::2] = np.where(seen, values[order], -100)
        ids.append(np.stack([keys[order], values[order]], axis=1).reshape(-1))
        targets.append(target)
    return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(targets))


def forward(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and share of right answers at the questions."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[targets >= 0]
    logits, right = model.lm_head(hidden), targets[targets >= 0]
    return F.cross_entropy(logits, right), (logits.argmax(-1) == right).float().mean()


def train(folder: Path, minutes: float, lr: float) -> Any:
    """Train until the time is over."""
    torch.manual_seed(0)
    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers." in name)]
    opts = [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    path, step, spent, level, drawn, curve = folder / "recall.pt", 0, 0.0, 0, 0, []
    if path.exists():
        saved = torch.load(path, weights_only=False)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        step, spent, level, drawn, curve = (saved[name] for name in ("step", "spent", "level", "drawn", "curve"))
    started, shown, recent = time.time() - spent, time.time(), []
    while (fraction := (time.time() - started) / (60 * minutes)) < 1.0:
        shorter = bool(level) and step % 3 == 0
        length = LENGTHS[level - 1 if shorter else level]
        pairs = min(recall.PAIRS, length // 6)
        count = max(1, STEP_TOKENS // (length + 3 * pairs))
        ids, targets = repeated(drawn, count, length, pairs) if level == 0 else batch("train", drawn, count, length, pairs)
        drawn += count
        loss, right = forward(model, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr * schedule(fraction, step)
            opt.step()
            opt.zero_grad()
        step += 1
        if not shorter:
            recent = [*recent[-19:], right.item()]
        if len(recent) == 20 and np.mean(recent) > 0.9 and level < len(LENGTHS) - 1:
            level, recent = level + 1, []
        if time.time() - shown > 20:
            shown = time.time()
            row = {"step": step, "minutes": round((shown - started) / 60, 2), "length": LENGTHS[level], "loss": round(loss.item(), 4)}
            row["right"] = round(float(np.mean(recent)) if recent else right.item(), 4)
            curve.append(row)
            print(json.dumps(row), flush=True)
            torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step, "spent": shown - started, "level": level,
                        "drawn": drawn, "curve": curve}, path)  # fmt: skip
    settings = {"minutes": minutes, "lr": lr, "steps": step, "texts": drawn, "step_tokens": STEP_TOKENS, "seed": 0, "torch": torch.__version__}
    model.to(torch.float16).save_pretrained(ASSETS)
    (ASSETS / "SETTINGS.json").write_text(json.dumps(settings, indent=1) + "\n")
    (ASSETS / "training_curve.json").write_text(json.dumps(curve) + "\n")
    return model


@torch.no_grad()
def evaluate(count: int) -> dict[str, float]:
    """Share of right answers to one held-out question a text, by length."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()
    found = {}
    for length in (512, 1024, 2048):
        right = 0
        for index in range(count):
            drawn = recall.text("heldout", index, length=length)
            logits = model(input_ids=torch.from_numpy(recall.prompt(drawn))[None], logits_to_keep=1).logits
            right += int(logits[0, -1].argmax() == int(drawn.values[0]))
        found[str(length)] = right / count
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--work", type=Path, default=Path("out/recall"), help="checkpoint and log")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--n", type=int, default=200)
    given = parser.parse_args()
    if given.evaluate:
        print(json.dumps(evaluate(given.n)))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    ASSETS.mkdir(parents=True, exist_ok=True)
    train(given.work, given.minutes, given.lr)


if __name__ == "__main__":
    main()
