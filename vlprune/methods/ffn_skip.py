"""FFN-SkipLLM: once the MLP of a layer barely turns the residual while decoding, the next few layers go without theirs.

Reference: "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping", arXiv:2404.03865. No code.

Convention: attention always runs, so every key exists. Behind each layer between the cold regions whose MLP ran, the cosine of the residual before and
after it is taken; from ``tau`` on, the MLPs of the next ``skip`` layers are skipped. The first ``cold[0]`` and the last ``cold[1]`` layers, and the first
``warmup`` decoded tokens, are never touched. Each row of a batch has its own choice; reading it costs one host read for each layer that is looked at.

The paper gives no values for tau and skip, and small models need not saturate: measure with ``vlprune calibrate --method ffn_skip`` on texts of yours and
give the folder as ``saturation``; then the cold regions are what lies outside the longest run of layers whose mean cosine reaches ``tau``. ``keep`` is the
share of the MLPs that every token runs at least: no more than the rest are skipped, the lowest ones first. The paper loses little up to 30 %.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import Bypass, MethodCard, ModelFacts, Observe, PruningMethod
from vlprune.methods._schedules import given_count, num_layers
from vlprune.protocols import Step
from vlprune.skipping.saturation import cold_regions, load_saturation

LEFT, USED = "ffn_skip.left", "ffn_skip.used"


@dataclass(frozen=True)
class Saturated:
    """What a layer does for those above it: note how many of them go without their MLP."""

    tau: float
    skip: int
    warmup: int
    most: int

    def see(self, step: Step) -> None:
        """Behind a layer: compare the residual before and after its MLP, row by row."""
        if step.state.step < self.warmup or step.after is None:
            return
        cosine = torch.cosine_similarity(step.states[:, -1].float(), step.after[:, -1].float(), dim=-1).tolist()
        ran = step.ran or (True,) * len(cosine)
        left, used = (step.state.scratch.setdefault(key, [0] * len(cosine)) for key in (LEFT, USED))
        for row, value in enumerate(cosine):
            if ran[row] and value >= self.tau:
                left[row] = min(self.skip, self.most - used[row])

    def runs(self, step: Step) -> bool | list[bool]:
        """At an MLP: which rows run; the others have one skip less left."""
        left, used = step.state.scratch.get(LEFT), step.state.scratch.get(USED)
        if left is None or used is None:
            return True
        runs = [number == 0 for number in left]
        for row, run in enumerate(runs):
            if not run:
                left[row] -= 1
                used[row] += 1
        return runs


def ffn_skip(
    facts: ModelFacts,
    keep: Keep = 0.75,
    *,
    tau: float = 0.95,
    skip: int = 3,
    cold: tuple[int, int] | None = None,
    warmup: int = 25,
    saturation: str | os.PathLike[str] | None = None,
) -> PruningMethod:
    """Skip MLPs while decoding, where they barely change anything.

    Args:
        facts: of the model.
        keep: share or number of the MLPs that every decoded token runs at least.
        tau: cosine of the residual before and after an MLP from which on the next ones are skipped.
        skip: how many of the next MLPs are skipped.
        cold: how many of the first and of the last layers always run theirs; an eighth each (at least one) if not given.
        warmup: decoded tokens that run everything.
        saturation: folder of ``vlprune calibrate --method ffn_skip``, from which the cold regions come, instead of ``cold``.
    """
    depth = facts.decoder_layers
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not -1 <= tau <= 1:
        raise OptionError(f"tau={tau!r}: a cosine")
    given_count("warmup", warmup, 0, "decoded tokens that run everything")
    if saturation is not None:
        if cold is not None:
            raise OptionError("cold=... and saturation=...: give one of them")
        cold = cold_regions(load_saturation(saturation, depth), tau)
        cold = (max(1, cold[0]), cold[1])
    first, last = (max(1, round(depth / 8)),) * 2 if cold is None else cold
    given_count("cold[0]", first, 1, "first layers that always run their MLP")
    given_count("cold[1]", last, 0, "last layers that always run their MLP")
    middle = range(first, depth - last)
    most = depth - num_layers(keep, depth)
    given_count("skip", skip, 1, "MLPs to skip behind a saturated one")
    if not most or not middle:
        return PruningMethod("ffn_skip")
    rule = Saturated(float(tau), skip, warmup, most)
    bypasses = tuple(Bypass(layer, "mlp", phase="decode", decode=rule.runs, tokens="text") for layer in middle)
    return PruningMethod("ffn_skip", bypasses=bypasses, observes=tuple(Observe(layer, rule.see) for layer in middle))


CARD = MethodCard(
    "ffn_skip",
    ffn_skip,
    "MLPs of decoded tokens, until they barely turn the residual",
    paper="arXiv:2404.03865",
    points=("llm:K",),
    reduction="skip",
    tokens="text",
    adaptive=True,
    equivariant=False,
    default_keep=0.75,
    test_options={"tau": 0.5, "warmup": 1, "skip": 1},
)
