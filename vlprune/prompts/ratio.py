"""How TokenSkip asks for a short chain of thought: the ratio behind the question, and the line that holds the answer.

Reference: TokenSkip, arXiv:2502.12067. Official code: https://github.com/hemingkx/TokenSkip (`get_llamafactory_input.py`, `evaluation.py`)

The delimiter is the literal string ``<|eot_id|>`` in the training data of every family, which on Qwen is plain text. Nothing is added at ratio 1.
In evaluation the released program puts a line break in front of it on Llama 3, which its training data do not have; ``released=True`` does so too.
"""

from __future__ import annotations

import re
from typing import Any

from vlprune.errors import OptionError, unknown

DELIMITER = "<|eot_id|>"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ANSWER_MARK = "The final answer is:"

#: Around a user's turn: what stands in front, what closes it and opens the model's, what closes that (``None``: the tokenizer's end token).
FAMILIES: dict[str, tuple[str, str, str | None]] = {
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
    ),
    "plain": ("", "\n", None),
}  # fmt: skip


def checked_ratio(ratio: Any) -> float:
    """A ratio in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise OptionError(f"ratio={ratio!r}: the share of a chain of thought that stays, above 0 and up to 1")
    return float(ratio)


def add_ratio_suffix(prompt: str, ratio: float, eos: str = DELIMITER) -> str:
    """``prompt`` with the ratio asked for: ``prompt<|eot_id|>0.5<|eot_id|>``; at ratio 1 as it is."""
    return prompt if checked_ratio(ratio) == 1 else f"{prompt}{eos}{float(ratio)}{eos}"


def user_text(question: str, ratio: float, *, instruction: str = INSTRUCTION, eos: str = DELIMITER, line_break: bool = False) -> str:
    """A user's turn: instruction, question, ratio."""
    return add_ratio_suffix((f"{instruction}\n" if instruction else "") + question + ("\n" if line_break else ""), ratio, eos)


def chat_prompt(
    question: str, ratio: float, family: str = "llama3", *, instruction: str = INSTRUCTION, eos: str = DELIMITER, released: bool = False
) -> str:
    """The whole prompt, up to where the model begins; a begin-of-text token is the tokenizer's business.

    Args:
        question: of the data set.
        ratio: asked for.
        family: one of `FAMILIES`.
        instruction: in front of the question.
        eos: the delimiter. On Llama 3 it is the end-of-turn token, so the turn ends with two of them.
        released: with the line break of the released evaluation.
    """
    front, close, _ = family_of(family)
    return front + user_text(question, ratio, instruction=instruction, eos=eos, line_break=released and family == "llama3") + close


def family_of(name: str) -> tuple[str, str, str | None]:
    """The frame of a family."""
    if name not in FAMILIES:
        raise unknown("family of chat formats", str(name), FAMILIES)
    return FAMILIES[name]


def answer_line(answer: str) -> str:
    """The line that closes every response."""
    return f"{ANSWER_MARK} $\\boxed{{{answer}}}$"


def split_answer(text: str) -> tuple[str, str | None]:
    """Chain of thought and answer of a response: the text in front of the last answer line (all of it if there is none), and what the last box holds."""
    cot, mark, rest = text.rpartition(ANSWER_MARK)
    boxed = last_box(text)
    if boxed is None and mark:
        boxed = rest.strip().strip("$").rstrip(".") or None
    return (cot if mark else text).strip(), boxed


def last_box(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, braces inside included; ``None`` where there is none that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None


def same_answer(given: str | None, wanted: str) -> bool:
    """Equal as numbers, else letter for letter without spaces, dollar signs and a final full stop. For MATH give a checker of its own."""
    if given is None:
        return False
    left, right = _plain(given), _plain(wanted)
    try:
        return abs(float(left) - float(right)) <= 1e-9 * max(1.0, abs(float(right)))
    except ValueError:
        return left == right


def _plain(text: str) -> str:
    bare = re.sub(r"\\[,!; ]|\\left|\\right|[\s$]", "", text).rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", bare).replace("\\%", "").rstrip("%")
