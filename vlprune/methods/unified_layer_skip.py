"""Unified layer skipping: decoded tokens run an even selection of the layers, the same for every token; prompts run all.

Reference: "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy", arXiv:2404.06954. Official code:
https://github.com/Adaxry/Unified_Layer_Skipping

Convention: a speed-up of s is ``keep = 1/s``. ``n = int(L / s)`` layers run: the first and the last always, and of the others those whose number is a
multiple of ``int(L / (n - 1))``, lowest first until n are found; late ones may be left out where the quota fills early. The authors advise fine-tuning;
without it the answers get worse quickly.

Differences:
- The program replaces the keys and values of a skipped layer by those of the layer below. Here they are not written (``kv="active_only"``): within one
  generation nobody sees them. A second turn on the same cache would, and is refused; ``kv="project_only"`` or ``"copy_prev_layer"`` write them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod
from vlprune.methods._schedules import decoding_skips, num_layers


@dataclass(frozen=True)
class Always:
    """The same layers at every step."""

    layers: frozenset[int]

    def __call__(self, step: int) -> frozenset[int]:
        """Layers that run."""
        return self.layers


def kept_layers(depth: int, number: int) -> tuple[int, ...]:
    """The layers of ``depth`` that run when ``number`` may."""
    if number >= depth:
        return tuple(range(depth))
    interval = int(depth / (number - 2 + 1))
    middle = [layer for layer in range(1, depth - 1) if layer % interval == 0][: number - 2]
    return (0, *middle, depth - 1)


def unified_layer_skip(facts: ModelFacts, keep: Keep = 1 / 2, *, kv: str = "active_only") -> PruningMethod:
    """Run an even selection of the layers for every decoded token.

    Args:
        facts: of the model.
        keep: share or number of layers that run; at least two.
        kv: what a skipped layer keeps of a token: ``"active_only"`` (nothing), ``"project_only"`` or ``"copy_prev_layer"``.
    """
    depth = facts.decoder_layers
    number = num_layers(keep, depth, "floor")
    if number < min(2, depth):
        raise OptionError(f"keep={keep!r}: {number} of {depth} layers, but the first and the last always run; give at least {min(1.0, 2 / depth):.3g}")
    return PruningMethod("unified_layer_skip", layer_skips=decoding_skips(depth, Always(frozenset(kept_layers(depth, number))), kv, 1))


CARD = MethodCard(
    "unified_layer_skip",
    unified_layer_skip,
    "an even selection of the layers for every decoded token",
    paper="arXiv:2404.06954",
    code="https://github.com/Adaxry/Unified_Layer_Skipping",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=0.5,
)
