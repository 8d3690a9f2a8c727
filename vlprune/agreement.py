"""Agreement: how near a pruned model stays to itself unpruned, on inputs without labels.

Looked at is the last token of each prompt, from which the first word of the answer is made:

* ``"cosine"``: cosine between its hidden states behind the last layer, unpruned and pruned. This is what VFlowOpt (arXiv:2508.05211) maximises.
* ``"kl"``: minus the Kullback-Leibler divergence of the pruned next-word distribution from the unpruned one, in nats.

Both are means over the prompts; higher is better, and the unpruned model has 1 and 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.errors import OptionError, UnsupportedModelError
from vlprune.hooks import HookSet

OBJECTIVES = ("cosine", "kl")


@dataclass
class Agreement:
    """Remembers what the unpruned model makes of the samples; `score` asks it again, as it is then.

    Attributes:
        samples: model inputs; batches must be padded on the left, if at all.
        objective: one of ``OBJECTIVES``.
    """

    model: nn.Module
    samples: Sequence[Mapping[str, Any]]
    objective: str = "cosine"
    dense: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise OptionError(f"objective={self.objective!r}: one of {', '.join(OBJECTIVES)}")
        if not self.samples:
            raise OptionError("no samples: give model inputs for a few pictures, about 30")
        if self.model.training:
            raise OptionError("the model is in training mode, where dropout makes every run another: call model.eval() first")
        for sample in self.samples:
            mask = sample.get("attention_mask")
            if mask is not None and not bool(mask[:, -1].all()):
                raise OptionError("a sample is padded on the right, but its last token is looked at: pad on the left, or give prompts one by one")
        self.dense = [self._seen(sample) for sample in self.samples]

    def score(self) -> float:
        """The objective, mean over all prompts; NaN where the pruned model gives NaN."""
        compare = _cosine if self.objective == "cosine" else _minus_kl
        return float(torch.cat([compare(dense, self._seen(sample)) for dense, sample in zip(self.dense, self.samples, strict=True)]).mean())

    @torch.no_grad()
    def _seen(self, sample: Mapping[str, Any]) -> Tensor:
        """(B, D) last hidden states, or (B, V) logits."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no output embeddings: agreement is measured on models that generate text")
        states: list[Tensor] = []
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1
        hooks = HookSet()
        try:
            hooks.before(head, lambda module, args, kwargs: states.append(args[0]))
            logits: Tensor = self.model(**sample, **options).logits
        finally:
            hooks.remove()
        return (states[0] if self.objective == "cosine" else logits)[:, -1].float()


def _cosine(dense: Tensor, pruned: Tensor) -> Tensor:
    return F.cosine_similarity(dense, pruned, dim=-1)


def _minus_kl(dense: Tensor, pruned: Tensor) -> Tensor:
    return -F.kl_div(pruned.log_softmax(dim=-1), dense.log_softmax(dim=-1), reduction="none", log_target=True).sum(dim=-1)
