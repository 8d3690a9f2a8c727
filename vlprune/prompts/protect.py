"""What a prompt compressor must not touch: visual placeholders, special tokens, the frame that a chat template puts around turns.

Where a tokenizer or processor is at hand its own special tokens are protected; the patterns below are for prompts of models that are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vlprune.errors import OptionError

#: Placeholders, special tokens and turn frames of the common families. A frame goes with its role's name and line break.
PATTERNS: tuple[str, ...] = (
    r"<\|im_start\|>\w*\n?",                                             # ChatML: Qwen, InternVL
    r"<\|start_header_id\|>[^<]*<\|end_header_id\|>\n*",                 # Llama 3
    r"<start_of_turn>\w*\n?",                                            # Gemma
    r"<\|turn>\w*\n?",
    r"\b(?:USER|ASSISTANT|SYSTEM|Human|Assistant|User):",                # LLaVA, Vicuna
    r"<\|[^|<>\s]+\|>",                                                  # <|image_pad|>, <|vision_start|>, <|eot_id|>
    r"<\|[^|<>\s]+>|<[^|<>\s]+\|>",
    r"</?(?:s|bos|eos|pad|unk|mask|img|image|video|audio|im_\w+|image_\w+|video_\w+|vision_\w+|start_of_\w+|end_of_\w+|IMG_CONTEXT|fake_token_around_image)>",
    r"<(?:image|video|frame)[-_ ]?\d+>",
    r"\[/?(?:INST|IMG|IMG_BREAK|IMG_END|CLS|SEP|MASK|PAD|UNK|BOS|EOS|SYSTEM_PROMPT)\]|<</?SYS>>",
)
_ATTRIBUTES = (
    "image_token", "video_token", "audio_token", "vision_start_token", "vision_end_token", "boi_token", "eoi_token", "image_break_token", "image_end_token",
)  # fmt: skip


def special_tokens(*sources: Any) -> list[str]:
    """Strings that the given tokenizers or processors (or their tokenizers) treat as special, the longest first."""
    found: set[str] = set()
    for source in sources:
        if source is None:
            continue
        tokenizer = getattr(source, "tokenizer", source)
        found.update(map(str, getattr(tokenizer, "all_special_tokens", ())))
        added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
        found.update(token.content for token in added.values() if getattr(token, "special", False))
        for holder in (source, tokenizer):
            found.update(token for name in _ATTRIBUTES if isinstance(token := getattr(holder, name, None), str))
    return sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token))


def protected_spans(
    text: str, protect: Iterable[str | re.Pattern[str]] = (), *, placeholders: bool = True, special: Iterable[str] = ()
) -> list[tuple[int, int]]:
    """(start, end) of everything that stays letter for letter, sorted, overlapping ones as one.

    Args:
        text: the prompt.
        protect: more of it: strings taken literally, as whole words where they begin or end with a letter, or compiled patterns.
        placeholders: whether `PATTERNS` are protected.
        special: special tokens, taken literally.
    """
    if isinstance(protect, (str, re.Pattern)):
        raise OptionError(f"protect={protect!r}: a list of strings or compiled patterns, so write protect=[{protect!r}]")
    sources = [re.compile(pattern) for pattern in PATTERNS] if placeholders else []
    sources += [re.compile(re.escape(token)) for token in special]
    for wanted in protect:
        if not isinstance(wanted, (str, re.Pattern)) or not (wanted if isinstance(wanted, str) else wanted.pattern):
            raise OptionError(f"protect has {wanted!r}: strings that are not empty, or compiled patterns")
        sources.append(_whole(wanted) if isinstance(wanted, str) else wanted)
    spans = sorted(match.span() for source in sources for match in source.finditer(text) if match.end() > match.start())
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _whole(wanted: str) -> re.Pattern[str]:
    """``not`` is not found in ``nothing``."""
    before, after = (r"(?<!\w)" if wanted[0].isalnum() else ""), (r"(?!\w)" if wanted[-1].isalnum() else "")
    return re.compile(before + re.escape(wanted) + after)
