"""TokenSkip from end to end: rows, LoRA tuning with the Trainer of transformers, and what the tuned model does with the ratio it is asked for.

    python examples/tokenskip_lora.py rows --model M --samples train.jsonl --compressor C --rows out/rows.jsonl
    python examples/tokenskip_lora.py train --model M --rows out/rows.jsonl --out out/tokenskip
    python examples/tokenskip_lora.py evaluate --model M --adapter out/tokenskip --samples test.jsonl --answers out/answers.jsonl

``--model`` and ``--compressor`` are folders or names that transformers loads. Samples are JSONL with ``question``, ``cot``, ``answer`` (and ``correct``, if the
chain was judged); for the evaluation ``question`` and ``answer``. Every step shows its progress and goes on where it was stopped. The defaults are the
published ones: r 8, alpha 16, all linear layers, learning rate 5e-5 with a cosine and a tenth of warm-up, 3 epochs of batches of 1 x 8, 2,048 tokens, a tenth
of the rows held out. The loss is that of the responses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vlprune.prompts.tokenskip import FAMILIES, RATIOS, build_rows, compressor, evaluate_rows, family_of, hf_generate, prompt_ids, token_limit


def encode(row: dict[str, Any], tokenizer: Any, family: str, cutoff: int) -> dict[str, list[int]]:
    """Tokens of a row in its family's chat format; only the response, with the token that closes it, is learnt."""
    front, close, end = family_of(family)
    prompt = prompt_ids(tokenizer, front + row["user"] + close)
    response = tokenizer(row["response"] + (end if end is not None else tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
    ids = (prompt + response)[:cutoff]
    return {"input_ids": ids, "labels": ([-100] * len(prompt) + response)[:cutoff]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right."""

    def padded(name: str, filler: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=filler)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.int64) for row in rows], batch_first=True)
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def train(args: argparse.Namespace) -> dict[str, float]:
    """Tune and write the adapter to ``--out``; returns the numbers of the last evaluation."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    lora = LoraConfig(r=args.r, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    tuned.print_trainable_parameters()
    rows = load_dataset("json", data_files=str(args.rows), split="train", cache_dir=str(args.out / "cache"))
    data = rows.map(lambda row: encode(row, tokenizer, args.family, args.cutoff), remove_columns=rows.column_names)
    whole = len(data)
    data = data.filter(lambda row: any(label != -100 for label in row["labels"]))
    if len(data) < whole:
        print(f"{whole - len(data)} rows are left out: their prompt alone has {args.cutoff} tokens")
    parts = data.train_test_split(test_size=args.held_out, seed=args.seed) if args.held_out else {"train": data, "test": None}
    arguments = TrainingArguments(
        output_dir=str(args.out / "run"), per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate, learning_rate=args.lr, lr_scheduler_type="cosine", warmup_steps=args.warmup,
        num_train_epochs=args.epochs, max_steps=args.max_steps, bf16=args.bf16, logging_steps=10, save_strategy="steps", save_steps=args.save_steps,
        save_total_limit=1, eval_strategy="epoch" if parts["test"] is not None else "no", report_to=[], remove_unused_columns=False, seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    if args.checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        tuned.enable_input_require_grads()                               # else nothing that is trained lies on the way back
    trainer = Trainer(model=tuned, args=arguments, train_dataset=parts["train"], eval_dataset=parts["test"], data_collator=collate)
    folder = args.out / "run"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    numbers: dict[str, float] = trainer.evaluate() if parts["test"] is not None else {}
    tuned.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "run"}
    log = {"settings": settings, "rows": len(parts["train"]), "went_on_from": last and Path(last).name, "curve": trainer.state.log_history, "held_out": numbers}
    (args.out / "tokenskip.json").write_text(json.dumps(log, indent=1) + "\n")
    return numbers


def rows(args: argparse.Namespace) -> None:
    """Make the rows."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    classifier = AutoModelForTokenClassification.from_pretrained(args.compressor).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    family = "qwen" if args.family == "plain" else args.family
    short = compressor(classifier, AutoTokenizer.from_pretrained(args.compressor), family, target_tokenizer=tokenizer)
    print(build_rows(read(args.samples), short, args.ratios, tokenizer=tokenizer, out=args.rows, seed=args.seed).report())


def evaluate(args: argparse.Namespace) -> None:
    """Ask for every ratio and print the table."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if args.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(args.adapter))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    limit: Any = args.max_new_tokens or (lambda ratio: token_limit(args.dataset, ratio, args.adapter is not None))
    found = evaluate_rows(
        read(args.samples), hf_generate(model, tokenizer, family_of(args.family)[2]), args.ratios, tokenizer=tokenizer, family=args.family, out=args.answers,
        max_new_tokens=limit, batch=args.batch, released=args.released, model=f"{args.model} {args.adapter or ''}".strip(),
    )  # fmt: skip
    print(found.markdown())


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)

    def step(name: str, run: Any) -> argparse.ArgumentParser:
        sub = steps.add_parser(name, help=run.__doc__.splitlines()[0])
        sub.set_defaults(run=run)
        sub.add_argument("--model", required=True, help="folder or name of the model to be tuned")
        sub.add_argument("--family", choices=sorted(FAMILIES), default="llama3", help="its chat format; rows for plain are compressed as for qwen")
        return sub

    made = step("rows", rows)
    made.add_argument("--samples", type=Path, required=True)
    made.add_argument("--compressor", required=True, help="token classifier, such as LLMLingua-2's")
    made.add_argument("--rows", type=Path, required=True)
    made.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    made.add_argument("--seed", type=int, default=42)

    tuned = step("train", train)
    tuned.add_argument("--rows", type=Path, required=True)
    tuned.add_argument("--out", type=Path, required=True)
    tuned.add_argument("--r", type=int, default=8)
    tuned.add_argument("--alpha", type=int, default=16)
    tuned.add_argument("--dropout", type=float, default=0.0)
    tuned.add_argument("--lr", type=float, default=5e-5)
    tuned.add_argument("--warmup", type=float, default=0.1, help="share of the steps, or their number")
    tuned.add_argument("--epochs", type=float, default=3)
    tuned.add_argument("--max-steps", type=int, default=-1)
    tuned.add_argument("--save-steps", type=int, default=100)
    tuned.add_argument("--batch", type=int, default=1)
    tuned.add_argument("--accumulate", type=int, default=8)
    tuned.add_argument("--cutoff", type=int, default=2048)
    tuned.add_argument("--held-out", type=float, default=0.1)
    tuned.add_argument("--seed", type=int, default=42)
    tuned.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    tuned.add_argument("--checkpointing", action="store_true", help="less memory, slower")

    asked = step("evaluate", evaluate)
    asked.add_argument("--adapter", type=Path)
    asked.add_argument("--samples", type=Path, required=True)
    asked.add_argument("--answers", type=Path, help="JSONL file for the answers; without it a stopped run begins anew")
    asked.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    asked.add_argument("--dataset", choices=["gsm8k", "math"], default="gsm8k", help="whose limit of new tokens")
    asked.add_argument("--max-new-tokens", type=int)
    asked.add_argument("--batch", type=int, default=8)
    asked.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    asked.add_argument("--released", action="store_true", help="the prompt with the released evaluation's line break")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
