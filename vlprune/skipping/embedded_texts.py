"""The embedded decoder for associative recall and its texts: something to search a text method's numbers on when the user gives nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlprune.errors import VlpruneError
from vlprune.skipping.texts import TextModel, load_text_model

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "tiny_recall"


def load_embedded_text() -> TextModel:
    """The decoder, in float32 on the CPU; it has no tokenizer, its texts are token ids."""
    if not (ASSETS / "model.safetensors").exists():
        raise VlpruneError("the embedded text model is not there: give --model and --samples")
    loaded = load_text_model(str(ASSETS), dtype="float32", device="cpu")
    loaded.name, loaded.notes = "the embedded recall model", []
    return loaded


def recall_texts(split: str, count: int, questions: int = 6, length: int = 2048, first: int = 0) -> list[dict[str, Tensor]]:
    """Texts of `vlprune.evals.recall` as model inputs.

    Args:
        split: ``"train"`` or ``"heldout"``.
        count: how many.
        questions: behind each text; the first is the end of the prompt, and the continuation, its answer and the others, has ``3 questions - 3`` tokens.
        length: tokens before the first question.
        first: number of the first text in the split.
    """
    from vlprune.evals import recall

    found = []
    for index in range(first, first + count):
        drawn = recall.text(split, index, length=length)
        asked = np.stack([np.full(questions, recall.QUESTION), drawn.keys[:questions], drawn.values[:questions]], axis=1).reshape(-1)[:-1]
        found.append({"input_ids": torch.from_numpy(np.concatenate([drawn.context, asked])[None])})
    return found
