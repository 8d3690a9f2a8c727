"""What a model does with the ratio it is asked for: accuracy, tokens of the chain of thought, seconds, ratio reached against ratio asked.

Reference: TokenSkip, arXiv:2502.12067. Official code: https://github.com/hemingkx/TokenSkip (`evaluation.py`)

Ratio 1 is always asked for, and first: the ratio reached is the mean number of tokens over that at ratio 1. The tokens are those in front of the answer
line; where a response has none (cut off by the limit, say), all of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlprune.errors import OptionError
from vlprune.prompts.llmlingua2 import count_tokens
from vlprune.prompts.ratio import DELIMITER, INSTRUCTION, chat_prompt, checked_ratio, same_answer, split_answer
from vlprune.prompts.rows import Rows, digest

#: ``(prompts, most new tokens) -> responses``
Generate = Callable[[Sequence[str], int], Sequence[str]]
LIMITS = {"gsm8k": 512, "math": 1024}


def token_limit(dataset: str, ratio: float = 1.0, tuned: bool = True) -> int:
    """The published most new tokens: 512 on GSM8K, 1024 on MATH, there times the ratio for the tuned model."""
    if dataset not in LIMITS:
        raise OptionError(f"dataset={dataset!r}: {' or '.join(map(repr, LIMITS))}; for others give a number")
    return int(LIMITS[dataset] * checked_ratio(ratio)) if dataset == "math" and tuned else LIMITS[dataset]


@dataclass(frozen=True)
class Evaluation:
    """Answers, and their numbers by ratio.

    Attributes:
        rows: one for each ratio and sample: ``id``, ``ratio``, ``right``, ``tokens``, ``seconds``, ``answer``, ``output``.
    """

    rows: list[dict[str, Any]]

    def summary(self) -> list[dict[str, float]]:
        """For each ratio, from 1 down: accuracy with its standard error, mean tokens and seconds, the ratio reached."""
        out: list[dict[str, float]] = []
        for ratio in sorted({row["ratio"] for row in self.rows}, reverse=True):
            own = [row for row in self.rows if row["ratio"] == ratio]
            accuracy, tokens, seconds = (sum(float(row[name]) for row in own) / len(own) for name in ("right", "tokens", "seconds"))
            error = math.sqrt(accuracy * (1 - accuracy) / len(own))
            whole = out[0]["tokens"] if out else tokens
            numbers = {"accuracy": accuracy, "error": error, "tokens": tokens, "seconds": seconds, "reached": tokens / whole if whole else math.nan}
            out.append({"ratio": ratio, "n": len(own), **numbers})
        return out

    def markdown(self) -> str:
        """The same as a table."""
        lines = ["| ratio asked | reached | accuracy | CoT tokens | seconds a sample | n |", "|---|---|---|---|---|---|"]
        for row in self.summary():
            right = f"{100 * row['accuracy']:.1f} ± {100 * row['error']:.1f}"
            lines.append(f"| {row['ratio']:g} | {row['reached']:.3f} | {right} | {row['tokens']:.1f} | {row['seconds']:.3f} | {row['n']:.0f} |")
        return "\n".join(lines)


def evaluate_rows(
    samples: Sequence[Mapping[str, Any]], generate: Generate, ratios: Sequence[float], *, tokenizer: Any, family: str = "llama3",
    out: str | os.PathLike[str] | None = None, max_new_tokens: int | Callable[[float], int] = 512, batch: int = 8,
    same: Callable[[str | None, str], bool] = same_answer, instruction: str = INSTRUCTION, eos: str = DELIMITER,
    released: bool = False, model: str = "", progress: bool = True,
) -> Evaluation:  # fmt: skip
    """Ask every question at every ratio.

    Args:
        samples: ``question`` and ``answer``; ``id`` is optional.
        generate: writes greedily; `hf_generate` is one.
        ratios: asked for; 1 is added.
        tokenizer: of the model, or a callable ``str -> int``: counts tokens.
        family: of the chat format (`vlprune.prompts.ratio.FAMILIES`).
        out: JSONL file that answers are written to as they come; a run that was stopped goes on, with the seconds that were measured then.
        max_new_tokens: a number, or by ratio: ``lambda ratio: token_limit("math", ratio)``.
        batch: questions at a time; a sample's seconds are its share of the batch's.
        same: whether the boxed answer (``None``: there is none) is the right one.
        instruction: in front of each question.
        eos: delimiter of the ratio.
        released: the prompt with the released evaluation's line break.
        model: name of the model, so that two models' answers never mix in a file.
        progress: whether a bar is shown.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise OptionError(f"batch={batch!r}: questions at a time, an int from 1")
    if not samples:
        raise OptionError("there are no samples to evaluate on")
    asked = sorted({1.0, *map(checked_ratio, ratios)}, reverse=True)
    pairs = [(str(sample["question"]), str(sample["answer"])) for sample in samples]
    limits = {ratio: max_new_tokens(ratio) if callable(max_new_tokens) else max_new_tokens for ratio in asked}
    setup = {
        "what": "vlprune tokenskip answers", "samples": digest(pairs), "ratios": asked, "family": family, "limits": [limits[ratio] for ratio in asked],
        "instruction": instruction, "eos": eos, "released": released, "model": model,
    }  # fmt: skip
    rows = Rows(out, setup)
    todo = [(ratio, number) for ratio in asked for number in range(len(pairs))]
    with _bar(progress, len(todo)) as advance:
        advance(len(rows))
        while len(rows) < len(todo):
            ratio = todo[len(rows)][0]
            part = [number for at, number in todo[len(rows) : len(rows) + batch] if at == ratio]
            prompts = [chat_prompt(pairs[number][0], ratio, family, instruction=instruction, eos=eos, released=released) for number in part]
            began = time.perf_counter()
            outputs = list(generate(prompts, limits[ratio]))
            seconds = (time.perf_counter() - began) / len(part)
            if len(outputs) != len(part):
                raise OptionError(f"generate gave {len(outputs)} responses to {len(part)} prompts")
            new = []
            for number, output in zip(part, outputs, strict=True):
                cot, answer = split_answer(output)
                right, tokens = bool(same(answer, pairs[number][1])), count_tokens(tokenizer, [cot])[0]
                identity = samples[number].get("id", number)
                new.append({"id": identity, "ratio": ratio, "right": right, "tokens": tokens, "seconds": seconds, "answer": answer, "output": output})
            rows.extend(new)
            advance(len(new))
    return Evaluation(rows.rows)


def hf_generate(model: Any, tokenizer: Any, stop: str | None = None) -> Generate:
    """Greedy writing by a Hugging Face model, batches padded on the left.

    Args:
        model: with ``generate``.
        tokenizer: its own.
        stop: a token that ends the response beside the model's own.
    """
    import torch

    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if filler is None:
        raise OptionError("the tokenizer has neither a pad token nor an end token; set tokenizer.pad_token")
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, None if stop is None else tokenizer.convert_tokens_to_ids(stop)]
    stops = sorted({int(end) for end in ends if end is not None})

    def generate(prompts: Sequence[str], limit: int) -> Sequence[str]:
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        length = max(map(len, ids))
        given = torch.tensor([[filler] * (length - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=model.device)
        with torch.inference_mode():
            said = model.generate(
                input_ids=given, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=filler, eos_token_id=stops or None,
            )  # fmt: skip
        written: list[str] = tokenizer.batch_decode(said[:, length:], skip_special_tokens=True)
        return written

    return generate


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, open at its end: some tokenizers close every text."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    closed = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(str(tokenizer.eos_token))
    return ids[:-1] if closed else ids


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not wanted) as progress:
        task = progress.add_task("evaluate", total=total)
        yield lambda number: progress.advance(task, number)
