"""SkipDecode: the later a token is decoded, the fewer layers it runs; the top ones stay, so every key that is needed exists.

Reference: "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference", arXiv:2307.02628. No official code; the paper
fine-tunes the model for it, and without that the answers get worse quickly.

Convention: at decoding step t, ``k(t) = round(most - (most - least) * min(1, t / length))`` layers run: the first ``warmup`` and the topmost ``k - warmup``.
``keep`` is ``least``, ``length`` the expected number of new tokens. The choice depends on the step alone, so a batch shares it. Prompts run every layer.

Differences:
- The paper prints linear decay and leaves its rounding open; half goes to even here.
- A second turn on the same cache would miss keys in the skipped layers, and is refused unless ``kv`` says to write them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod
from vlprune.methods._schedules import decoding_skips, given_count, num_layers


@dataclass(frozen=True)
class Falling:
    """A falling number of layers, the topmost ones behind a few at the bottom."""

    depth: int
    most: int
    least: int
    warmup: int
    length: int

    def count(self, step: int) -> int:
        """How many layers run at a step."""
        return round(self.most - (self.most - self.least) * min(1.0, step / self.length))

    def __call__(self, step: int) -> frozenset[int]:
        """Layers that run."""
        top = self.count(step) - self.warmup
        return frozenset((*range(self.warmup), *range(self.depth - top, self.depth)))


def skipdecode(
    facts: ModelFacts, keep: Keep = 1 / 2, *, most: Keep | None = None, warmup: int = 1, length: int = 128, kv: str = "active_only"
) -> PruningMethod:
    """Let the number of layers fall from ``most`` to ``keep`` over ``length`` decoded tokens.

    Args:
        facts: of the model.
        keep: share or number of layers that run in the end.
        most: share or number at the first step; all if not given.
        warmup: how many of the lowest layers always run.
        length: decoded tokens after which the number stays.
        kv: what a skipped layer keeps of a token: ``"active_only"`` (nothing), ``"project_only"`` or ``"copy_prev_layer"``.
    """
    depth = facts.decoder_layers
    given_count("warmup", warmup, 1, "lowest layers that always run")
    given_count("length", length, 1, "decoded tokens after which the number of layers stays")
    least, first = num_layers(keep, depth), depth if most is None else num_layers(most, depth)
    if not warmup <= least <= first:
        raise OptionError(f"keep={keep!r}, most={most!r}, warmup={warmup}: of {depth} layers {first} fall to {least}, and {warmup} always run")
    falling = Falling(depth, first, least, warmup, length)
    return PruningMethod("skipdecode", layer_skips=decoding_skips(depth, falling, kv, length + 1))


CARD = MethodCard(
    "skipdecode",
    skipdecode,
    "fewer layers for later tokens, the topmost ones",
    paper="arXiv:2307.02628",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=0.5,
    test_options={"length": 3},
)
