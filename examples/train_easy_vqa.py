"""Teaches the embedded picture model easy-VQA (drawn shapes, 13 answers), on a CPU, so that real questions can be asked under pruning.

    python examples/train_easy_vqa.py --data easy_vqa/data --minutes 20 --out out/easy_vqa
    vlprune eval --model out/easy_vqa --benchmarks easy-vqa --data easy_vqa/data --methods hiprune,fastv --keep 1/3,1/9

The data are those of github.com/vzhou842/easy-VQA (MIT): ``train`` and ``test`` with ``questions.json`` and ``images``, and ``answers.txt``. All weights are
trained, the tower at a third of the rate. The words that the embedded model does not know are added behind its own. A stopped run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_tiny_vlm import optimisers, pack, packed_logits, schedule, tower_features

from vlprune.loading import ASSETS

ROOM = 112                                                               # tokens of questions a picture


def words_of(question: str) -> list[str]:
    """As the tokenizer splits them."""
    return question.lower().replace("?", " ?").split()


def read(data: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers by picture."""
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in json.loads((data / split / "questions.json").read_text()):
        found[picture].append((question, answer))
    return dict(found)


def grown(words: set[str]):
    """The embedded model and its processor, with these words in its vocabulary."""
    from tokenizers import Tokenizer
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(ASSETS)
    model = LlavaForConditionalGeneration.from_pretrained(ASSETS, dtype=torch.float32)
    raw = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    known = raw["model"]["vocab"]
    for word in sorted(words - set(known)):
        known[word] = len(known)
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(raw))
    torch.manual_seed(0)
    model.resize_token_embeddings(len(known), mean_resizing=False)
    return model, processor


def pixels(processor, data: Path, split: str, numbers: list[int]) -> torch.Tensor:
    """(N, 3, H, W) as the model sees them."""
    pictures = [Image.open(data / split / "images" / f"{number}.png").convert("RGB") for number in numbers]
    return processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def packed(processor, asked: list[list[tuple[str, str]]], room: int):
    """Token ids, targets and owners (N, T) of the questions of each picture."""
    tokenizer = processor.tokenizer
    end, assistant = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("assistant:")

    def ids(question: str, answer: str) -> tuple[list[int], int]:
        return [*tokenizer.convert_tokens_to_ids(words_of(question)), assistant], tokenizer.convert_tokens_to_ids(answer)

    rows = [pack([ids(*one) for one in questions], end, room) for questions in asked]
    return [torch.from_numpy(np.stack(part)).long() for part in zip(*rows, strict=True)]


@torch.no_grad()
def accuracy(model, processor, data: Path, split: str, most: int, batch: int = 25) -> float:
    """Share of questions about the first ``most`` pictures whose answer and end are both the likeliest tokens."""
    found = read(data, split)
    numbers = sorted(found)[:most]
    right = []
    for first in range(0, len(numbers), batch):
        part = numbers[first : first + batch]
        ids, targets, owner = packed(processor, [found[number] for number in part], 2 * ROOM)
        said = packed_logits(model, tower_features(model.model.vision_tower, pixels(processor, data, split, part)), ids, owner).argmax(-1)
        asked = targets != -100
        hits = (said == targets)[asked].view(-1, 2).all(dim=1)
        right += hits.tolist()
    return float(np.mean(right))


def train(data: Path, out: Path, minutes: float, steps: int | None, batch: int, lr: float) -> None:
    """Train until the time is spent, or so many steps are done, then write the model."""
    found = read(data, "train")
    answers = set((data / "answers.txt").read_text().split())
    model, processor = grown(answers | {word for questions in found.values() for question, _ in questions for word in words_of(question)})
    tower = optimisers([model.model.vision_tower], lr / 3)
    rest = optimisers([model.model.language_model, model.model.multi_modal_projector, model.lm_head], lr)
    rates = [lr / 3] * len(tower) + [lr] * len(rest)
    opts, step, spent, curve = [*tower, *rest], 0, 0.0, []
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        for one, state in zip(opts, saved["opts"], strict=True):
            one.load_state_dict(state)
        step, spent, curve = saved["step"], saved["spent"], saved["curve"]
    parameters = [p for one in opts for group in one.param_groups for p in group["params"]]
    numbers, start, shown, losses = np.array(sorted(found)), time.time() - spent, time.time(), []
    while (fraction := (time.time() - start) / (60 * minutes) if steps is None else step / steps) < 1:
        rng = np.random.default_rng((5, step))
        part = [int(number) for number in rng.choice(numbers, batch, replace=False)]
        asked = [[found[number][k] for k in rng.permutation(len(found[number]))] for number in part]
        ids, targets, owner = packed(processor, asked, ROOM)
        logits = packed_logits(model, tower_features(model.model.vision_tower, pixels(processor, data, "train", part)), ids, owner)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for one, rate in zip(opts, rates, strict=True):
            one.param_groups[0]["lr"] = rate * schedule(fraction, step)
            one.step()
            one.zero_grad()
        losses.append(loss.item())
        step += 1
        if time.time() - shown > 120:
            row = {"step": step, "minutes": round((time.time() - start) / 60, 2), "loss": round(float(np.mean(losses)), 4)}
            curve.append({**row, "test": round(accuracy(model, processor, data, "test", 60), 4)})
            print(json.dumps(curve[-1]), flush=True)
            losses = []
            states = [one.state_dict() for one in opts]
            torch.save({"model": model.state_dict(), "opts": states, "step": step, "spent": time.time() - start, "curve": curve}, checkpoint)
            shown = time.time()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    settings = {"minutes": minutes, "batch": batch, "lr": lr, "steps": step, "torch": torch.__version__}
    (out / "SETTINGS.json").write_text(json.dumps({**settings, "curve": curve}, indent=1) + "\n")
    print(json.dumps({"steps": step, "test": accuracy(model, processor, data, "test", 1000)}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data folder of easy-VQA")
    parser.add_argument("--out", type=Path, default=Path("out/easy_vqa"), help="model folder, with the checkpoint in it")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    if not (given.data / "train" / "questions.json").exists():
        parser.error(f"--data {str(given.data)!r}: there is no train/questions.json in it")
    given.out.mkdir(parents=True, exist_ok=True)
    train(given.data, given.out, given.minutes, given.steps, given.batch, given.lr)


if __name__ == "__main__":
    main()
