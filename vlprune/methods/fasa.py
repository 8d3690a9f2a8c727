"""FASA: while decoding, each head ranks the keys by a few frequency chunks of its rotary embedding and attends to the best ones.

Reference: "FASA: Frequency-aware Sparse Attention", arXiv:2602.03152. Written from notes on the paper and its README; its code was not read.

Convention: ``keep`` is the number of keys (the paper's budget: 256 for long texts, 1500 for reasoning), or the share of those that are there. ``chunks`` is
how many frequency chunks rank, 16 of 64 (a quarter) in the paper. A chunk is a pair of numbers of a head that turn together; which ones dominate is measured
beforehand by `vlprune.skipping.frequency_chunks` and given as ``calibration``. The cache keeps every key, and prompts are dense.

Without ``calibration`` all chunks rank: that is the whole logit, so the keys are exactly the best ones and nothing is guessed about a model that was not
measured. It costs little: here the keys lie in the cache as the model keeps them, number by number, and picking a quarter of the numbers out of each would
read as many bytes as all of them. What is saved either way are the values, the softmax, and with grouped keys their copies.

Differences and open places:
- The new token's own key is always among the chosen ones.
- Grouped keys are left open: here the scores of the heads that share keys are summed, so that they see the same ones, ranked and read once;
  ``shared=False`` lets each query head rank for itself.
- The README's ``threshold_ratio`` (more or fewer chunks from head to head) is not described well enough to follow.
- Layers with a sliding window choose among the keys in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.kernels.top_attention import COPIES, logits_of, most_of, top_keys, top_mask, visible, with_newest
from vlprune.method import Attend, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._rows import given_layer
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.skipping.frequency_chunks import load_chunks

CHUNKS = 0.25


@dataclass(frozen=True, eq=False)
class DominantKeys:
    """Which keys a layer's heads look at in a decoding step.

    Attributes:
        budget: of the keys.
        numbers: (H, d) ones at the numbers of the chunks that rank; ``None``: all.
        shared: heads that share keys choose together.
        placed: the numbers on the devices where they were needed.
    """

    budget: Budget
    numbers: Tensor | None = None
    shared: bool = False
    placed: dict[torch.device, Tensor] = field(default_factory=dict)

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """The best keys of each head; ``None`` where the budget is every key."""
        heads, width = inputs.queries.shape[1], inputs.queries.shape[3]
        total = inputs.keys.shape[2]
        most = most_of(self.budget, total)
        if most >= total:
            return None
        queries = inputs.queries
        if self.numbers is not None:
            if self.numbers.shape != (heads, width):
                raise OptionError(f"calibration: measured on {tuple(self.numbers.shape)} heads and numbers, and this model has {(heads, width)}")
            if queries.device not in self.placed:
                self.placed[queries.device] = self.numbers.to(queries.device)
            queries = queries * self.placed[queries.device].to(queries.dtype)[:, None]
        scores = logits_of(inputs, 0, 1, queries)[:, :, 0]                  # (B, H, S)
        allowed, bias = visible(inputs, 0, 1)
        scores = scores if bias is None else scores + bias[:, :, 0].float()
        if self.shared:
            scores = scores.reshape(scores.shape[0], inputs.keys.shape[1], -1, total).sum(dim=2)
        scores, keys = with_newest(scores, allowed), None
        if COPIES * most > total:                                           # hide the others rather than copy so many
            seen: Tensor | None = top_mask(scores, allowed, self.budget)
        else:
            keys, counts = top_keys(scores, allowed, self.budget)
            seen = None if counts is None else counts[:, :, None]
        if seen is not None and self.shared:
            seen = seen.repeat_interleave(heads // seen.shape[1], dim=1)
        return HeadChoice(keys=keys, seen=seen, pairs=float(most))


def fasa(
    facts: ModelFacts,
    keep: Keep = 256,
    *,
    chunks: Keep | None = None,
    calibration: str | os.PathLike[str] | None = None,
    shared: bool = True,
    layers: Sequence[int] | None = None,
) -> PruningMethod:
    """Decode with the keys that dominant frequency chunks rank highest.

    Args:
        facts: of the model.
        keep: number of keys that each head sees, or share of those that are there.
        chunks: number of chunks that rank, or share of all; a quarter if not given. Needs ``calibration``.
        calibration: folder that ``vlprune calibrate --method fasa`` wrote; without it all chunks rank.
        shared: heads that share keys choose together.
        layers: where, counted from 0; all of them if not given.
    """
    budget, depth = Budget(keep), facts.decoder_layers
    if chunks is not None and calibration is None:
        raise OptionError(f"chunks={chunks!r}: which chunks dominate is measured first; give calibration=, what vlprune calibrate --method fasa wrote")
    measured = None if calibration is None else load_chunks(calibration, depth)
    if budget.is_everything:
        return PruningMethod("fasa")
    some = Budget(CHUNKS if chunks is None else chunks)
    number = 0 if measured is None else most_of(some, measured.pairs.shape[0])
    chosen = range(depth) if layers is None else sorted({given_layer("layers", layer, 0, depth) for layer in layers})
    attends = []
    for layer in chosen:
        rule = DominantKeys(budget, None if measured is None else measured.dominant(layer, number), shared)
        attends.append(Attend(layer, choose=rule, phase="decode", tokens="all", stateless=True))
    return PruningMethod("fasa", attends=tuple(attends))


CARD = MethodCard(
    "fasa",
    fasa,
    "while decoding each head attends to the keys that its dominant rotary frequencies rank highest",
    paper="arXiv:2602.03152",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=256,
)
