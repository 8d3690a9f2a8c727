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
- The README's ``threshold_ratio`` is called a quantile threshold for an adaptive choice of chunks, between ``min_k`` and ``max_k`` of a head, and idle in the
  published settings, where both are 16. What the quantile is taken of is not said. Here it is of the agreement of all chunks of all heads of a layer: within a
  head it would always let the same number pass, and heads of different layers agree at different levels. A head ranks by its chunks at or above it, at least
  ``min_chunks`` and at most ``max_chunks``.
- Layers with a sliding window choose among the keys in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.kernels.top_attention import COPIES, logits_of, most_of, top_and_newest, top_keys, top_mask, visible, with_newest
from vlprune.method import Attend, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._rows import given_layer
from vlprune.protocols import HeadChoice, HeadInputs
from vlprune.skipping.frequency_chunks import Chunks, load_chunks

CHUNKS = 0.25


@dataclass(frozen=True, eq=False)
class DominantKeys:
    """Which keys a layer's heads look at in a decoding step.

    Attributes:
        budget: of the keys.
        numbers: (H, d) ones at the numbers of the chunks that rank; ``None``: all.
        shared: heads that share keys choose together.
        placed: the numbers, (H, 1, d), on the devices and in the types where they were needed.
    """

    budget: Budget
    numbers: Tensor | None = None
    shared: bool = False
    placed: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """The best keys of each head; ``None`` where the budget is every key."""
        heads, width = inputs.queries.shape[1], inputs.queries.shape[3]
        total = inputs.keys.shape[2]
        most = most_of(self.budget, total)
        if most >= total:
            return None
        queries, kv = inputs.queries, inputs.keys.shape[1]
        if self.numbers is not None:
            if self.numbers.shape != (heads, width):
                raise OptionError(f"calibration: measured on {tuple(self.numbers.shape)} heads and numbers, and this model has {(heads, width)}")
            if (queries.device, queries.dtype) not in self.placed:
                self.placed[queries.device, queries.dtype] = self.numbers.to(queries.device, queries.dtype)[:, None]
            queries = queries * self.placed[queries.device, queries.dtype]
        together = self.shared and heads > kv
        if self.numbers is None and not together and COPIES * most <= total:               # ranked by what attention itself goes by
            out, keys, counts = top_and_newest(inputs, self.budget)
            return HeadChoice(keys=keys, seen=None if counts is None else counts[:, :, None], out=out, pairs=float(most))
        summed = together and not inputs.cap                                # the sum of products is the product of the sum
        if summed:
            queries = queries.reshape(queries.shape[0], kv, -1, *queries.shape[2:]).sum(dim=2, dtype=torch.float32).to(queries.dtype)
        scores = logits_of(inputs, 0, 1, queries)[:, :, 0]                  # (B, H or Hkv, S)
        allowed, bias = visible(inputs, 0, 1)
        if together and not summed:
            scores = scores.reshape(scores.shape[0], kv, -1, total).sum(dim=2)
        if bias is not None:
            bias = bias[:, :, 0].float()
            if together:
                bias = bias * (heads // kv) if bias.shape[1] == 1 else bias.reshape(bias.shape[0], kv, -1, total).sum(dim=2)
            scores = scores + bias
        scores, places = with_newest(scores, allowed), None
        if COPIES * most > total:                                           # hide the others rather than copy so many
            seen: Tensor | None = top_mask(scores, allowed, self.budget)
        else:
            places, counts = top_keys(scores, allowed, self.budget)
            seen = None if counts is None else counts[:, :, None]
        if seen is not None and together:
            seen = seen.repeat_interleave(heads // kv, dim=1)
        return HeadChoice(keys=places, seen=seen, pairs=float(most))


def fasa(
    facts: ModelFacts,
    keep: Keep = 256,
    *,
    chunks: Keep | None = None,
    calibration: str | os.PathLike[str] | None = None,
    threshold_ratio: float | None = None,
    min_chunks: Keep = 1,
    max_chunks: Keep = 1.0,
    shared: bool = True,
    layers: Sequence[int] | None = None,
) -> PruningMethod:
    """Decode with the keys that dominant frequency chunks rank highest.

    Args:
        facts: of the model.
        keep: number of keys that each head sees, or share of those that are there.
        chunks: number of chunks that rank, or share of all; a quarter if not given. Needs ``calibration``.
        calibration: folder that ``vlprune calibrate --method fasa`` wrote; without it all chunks rank.
        threshold_ratio: quantile, from 0 to 1, of the agreement of a layer's chunks; the heads' chunks from there on rank, instead of a fixed number of them.
        min_chunks: with ``threshold_ratio``, the least that rank in a head, or their share.
        max_chunks: with ``threshold_ratio``, the most.
        shared: heads that share keys choose together.
        layers: where, counted from 0; all of them if not given.
    """
    budget, depth = Budget(keep), facts.decoder_layers
    if chunks is not None and calibration is None:
        raise OptionError(f"chunks={chunks!r}: which chunks dominate is measured first; give calibration=, what vlprune calibrate --method fasa wrote")
    if threshold_ratio is not None:
        if isinstance(threshold_ratio, bool) or not isinstance(threshold_ratio, (int, float)) or not 0 <= threshold_ratio <= 1:
            raise OptionError(f"threshold_ratio={threshold_ratio!r}: a number from 0 (all chunks rank) to 1 (the best alone)")
        if chunks is not None:
            raise OptionError(f"threshold_ratio={threshold_ratio!r}, chunks={chunks!r}: a number of chunks that varies, or one that does not; give one of them")
        if calibration is None:
            raise OptionError(f"threshold_ratio={threshold_ratio!r}: a quantile of what was measured; give calibration=, from vlprune calibrate --method fasa")
    elif (min_chunks, max_chunks) != (1, 1.0):
        raise OptionError(f"min_chunks={min_chunks!r}, max_chunks={max_chunks!r}: bounds of what threshold_ratio= lets pass; give it too, or chunks=")
    measured = None if calibration is None else load_chunks(calibration, depth)
    if budget.is_everything:
        return PruningMethod("fasa")
    dominant = None if measured is None else _dominant(measured, chunks, threshold_ratio, min_chunks, max_chunks)
    chosen = range(depth) if layers is None else sorted({given_layer("layers", layer, 0, depth) for layer in layers})
    attends = []
    for layer in chosen:
        rule = DominantKeys(budget, None if dominant is None else dominant(layer), shared)
        attends.append(Attend(layer, choose=rule, phase="decode", tokens="all", stateless=True))
    return PruningMethod("fasa", attends=tuple(attends))


def _dominant(measured: Chunks, chunks: Keep | None, ratio: float | None, fewest: Keep, most: Keep) -> Callable[[int], Tensor]:
    """For a layer (H, d) ones at the numbers that rank."""
    there = measured.pairs.shape[0]
    if ratio is None:
        number = most_of(Budget(CHUNKS if chunks is None else chunks), there)
        return lambda layer: measured.dominant(layer, number)
    low, high = (most_of(Budget(bound), there) for bound in (fewest, most))
    if low > high:
        raise OptionError(f"min_chunks={fewest!r}, max_chunks={most!r}: of {there} chunks at least {low} and at most {high} cannot be")
    return lambda layer: measured.above(layer, ratio, low, high)


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
