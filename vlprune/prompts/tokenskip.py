"""TokenSkip: teach a model to write a shorter chain of thought by a ratio that it is asked for. The data, the format, the evaluation.

Reference: TokenSkip, arXiv:2502.12067.
Official code: https://github.com/hemingkx/TokenSkip (`LLMLingua.py`, `get_llamafactory_input.py`, `evaluation.py`)

Chains of thought that the model itself wrote (greedily, on a training set) are filtered, each is compressed to a ratio drawn for its question, and the model
is tuned on them (``examples/tokenskip_lora.py``); then `evaluate_rows` asks for each ratio and looks at what comes. Nothing is hooked at inference.

Differences:
- A chain is compressed to the drawn ratio only (released: to all of them, then one is drawn); the rows are the same, for a sixth of the work.
- Ratios and order come from Python's own generator, so seed 42 does not draw what the released program draws.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlprune.errors import OptionError
from vlprune.prompts.api import compress as compress_prompt
from vlprune.prompts.api import tracked
from vlprune.prompts.compressed import Compressed
from vlprune.prompts.llmlingua2 import LLMLingua2, count_tokens
from vlprune.prompts.ratio import (
    DELIMITER,
    FAMILIES,
    INSTRUCTION,
    add_ratio_suffix,
    answer_line,
    chat_prompt,
    checked_ratio,
    family_of,
    same_answer,
    split_answer,
    user_text,
)
from vlprune.prompts.rows import Rows, digest
from vlprune.prompts.tokenskip_eval import Evaluation, evaluate_rows, hf_generate, prompt_ids, token_limit

__all__ = [
    "COMPRESS", "DELIMITER", "FAMILIES", "INSTRUCTION", "MAX_TOKENS", "RATIOS", "Evaluation", "RowSet", "add_ratio_suffix", "answer_line", "build_rows",
    "chat_prompt", "compressor", "draw_ratios", "evaluate_rows", "family_of", "hf_generate", "prompt_ids", "split_answer", "token_limit", "user_text",
]  # fmt: skip

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
MAX_TOKENS = 500
SEED = 42

#: How chains of thought are compressed for a family of models.
COMPRESS: dict[str, dict[str, Any]] = {
    "llama3": {"force_tokens": ("Step", ":"), "drop_consecutive": True, "protect_numbers": True},
    "qwen": {"protect_numbers": False},
}

#: ``(chain of thought, ratio) -> shorter one``
Compress = Callable[[str, float], "str | Compressed"]


@dataclass(frozen=True)
class RowSet:
    """Rows for training.

    Attributes:
        rows: ``id``, ``user`` (with the ratio asked for), ``response``, ``ratio``, ``reached`` (share of tokens), ``cot_tokens``, ``kept_tokens``, ``answer``.
        left_out: how many samples were left out, by reason.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """One line a ratio: rows, and the mean share of tokens reached."""
        lines = [f"{len(self.rows)} rows; left out: " + (", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none")]
        for ratio in sorted({row["ratio"] for row in self.rows}, reverse=True):
            there = [row["reached"] for row in self.rows if row["ratio"] == ratio]
            lines.append(f"  ratio {ratio}: {len(there)} rows, {sum(there) / len(there):.3f} of the tokens")
        return "\n".join(lines)


def compressor(classifier: Any, tokenizer: Any = None, family: str = "llama3", **options: Any) -> Compress:
    """LLMLingua-2 with the settings of a family (`COMPRESS`); ``options`` go before them."""
    if family not in COMPRESS:
        raise OptionError(f"family={family!r}: settings are known for {', '.join(COMPRESS)}; for others build a compressor with vlprune.prompts.compress")
    chosen = {**COMPRESS[family], **options}
    numbers = bool(chosen.pop("protect_numbers"))
    transform = LLMLingua2(classifier, tokenizer, **chosen)
    return lambda text, keep: compress_prompt(text, transform, keep, protect_numbers=numbers)


def draw_ratios(number: int, ratios: Sequence[float] = RATIOS, seed: int = SEED) -> list[float]:
    """One ratio for each question, uniformly."""
    if not ratios:
        raise OptionError("ratios is empty: at least one ratio is wanted")
    choices, draw = [checked_ratio(ratio) for ratio in ratios], random.Random(seed)
    return [draw.choice(choices) for _ in range(number)]


def build_rows(
    samples: Sequence[Mapping[str, Any]], compress: Compress, ratios: Sequence[float] = RATIOS, *, tokenizer: Any, out: str | os.PathLike[str] | None = None,
    max_tokens: int = MAX_TOKENS, seed: int = SEED, instruction: str = INSTRUCTION, eos: str = DELIMITER, progress: bool = True,
) -> RowSet:  # fmt: skip
    """Make the rows that a model is tuned on.

    Args:
        samples: ``question``, ``cot`` (the chain of thought, with or without its answer line) and ``answer``; if there is ``correct`` it says whether the
            chain led to the answer, else its box is compared with the answer. ``id`` is optional.
        compress: shortens a chain of thought; `compressor` has the published settings.
        ratios: to draw from, one for each question.
        tokenizer: of the model to be tuned, or a callable ``str -> int``: counts tokens.
        out: JSONL file that rows are written to as they are made; a run that was stopped goes on. ``datasets.load_dataset("json", data_files=out)`` reads it.
        max_tokens: longer chains are left out.
        seed: of ratios and order.
        instruction: in front of each question.
        eos: delimiter of the ratio.
        progress: whether a bar is shown.

    Raises:
        OptionError: a sample lacks something, or the file belongs to other data or settings.
    """
    good, left_out = _filtered(samples, tokenizer, max_tokens)
    drawn = draw_ratios(len(good), ratios, seed)
    order = list(range(len(good)))
    random.Random(seed).shuffle(order)
    setup = {
        "what": "vlprune tokenskip rows", "samples": digest(good), "ratios": [float(ratio) for ratio in ratios], "seed": seed, "instruction": instruction,
        "eos": eos, "max_tokens": max_tokens,
    }  # fmt: skip
    rows = Rows(out, setup)
    for place in tracked(order[len(rows) :], "compress", progress):
        sample, ratio = good[place], drawn[place]
        short = sample["cot"] if ratio == 1 else str(compress(sample["cot"], ratio)).strip()
        kept = sample["tokens"] if ratio == 1 else count_tokens(tokenizer, [short])[0]
        row = {
            "id": sample["id"], "user": user_text(sample["question"], ratio, instruction=instruction, eos=eos),
            "response": f"{short}\n\n{answer_line(sample['answer'])}", "ratio": ratio, "reached": kept / max(sample["tokens"], 1),
            "cot_tokens": sample["tokens"], "kept_tokens": kept, "answer": sample["answer"],
        }  # fmt: skip
        rows.extend([row])
    return RowSet(rows.rows, left_out)


def _filtered(samples: Sequence[Mapping[str, Any]], tokenizer: Any, max_tokens: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Samples that stay, with their token counts, and how many left, by reason."""
    good: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for number, sample in enumerate(samples):
        missing = [name for name in ("question", "cot", "answer") if sample.get(name) is None]
        if missing:
            raise OptionError(f"sample {number} has no {', '.join(missing)}; it has {', '.join(map(str, sample))}")
        cot, boxed = split_answer(str(sample["cot"]))
        correct = sample.get("correct")
        if correct is None and boxed is None:
            raise OptionError(f"sample {number} says neither whether it is correct nor, in a \\boxed{{}}, what its chain led to; add 'correct'")
        correct = same_answer(boxed, str(sample["answer"])) if correct is None else bool(correct)
        tokens = count_tokens(tokenizer, [cot])[0]
        reason = "wrong" if not correct else "empty" if not cot else f"above {max_tokens} tokens" if tokens > max_tokens else ""
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            question, answer = str(sample["question"]), str(sample["answer"])
            good.append({"id": sample.get("id", number), "question": question, "cot": cot, "answer": answer, "tokens": tokens})
    return good, left_out
