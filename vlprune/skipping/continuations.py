"""How near a pruned decoder stays to itself on what follows a prompt: the objective of a search for methods that let text tokens pass by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vlprune.agreement import Agreement
from vlprune.errors import OptionError, UnsupportedModelError
from vlprune.hooks import HookSet


@dataclass
class TextAgreement(Agreement):
    """`vlprune.agreement` on texts: the last ``continuation`` tokens of each come one by one behind the prompt, as while decoding.

    Looked at are the prompt's last token and every token of the continuation. Each text counts alike.

    Attributes:
        samples: ``{"input_ids": (B, L)}`` without padding; each is longer than ``continuation``.
        continuation: tokens of each text that follow its prompt, from 1.
        together: texts of one length that run as a batch, at most.
    """

    continuation: int = 16
    together: int = 8
    batches: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Raises OptionError for samples that are no plain texts, or too short for the continuation."""
        if isinstance(self.continuation, bool) or not isinstance(self.continuation, int) or self.continuation < 1:
            raise OptionError(f"continuation={self.continuation!r}: an int from 1, how many tokens of each text follow its prompt")
        self.batches = batches(self.samples, self.continuation, self.together)
        self.samples = [{"input_ids": ids} for ids in self.batches]
        super().__post_init__()

    @torch.no_grad()
    def _seen(self, sample: Mapping[str, Any]) -> Tensor:
        """(B (continuation + 1), D) last hidden states, or (..., V) logits, text by text."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no output embeddings: agreement is measured on models that generate text")
        few = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        ids, seen, states = sample["input_ids"], [], []
        start = ids.shape[1] - self.continuation
        hooks = HookSet()
        try:
            hooks.before(head, lambda module, args, kwargs: states.append(args[0]))
            out = self.model(input_ids=ids[:, :start], use_cache=True, **few)
            for place in range(start, ids.shape[1] + 1):
                seen.append((states[-1] if self.objective == "cosine" else out.logits)[:, -1].float())
                states.clear()
                if place < ids.shape[1]:
                    out = self.model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        finally:
            hooks.remove()
        return torch.stack(seen, dim=1).flatten(0, 1)


def batches(samples: Sequence[Mapping[str, Any]], continuation: int, together: int = 8) -> list[Tensor]:
    """Token ids (B, L) of texts, those of one length together; in the order in which the lengths come."""
    by_length: dict[int, list[Tensor]] = {}
    for sample in samples:
        ids, mask = sample.get("input_ids"), sample.get("attention_mask")
        others = [name for name in sample if name not in ("input_ids", "attention_mask")]
        if ids is None or others or (mask is not None and not bool(mask.all())):
            raise OptionError(f"a continuation needs texts, input_ids without padding; a sample here has {', '.join(sample)}")
        if ids.shape[1] <= continuation:
            raise OptionError(f"a text has {ids.shape[1]} tokens, too few for continuation={continuation}: give longer texts, or a shorter continuation")
        by_length.setdefault(int(ids.shape[1]), []).extend(ids.split(1))
    return [torch.cat(rows[start : start + together]) for rows in by_length.values() for start in range(0, len(rows), together)]
