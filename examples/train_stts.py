"""Train STTS end to end: a small video model on moving digits, then the scorer that drops tokens inside its tower, with the Trainer of transformers.

    python examples/train_stts.py --work out/stts --out evals/results/stts

1. ``base``: the embedded picture model becomes a video model (its tower on every frame, 2 x 2 features pooled to one of 64 tokens a frame) and learns
   clips of `vlprune.evals.moving_digits`. Nothing is pruned. The tower stays as it is.
2. ``scorer``: tokens are dropped as in use, and scorer and model train together. The loss of the answers reaches the scorer through the soft key bias,
   beside the loss that pulls scores towards change. ``--frozen`` leaves the model as it is.
3. ``rival``: the same training of the model alone under EVS, so that the comparison is fair.
4. ``evaluate``: held-out questions, dense and random at the same budget first, on the model of stage 1 and on those of stages 2 and 3.

Each stage goes on where it was interrupted (the Trainer's checkpoints in ``--work``); a stage that is done is not run again. The scorer is written to
``WORK/scorer.safetensors``, ready for ``vlprune.apply(model, "stts", weights=...)`` with the model in ``WORK/scorer``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import vlprune
from vlprune.evals import moving_digits as M
from vlprune.loading import load_embedded
from vlprune.scorers.spatio_temporal import SpatioTemporalNet

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
TOKENS = 64 * M.FRAMES
LAYER = 1                                                                # of 11 blocks; the paper scores a ninth of the way up


class Words:
    """The embedded model's vocabulary and the words that clips need, as numbers."""

    def __init__(self) -> None:
        known = load_embedded().processor.tokenizer.get_vocab()
        self.number = {**known, **{word: len(known) + place for place, word in enumerate((*M.WORDS, "<video>"))}}
        self.end, self.pad, self.video = self.number["</s>"], self.number["<pad>"], self.number["<video>"]
        self.word = {number: word for word, number in self.number.items()}

    def encode(self, text: str) -> list[int]:
        """Words between spaces; ``<video>`` becomes all the tokens of a clip."""
        numbers = [self.number[word] for word in text.lower().split()]
        return [number for found in numbers for number in ([found] * TOKENS if found == self.video else [found])]

    def prompt(self, question: str) -> list[int]:
        """What stands before the answer."""
        return [self.number["<s>"], *self.encode(f"USER: <video> {question} ASSISTANT:")]


def video_model(words: Words) -> LlavaNextVideoForConditionalGeneration:
    """The embedded picture model with pooled frames and a few more words; every weight that fits is taken over."""
    old = load_embedded().model
    text = {**old.config.text_config.to_dict(), "vocab_size": len(words.number)}
    config = LlavaNextVideoConfig(
        vision_config=old.config.vision_config.to_dict(), text_config=text, image_token_index=words.number["<image>"], video_token_index=words.video,
        vision_feature_layer=-2, spatial_pool_mode="average", spatial_pool_stride=2, image_grid_pinpoints=[[128, 128]],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextVideoForConditionalGeneration(config)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in old.state_dict().items():
            own[name][tuple(slice(size) for size in value.shape)] = value                # words beyond the old ones keep their random rows
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = words.end, words.pad
    model.model.vision_tower.requires_grad_(False)
    return model


def pixels(clip: M.DigitClip) -> Tensor:
    """(T, 3, 128, 128), normalised."""
    return (torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class Clips(torch.utils.data.Dataset):
    """Training clips with all their questions one after the other, in random order; answers and their end tokens are the labels."""

    def __init__(self, words: Words, start: int, count: int) -> None:
        self.words, self.start, self.count = words, start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        clip, words = M.clip("train", self.start + index), self.words
        ids: list[int] = []
        labels: list[int] = []
        asked = M.questions(clip)
        for place in np.random.default_rng(self.start + index).permutation(len(asked)):
            question = words.prompt(asked[place].text) if not ids else words.encode(f"USER: {asked[place].text} ASSISTANT:")
            answer = [*words.encode(asked[place].answer), words.end]
            ids += question + answer
            labels += [-100] * len(question) + answer
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values_videos": pixels(clip)}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right."""

    def padded(name: str, filler: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filler)

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    videos = torch.stack([row["pixel_values_videos"] for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long(), "pixel_values_videos": videos}


class Answers(nn.Module):
    """What the Trainer trains: the model, and with it the scorer that `vlprune.apply` was given."""

    def __init__(self, model: nn.Module, scorer: SpatioTemporalNet | None = None, temporal: float = 1.0) -> None:
        super().__init__()
        self.model, self.scorer, self.temporal = model, scorer, temporal
        self.parts: dict[str, float] = {}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The loss of the answers, and the one of the scorer."""
        loss = self.model(**batch).loss
        self.parts = {"task_loss": float(loss.detach())}
        if self.scorer is not None and self.scorer.temporal_loss is not None:
            self.parts["temporal_loss"] = float(self.scorer.temporal_loss.detach())
            loss = loss + self.temporal * self.scorer.temporal_loss
            self.scorer.temporal_loss = None
        return {"loss": loss}


class Curve(TrainerCallback):
    """Adds the parts of the loss to what the Trainer logs."""

    def __init__(self, wrapped: Answers) -> None:
        self.wrapped = wrapped

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The latest step's."""
        if logs is not None and "loss" in logs:
            state.log_history[-1].update(self.wrapped.parts)


def train(wrapped: Answers, data: Clips, folder: Path, *, batch: int, lr: float, warmup: int, model_lr: float | None = None) -> list[dict[str, float]]:
    """Run the Trainer over the data once; it goes on from its last checkpoint."""
    steps = math.ceil(len(data) / batch)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=warmup,
        max_grad_norm=1.0, weight_decay=0.0, logging_steps=max(steps // 60, 1), save_steps=max(steps // 6, 1), save_total_limit=1, report_to=[],
        remove_unused_columns=False, label_names=["labels"], seed=0, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    parts = [(wrapped.model, lr if model_lr is None else model_lr), (wrapped.scorer, lr)]
    groups = [{"params": [weight for weight in part.parameters() if weight.requires_grad], "lr": rate} for part, rate in parts if part is not None]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    trainer = Trainer(
        model=wrapped, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Curve(wrapped)], optimizers=(optimizer, None)
    )  # fmt: skip
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def load(work: Path, stage: str = "base") -> LlavaNextVideoForConditionalGeneration:
    """The model that a stage left."""
    if not (work / stage / "config.json").exists():
        raise SystemExit(f"there is no video model in {work / stage}; run --stage {stage} first")
    return LlavaNextVideoForConditionalGeneration.from_pretrained(work / stage)


def run_base(words: Words, args: argparse.Namespace) -> None:
    """Stage 1."""
    if (args.work / "base.json").exists():
        return print("base: done already")
    started, model = time.time(), video_model(words)
    curve = train(Answers(model.train()), Clips(words, 0, args.base_clips), args.work / "base_run", batch=args.batch, lr=args.base_lr, warmup=20)
    model.save_pretrained(args.work / "base")
    note(args.work / "base.json", curve, started, clips=args.base_clips, batch=args.batch, lr=args.base_lr)


def run_scorer(words: Words, args: argparse.Namespace) -> None:
    """Stage 2."""
    if (args.work / "scorer.json").exists():
        return print("scorer: done already")
    model = load(args.work)
    tower = model.config.vision_config
    torch.manual_seed(1)
    scorer = SpatioTemporalNet(tower.hidden_size, tower.num_attention_heads, tower.intermediate_size, LAYER)
    scorer.save(args.work / "untrained.safetensors")
    with vlprune.apply(model, "stts", keep=args.keep, weights=scorer):
        train_pruned("scorer", words, Answers(model, scorer, args.temporal), args)
    scorer.save(args.work / "scorer.safetensors")


def run_rival(words: Words, args: argparse.Namespace) -> None:
    """Stage 3."""
    if (args.work / "rival.json").exists() or args.frozen:
        return print("rival: done already" if not args.frozen else "rival: nothing to train")
    model = load(args.work)
    with vlprune.apply(model, "evs", keep=args.keep):
        train_pruned("rival", words, Answers(model), args)


def train_pruned(stage: str, words: Words, wrapped: Answers, args: argparse.Namespace) -> None:
    """Train under a pruned model, on clips that stage 1 has not seen."""
    started = time.time()
    wrapped.model.requires_grad_(not args.frozen)
    data = Clips(words, args.base_clips, args.scorer_clips)
    curve = train(wrapped, data, args.work / f"{stage}_run", batch=args.batch, lr=args.scorer_lr, warmup=10, model_lr=args.model_lr)
    if not args.frozen:
        wrapped.model.save_pretrained(args.work / stage)
    settings = {"clips": args.scorer_clips, "batch": args.batch, "model_lr": 0.0 if args.frozen else args.model_lr, "keep": args.keep}
    if wrapped.scorer is not None:
        settings |= {"lr": args.scorer_lr, "temporal": args.temporal}
    note(args.work / f"{stage}.json", curve, started, **settings)


def note(path: Path, curve: list[dict[str, float]], started: float, **settings: Any) -> None:
    """Settings and curve of a stage."""
    path.write_text(json.dumps({"settings": settings, "seconds": round(time.time() - started), "curve": curve}, indent=1) + "\n")


@torch.no_grad()
def answers(model: nn.Module, words: Words, pairs: list[Any], batch: int = 20) -> list[bool]:
    """Whether each answer is right: the right word, then the end."""
    right = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        prompts = [words.prompt(question.text) for _, question in part]
        length = max(map(len, prompts))
        ids = torch.tensor([[words.pad] * (length - len(prompt)) + prompt for prompt in prompts])
        given = {"input_ids": ids, "attention_mask": (ids != words.pad).long(), "pixel_values_videos": torch.stack([pixels(clip) for clip, _ in part])}
        said = model.generate(**given, max_new_tokens=2, do_sample=False)[:, length:].tolist()
        right += [answer == [*words.encode(question.answer), words.end] for answer, (_, question) in zip(said, part, strict=True)]
    return right


def run_evaluation(words: Words, args: argparse.Namespace) -> None:
    """Stage 4."""
    pairs = M.heldout_questions(args.n)
    rows: list[dict[str, Any]] = []

    def measure(model: nn.Module, stage: str, label: str, name: str, keep: float, **options: Any) -> None:
        began = time.time()
        with vlprune.apply(model, name, keep=keep, **options) as handle:
            right = answers(model, words, pairs)
            report = handle.report()
        share = report.flops_pruned / report.flops_dense if report.flops_dense else 1.0
        kinds = {kind: [hit for hit, (_, question) in zip(right, pairs, strict=True) if question.kind == kind] for kind in M.KINDS}
        by_kind = {kind: float(np.mean(hits)) for kind, hits in kinds.items() if hits}
        numbers = {"accuracy": float(np.mean(right)), "kinds": by_kind, "flops": share, "seconds": round(time.time() - began, 1)}
        rows.append({"model": stage, "method": label, "keep": keep, "tokens": round(keep * TOKENS), **numbers, "right": right})
        print(f"{stage:<8}{label:<18} keep {keep:.3f}  {rows[-1]['accuracy']:.3f}  FLOPs {share:.2f}", flush=True)

    trained, untrained = (args.work / f"{name}.safetensors" for name in ("scorer", "untrained"))
    base = load(args.work).eval()
    measure(base, "base", "dense", "dense", 1.0)
    for keep in args.keeps:
        for name in ("random", "uniform", "evs"):
            measure(base, "base", name, name, keep)
        measure(base, "base", "stts, untrained", "stts", keep, weights=untrained)
        measure(base, "base", "stts", "stts", keep, weights=trained)
    for stage, own in (("scorer", "stts"), ("rival", "evs")):
        if (args.work / stage / "config.json").exists():
            model = load(args.work, stage).eval()
            measure(model, stage, "dense", "dense", 1.0)
            for keep in args.keeps:
                measure(model, stage, "random", "random", keep)
                measure(model, stage, own, own, keep, **({"weights": trained} if own == "stts" else {}))
    write(rows, args)


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Results folder: numbers, table, curve."""
    args.out.mkdir(parents=True, exist_ok=True)
    n, dense = args.n, rows[0]["right"]
    kinds = list(rows[0]["kinds"])
    head = ["model", "method", "keep", "tokens", "accuracy", "gained / lost against dense", "FLOPs of dense", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---" + "|---:" * (len(head) - 2) + "|"]
    for row in rows:
        error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / n)
        gained = sum(a and not b for a, b in zip(row["right"], dense, strict=True))
        lost = sum(b and not a for a, b in zip(row["right"], dense, strict=True))
        accuracy, change = f"{row['accuracy']:.3f} ± {error:.3f}", f"{gained} / {lost}"
        cells = [row["model"], row["method"], f"{row['keep']:.3g}", row["tokens"], accuracy, change, f"{row['flops']:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *(f"{row['kinds'][kind]:.2f}" for kind in kinds)])) + " |")
    stages = {name: json.loads((args.work / f"{name}.json").read_text()) for name in ("base", "scorer", "rival") if (args.work / f"{name}.json").exists()}
    about = "; ".join(f"{name}: {stage['settings']}, {stage['seconds']} s" for name, stage in stages.items())
    text = [
        f"`python examples/train_stts.py --n {n}`; what else was tried: `NOTES.md`", "",
        f"vlprune {vlprune.__version__}, torch {torch.__version__}, CPU, float32, {n} held-out questions, one a clip, kinds in turn. {about}.", "",
        f"One clip has {TOKENS} visual tokens, 64 of them in the first frame. \"untrained\": the same net with random weights; it keeps that frame too. "
        "Models: \"base\" was trained without pruning, \"scorer\" went on with the scorer under stts, \"rival\" likewise under evs.",
        "", *lines, "",
    ]  # fmt: skip
    (args.out / "results.md").write_text("\n".join(text))
    kept = [{key: value for key, value in row.items() if key != "right"} for row in rows]
    (args.out / "results.json").write_text(json.dumps({"n": n, "rows": kept, "stages": stages}, indent=1) + "\n")
    plot(stages, args.out / "curve.png")


def plot(stages: dict[str, Any], path: Path) -> None:
    """The losses of both stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, max(len(stages), 1), figsize=(9, 3), squeeze=False)
    for axis, (name, stage) in zip(axes[0], stages.items(), strict=False):
        for key in ("task_loss", "temporal_loss"):
            points = [(entry["step"], entry[key]) for entry in stage["curve"] if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=key.replace("_", " "))
        axis.set(title=name, xlabel="step", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", "base", "scorer", "rival", "evaluate"), default="all")
    parser.add_argument("--work", type=Path, default=Path("out/stts"), help="folder for models and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("out/stts/results"), help="folder for the results")
    parser.add_argument("--base-clips", type=int, default=7200)
    parser.add_argument("--scorer-clips", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument("--scorer-lr", type=float, default=5e-4)
    parser.add_argument("--model-lr", type=float, default=2e-4, help="of the model while it trains along")
    parser.add_argument("--temporal", type=float, default=20.0, help="factor on the loss that pulls scores towards change")
    parser.add_argument("--keep", type=float, default=1 / 3, help="share of a clip's tokens while the scorer trains")
    parser.add_argument("--keeps", type=float, nargs="+", default=[1 / 3, 1 / 4], help="shares to measure")
    parser.add_argument("--frozen", action="store_true", help="train the scorer only")
    parser.add_argument("--n", type=int, default=400, help="number of held-out questions")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    words = Words()
    for name, run in (("base", run_base), ("scorer", run_scorer), ("rival", run_rival), ("evaluate", run_evaluation)):
        if args.stage in ("all", name):
            run(words, args)


if __name__ == "__main__":
    main()
