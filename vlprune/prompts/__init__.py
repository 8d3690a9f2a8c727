"""Shorter prompts: words leave the text before the model reads it; visual placeholders, special tokens and numbers stay.

``compress(prompt, "llmlingua2", keep=0.5, classifier=model, tokenizer=tokenizer)`` gives a `Compressed`: its ``text``, its ``report()``, and
``marked()`` with what left.
"""

from vlprune.prompts.api import CompressedChat, compress, compress_batch, compress_messages
from vlprune.prompts.cards import PROMPT_METHODS, PromptCard
from vlprune.prompts.compressed import Compressed
from vlprune.prompts.frugalprompt import FrugalPrompt
from vlprune.prompts.globenc import GlobEnc
from vlprune.prompts.llmlingua2 import LLMLingua2
from vlprune.prompts.transform import PromptTransform
from vlprune.prompts.words import TokenScores, Word

__all__ = [
    "PROMPT_METHODS", "Compressed", "CompressedChat", "FrugalPrompt", "GlobEnc", "LLMLingua2", "PromptCard", "PromptTransform", "TokenScores", "Word",
    "compress", "compress_batch", "compress_messages",
]  # fmt: skip
