"""Tiny random models of every family, built from configs in milliseconds, and prompts for them.

A family is a file in ``tests/families/`` with a tuple ``FAMILIES``; the laws run over all of them without an edit here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PAD, IMAGE, VIDEO, VOCABULARY, TEXT = 0, 97, 98, 128, 90

#: A row of a prompt: numbers of text tokens, ``"image"`` or ``"video"``, or ``("image", k)`` for the k-th shape of the family.
Row = Sequence[Any]


@dataclass
class TinyFamily:
    """A family's builder. Subclasses implement `make` and `visual`."""

    name: str = ""
    modalities: tuple[str, ...] = ("image",)
    generated_type: ClassVar[int] = 0        # token type of generated tokens, for models that have token types
    shapes: dict[str, int] = field(default_factory=lambda: {"image": 1, "video": 1})

    def make(self) -> nn.Module:
        """A fresh model with weights from the current seed."""
        raise NotImplementedError

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Pixels for ``(modality, shape number, seed)`` items in reading order.

        Returns the model inputs (without ids) and for each item the ids that stand for it in the prompt.
        """
        raise NotImplementedError

    def build(self, attention: str = "sdpa", seed: int = 0) -> nn.Module:
        """An evaluation-mode model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        model = self.make()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():             # larger than usual weights: choices differ clearly
                if parameter.dim() > 1:
                    scale = 0.35 if "embed" in name else 1.3 / parameter.flatten(1).shape[1] ** 0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                elif not name.endswith("norm.weight") and "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.eval()
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(attention)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = PAD
        return model

    def prompt(self, rows: Sequence[Row], *, padding: str = "left", seed: int = 0, row_numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Model inputs for a batch. Row ``i`` is drawn from ``(seed, row_numbers[i])``, so it is the same alone or in a batch."""
        numbers = list(range(len(rows))) if row_numbers is None else list(row_numbers)
        items = []
        for row, number in zip(rows, numbers, strict=True):
            for place, part in enumerate(row):
                if not isinstance(part, int):
                    modality, shape = (part, 0) if isinstance(part, str) else part
                    items.append((modality, shape, 1000 * seed + 100 * number + place))
        inputs, expansions = self.visual(items) if items else ({}, [])
        sequences, used = [], 0
        for row, number in zip(rows, numbers, strict=True):
            generator = torch.Generator().manual_seed(7919 * seed + number)
            ids: list[int] = []
            for part in row:
                if isinstance(part, int):
                    ids.extend(torch.randint(1, TEXT, (part,), generator=generator).tolist())
                else:
                    ids.extend(expansions[used])
                    used += 1
            sequences.append(torch.tensor(ids))
        length = max(len(ids) for ids in sequences)
        input_ids = torch.full((len(rows), length), PAD)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, ids in enumerate(sequences):
            where = slice(length - len(ids), length) if padding == "left" else slice(0, len(ids))
            input_ids[number, where], mask[number, where] = ids, 1
        return {"input_ids": input_ids, "attention_mask": mask, **inputs, **self.extra(input_ids)}

    def extra(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Further inputs that follow from the ids."""
        return {}


def pixels(seed: int, *shape: int) -> Tensor:
    """Reproducible noise with some structure, so that tokens differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


@cache
def families() -> dict[str, TinyFamily]:
    """Every tiny family by name."""
    package = importlib.import_module("tests.families")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        for family in importlib.import_module(f"tests.families.{info.name}").FAMILIES:
            found[family.name] = family
    return found


def tiny_llama(**changes: Any) -> dict[str, Any]:
    """A text config that all Llama-like decoders understand."""
    return {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip


def tiny_clip(**changes: Any) -> dict[str, Any]:
    """A vision config in the shape of CLIP."""
    return {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 24, "patch_size": 4, "projection_dim": 16, **changes,
    }  # fmt: skip
