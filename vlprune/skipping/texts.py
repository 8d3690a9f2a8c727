"""Texts to measure on, from a file, and the language model and tokenizer for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import OptionError, UnsupportedModelError, VlpruneError
from vlprune.loading import DTYPES, load_config, load_model, quiet


@dataclass
class TextModel:
    """A model that goes on with a text.

    Attributes:
        model: dense, in evaluation mode.
        tokenizer: ``None`` where the model's folder has none; then only token ids will do.
        notes: what the user should know.
    """

    model: Any
    tokenizer: Any
    name: str
    notes: list[str] = field(default_factory=list)


def load_text_model(name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> TextModel:
    """A causal language model, or the text side of a vision-language one, from a folder or by hub id; see `vlprune.loading.load_model`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    config = load_config(name, trust_remote_code)
    if type(config) in AutoModelForImageTextToText._model_mapping:
        loaded = load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return TextModel(loaded.model, getattr(loaded.processor, "tokenizer", loaded.processor), name, loaded.notes)
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise UnsupportedModelError(f"{name!r} is a {config.model_type!r} model; one that goes on with a text is needed, such as Llama or Qwen")
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
    place = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    notes: list[str] = []
    tokenizer = None
    with quiet():
        try:
            target = torch.device(place)
            chosen: Any = (torch.float32 if target.type == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen, trust_remote_code=trust_remote_code).to(target).eval()
        except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
            raise VlpruneError(f"cannot load the model {name!r} on {place}: {str(error).strip().splitlines()[0]}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
            notes.append(f"no tokenizer in {name!r} ({str(error).strip().splitlines()[0][:120]}): only texts as token ids can be read")
    return TextModel(model, tokenizer, name, notes)


def read_texts(source: Path | None, loaded: TextModel, *, most: int = 200, length: int = 2048) -> list[dict[str, Tensor]]:
    """At most ``most`` texts of at most ``length`` tokens, evenly spread over what there is: model inputs, one text each.

    Args:
        source: a ``.jsonl`` file with an object a line, ``{"text": "..."}`` or ``{"input_ids": [1, 2, ...]}``, of which the first ``length`` tokens
            count; or any other text file, which is cut into pieces of that many tokens.
        loaded: whose tokenizer reads them.
        most: how many are enough.
        length: tokens of a text that are taken.

    Raises:
        OptionError: no such file, nothing in it, a line without text, or words for a model that has no tokenizer.
    """
    source = check_source(source)
    if source.suffix == ".jsonl":
        lines = source.read_text(encoding="utf-8").splitlines()
        found = [_ids(line, f"{source}:{number}", loaded)[:length] for number, line in enumerate(lines, 1) if line.strip()]
    else:
        ids = _tokens(source.read_text(encoding="utf-8"), str(source), loaded)
        found = [ids[start : start + length] for start in range(0, len(ids), length)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise OptionError(f"{str(source)!r} holds no text of two tokens or more")
    count = min(most, len(found))
    device = loaded.model.device
    return [{"input_ids": torch.tensor([found[place * len(found) // count]], device=device)} for place in range(count)]


def check_source(source: Path | None) -> Path:
    """The file, if there is one; an error before a model is loaded for nothing."""
    if source is None:
        raise OptionError('give --samples: a .jsonl file with {"text": ...} or {"input_ids": [...]} a line, or a plain text file')
    if not source.is_file():
        raise OptionError(f"samples={str(source)!r}: there is no such .jsonl or text file")
    return source


def _ids(line: str, where: str, loaded: TextModel) -> list[int]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{where} is no JSON: {error}") from error
    if isinstance(entry, Mapping) and isinstance(entry.get("text"), str):
        return _tokens(entry["text"], where, loaded)
    ids = entry.get("input_ids") if isinstance(entry, Mapping) else None
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise OptionError(f'{where}: an object with "text" or "input_ids" is needed, such as {{"text": "Once upon a time"}}')
    config: Any = loaded.model.config
    vocabulary = int(getattr(getattr(config, "text_config", config), "vocab_size", 0))
    if ids and (min(ids) < 0 or vocabulary <= max(ids)):
        raise OptionError(f"{where}: token ids from 0 to {vocabulary - 1} are known to {loaded.name!r}, but there are {min(ids)} to {max(ids)}")
    return ids


def _tokens(text: str, where: str, loaded: TextModel) -> list[int]:
    if loaded.tokenizer is None:
        raise OptionError(f"{where} holds words, and {loaded.name!r} has no tokenizer that could be loaded: give token ids, {{\"input_ids\": [...]}} a line")
    with quiet():
        return list(loaded.tokenizer(text)["input_ids"])
