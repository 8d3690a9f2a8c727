"""Prompt methods by name, for tables and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlprune.errors import OptionError, unknown
from vlprune.prompts.frugalprompt import FrugalPrompt
from vlprune.prompts.llmlingua2 import LLMLingua2


@dataclass(frozen=True)
class PromptCard:
    """A frozen entry.

    Attributes:
        needs: what the user brings.
        build: ``build(**options)`` makes the transform; ``None`` for a method that is not one.
        where: what to use instead then.
    """

    name: str
    summary: str
    paper: str
    code: str
    needs: str
    build: Callable[..., Any] | None = None
    where: str = ""


#: All prompt methods, in the order of tables.
PROMPT_METHODS: dict[str, PromptCard] = {
    card.name: card
    for card in (
        PromptCard(
            "llmlingua2", "words that a token classifier finds worth keeping, above a percentile", "arXiv:2403.12968", "https://github.com/microsoft/LLMLingua",
            "a token classifier with its tokenizer, or a callable", LLMLingua2,
        ),
        PromptCard(
            "frugalprompt", "words with the highest attribution in an encoder", "arXiv:2510.16439", "https://github.com/Starscream-11813/Frugal-ICL",
            "an attribution: GlobEnc on a BERT-like encoder, or a callable", FrugalPrompt,
        ),
        PromptCard(
            "tokenskip", "chains of thought shortened in training, their length asked for in the prompt", "arXiv:2502.12067",
            "https://github.com/hemingkx/TokenSkip", "chains of thought, a compressor, LoRA training",
            where="vlprune.prompts.tokenskip (build_rows, add_ratio_suffix, evaluate_rows) and examples/tokenskip_lora.py",
        ),
    )
}  # fmt: skip


def build(name: str, **options: Any) -> Any:
    """The transform of that name."""
    if name not in PROMPT_METHODS:
        raise unknown("prompt method", str(name), PROMPT_METHODS)
    card = PROMPT_METHODS[name]
    if card.build is None:
        raise OptionError(f"{name} does not shorten a prompt at inference; see {card.where}")
    try:
        return card.build(**options)
    except TypeError as error:
        raise OptionError(f"{name} needs {card.needs}: {error}") from error
