"""compress: make a prompt shorter and leave alone what the model must find as it was.

Whatever the method, placeholders, special tokens and the frame of a chat template stay letter for letter and in order, and so do numbers unless
``protect_numbers=False``; what a callable returns is checked for that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vlprune.errors import OptionError, VlpruneError
from vlprune.prompts.cards import build
from vlprune.prompts.compressed import Compressed
from vlprune.prompts.llmlingua2 import count_tokens
from vlprune.prompts.protect import protected_spans, special_tokens
from vlprune.prompts.transform import PromptTransform, WordChooser, checked_keep
from vlprune.prompts.words import Word, between, split_words

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def compress(
    text: str, method: str | PromptTransform = "llmlingua2", keep: float = 0.5, *, protect: Iterable[str | re.Pattern[str]] = (), placeholders: bool = True,
    protect_numbers: bool = True, processor: Any = None, count: Any = None, **options: Any,
) -> Compressed:  # fmt: skip
    """Make one prompt shorter.

    Args:
        text: a prompt, before or after a chat template.
        method: ``"llmlingua2"``, ``"frugalprompt"``, a transform built from their classes, or any callable ``(text, keep) -> text``. A callable gets
            each stretch between protected spans by itself.
        keep: share of the words that stays; at 1 the prompt is returned as it is.
        protect: strings (whole words) or compiled patterns that stay as well.
        placeholders: whether what `vlprune.prompts.protect.PATTERNS` find stays.
        protect_numbers: whether words with digits stay. They count against ``keep``.
        processor: of the model that will read the prompt, or its tokenizer: its special tokens stay, whatever they look like.
        count: tokenizer (or callable ``str -> int``) that counts the tokens of prompt and result.
        options: of the method, as ``classifier=`` and ``tokenizer=`` of `LLMLingua2` or ``attribution=`` of `FrugalPrompt`.

    Raises:
        OptionError: an option that cannot work.
        VlpruneError: a callable lost or changed something that is protected.
    """
    if not isinstance(text, str):
        raise OptionError(f"a {type(text).__name__} was given as the text of a prompt; use compress_batch for lists of texts, compress_messages for chats")
    share = checked_keep(keep)
    transform = _transform(method, options)
    name = str(getattr(transform, "name", getattr(transform, "__name__", type(transform).__name__)))
    spans = protected_spans(text, protect, placeholders=placeholders, special=special_tokens(processor))
    words = split_words(text, transform.way if isinstance(transform, WordChooser) else "space", spans)
    forced = [protect_numbers and word.has_digit for word in words]
    if share == 1 or not words:
        done, kept, scores = text, [True] * len(words), list[float]()
    elif isinstance(transform, WordChooser):
        kept, scores = transform.choose(_blanked(text, spans), words, forced, share)
        done = _assembled(text, spans, words, kept, transform)
    else:
        done, kept, scores = _rewritten(text, spans, transform, share, protect_numbers), [], []
    counted = None if count is None else (count_tokens(count, [text])[0], count_tokens(count, [done])[0])
    return Compressed(done, text, name, share, tuple(words), tuple(kept), tuple(forced), tuple(scores), tuple(spans), counted)


def compress_batch(
    texts: Sequence[str], method: str | PromptTransform = "llmlingua2", keep: float = 0.5, *, progress: bool = False, **options: Any
) -> list[Compressed]:
    """Make each prompt shorter by itself; options as in `compress`."""
    if isinstance(texts, str):
        raise OptionError("a single text was given where a list of texts is wanted; use compress")
    given = {name: options.pop(name) for name in _OWN if name in options}
    transform = _transform(method, options)
    return [compress(text, transform, keep, **given) for text in tracked(texts, "compress", progress)]


class CompressedChat(NamedTuple):
    """A shorter chat, and what was done to each text in it, by (turn, part); part is ``None`` where the content was a string."""

    messages: list[dict[str, Any]]
    parts: dict[tuple[int, int | None], Compressed]


def compress_messages(
    messages: Sequence[Mapping[str, Any]], method: str | PromptTransform = "llmlingua2", keep: float = 0.5, *, roles: Iterable[str] = ("user",), **options: Any
) -> CompressedChat:
    """Make the text of some turns of a chat shorter; pictures, videos and the other turns stay as they are.

    Args:
        messages: as `apply_chat_template` takes them: ``content`` a string, or parts with a ``type``. They are not changed.
        method: as in `compress`.
        keep: share of the words of each text that stays.
        roles: whose turns.
        options: as in `compress`.
    """
    wanted = {roles} if isinstance(roles, str) else set(roles)
    given = {name: options.pop(name) for name in _OWN if name in options}
    transform = _transform(method, options)
    done: dict[tuple[int, int | None], Compressed] = {}
    out: list[dict[str, Any]] = []
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise OptionError(f"turn {turn} is {message!r}: a mapping with 'role' and 'content' is wanted")
        content = message["content"]
        if message["role"] in wanted and isinstance(content, str):
            done[turn, None] = compress(content, transform, keep, **given)
            content = done[turn, None].text
        elif message["role"] in wanted and content is not None:
            parts = []
            for number, part in enumerate(content):
                if part.get("type") == "text":
                    done[turn, number] = compress(part["text"], transform, keep, **given)
                    part = {**part, "text": done[turn, number].text}
                parts.append(part)
            content = parts
        out.append({**message, "content": content})
    return CompressedChat(out, done)


_OWN = ("protect", "placeholders", "protect_numbers", "processor", "count")


def tracked(items: Sequence[Any], what: str, progress: bool) -> Iterable[Any]:
    """The items, with a bar if wanted."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True))


def _transform(method: str | PromptTransform, options: dict[str, Any]) -> PromptTransform:
    if isinstance(method, str):
        made: PromptTransform = build(method, **options)
        return made
    if not callable(method):
        raise OptionError(f"method={method!r}: the name of a prompt method, or a callable (text, keep) -> text")
    if options:
        raise OptionError(f"{', '.join(sorted(options))}: options go with a method's name; a transform that is already built takes none here")
    return method


def _blanked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with spaces over what is out of reach, so that no classifier reads a placeholder and places still fit."""
    out = text
    for start, end in spans:
        out = out[:start] + " " * (end - start) + out[end:]
    return out


def _assembled(text: str, spans: Sequence[tuple[int, int]], words: Sequence[Word], kept: Sequence[bool], chooser: WordChooser) -> str:
    """Kept words between the protected spans; the white space next to a span, and at both ends of the prompt, stays."""
    out: list[str] = []
    at = 0
    for place, (start, end) in enumerate(between(len(text), spans)):
        first = at
        while at < len(words) and words[at].start < end:
            at += 1
        stretch = text[start:end]
        inner = chooser.join(text, words[first:at], kept[first:at])
        lead, tail = stretch[: len(stretch) - len(stretch.lstrip())], stretch[len(stretch.rstrip()) :]
        alone = lead if place == 0 else tail if place == len(spans) else lead or tail     # what a stretch leaves of which no word stays
        out.append(lead + inner + tail if inner else alone)
        if place < len(spans):
            out.append(text[slice(*spans[place])])
    return "".join(out)


def _rewritten(text: str, spans: Sequence[tuple[int, int]], transform: Callable[[str, float], str], keep: float, protect_numbers: bool) -> str:
    """What a callable makes of the stretches between the protected spans, checked."""
    out: list[str] = []
    for place, (start, end) in enumerate(between(len(text), spans)):
        stretch = text[start:end]
        core = stretch.strip()
        if core:
            made = transform(core, keep)
            if not isinstance(made, str):
                raise OptionError(f"the prompt transform gave a {type(made).__name__}; it has to give a string")
            lost = Counter(_NUMBER.findall(core)) - Counter(_NUMBER.findall(made))
            if protect_numbers and lost:
                raise VlpruneError(f"the prompt transform lost the numbers {', '.join(sorted(lost))} of {core!r}. If that is meant, say protect_numbers=False.")
            at = stretch.index(core)
            stretch = stretch[:at] + made + stretch[at + len(core) :]
        out.append(stretch)
        if place < len(spans):
            out.append(text[slice(*spans[place])])
    return "".join(out)
