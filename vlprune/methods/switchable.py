"""Switchable: attention, MLP, whole blocks, or tokens are skipped as any policy says.

Reference for the idea: "Switchable Decision: Dynamic Neural Generation Networks", arXiv:2405.04513, whose policy network is trained by reinforcement
learning together with the model. No code. That training is not here: the policy is a callable of yours.

- ``policy(ScoreInputs) -> (B, N)`` ranks the tokens of each row (or picture) where they could skip: at the input of an attention or a block, or what the
  MLP is given. The best ``keep`` of them run, the others keep their residual, or leave for good with ``part="tokens"``. Without a policy the ranking is
  random from a seed, the paper's exploration and a baseline.
- ``decode(Step) -> bool or one bool a row`` says while decoding whether the new token runs; without it every new token runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import KV_POLICIES, PARTS, Bypass, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import given_layer
from vlprune.methods.random_drop import RandomScore
from vlprune.points import LLMLayer
from vlprune.protocols import ScoreInputs, Scorer, Step, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

Policy = Callable[[ScoreInputs], Tensor]


@dataclass(frozen=True)
class ByPolicy:
    """A callable as a scorer. What it wants to know beside the states it names in an attribute ``needs``."""

    policy: Policy

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The policy's own."""
        return tuple(getattr(self.policy, "needs", ()))

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return self.policy(inputs)


def switchable(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 1 / 2,
    *,
    policy: Policy | None = None,
    part: str = "mlp",
    layers: Sequence[int] | None = None,
    tokens: str | None = None,
    kv: str = "project_only",
    decode: Callable[[Step], bool | Sequence[bool]] | None = None,
    protect: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> PruningMethod:
    """Let the tokens that a policy ranks lowest skip parts of layers.

    Args:
        facts: of the model.
        keep: share or number of tokens that run; one for all layers, or one each.
        policy: ranks tokens; random if not given.
        part: ``"attn"``, ``"mlp"``, ``"block"``, or ``"tokens"``: what is skipped for good leaves at the layer's input.
        layers: in which; all but the first if not given.
        tokens: ``"visual"``, ``"text"`` or ``"all"``; text if not given.
        kv: what those that skip attention leave in the cache.
        decode: whether a new token runs; for parts.
        protect: how many of the first and last text tokens always run.
        seed: of the random ranking.
    """
    depth = facts.decoder_layers
    if part not in (*PARTS, "tokens"):
        raise OptionError(f"part={part!r}: one of {', '.join(map(repr, (*PARTS, 'tokens')))}")
    if kv not in KV_POLICIES:
        raise OptionError(f"kv={kv!r}: one of {', '.join(map(repr, KV_POLICIES))}")
    chosen = [given_layer("layers", layer, 0, depth) for layer in (range(1, depth) if layers is None else layers)]
    keeps = list(keep) if isinstance(keep, Sequence) else [keep] * len(chosen)
    if len(keeps) != len(chosen):
        raise OptionError(f"keep={keep!r}: one for all layers or one for each of the {len(chosen)}")
    scorer: Scorer = RandomScore(seed) if policy is None else ByPolicy(policy)
    tokens = tokens or "text"
    if part == "tokens":
        if decode is not None:
            raise OptionError("decode=...: tokens that leave do so in the prompt; give a part to skip while decoding")
        stages = (
            Stage(LLMLayer(layer), scorer, TopK(), Drop(), Budget(share), tokens=tokens, protect=protect) for layer, share in zip(chosen, keeps, strict=True)
        )
        return PruningMethod("switchable", tuple(stages))
    phase = "prefill" if decode is None else "both"
    bypasses = (
        Bypass(layer, part, kv=kv, tokens=tokens, protect=protect, phase=phase, budget=Budget(share), scorer=scorer, selector=TopK(), decode=decode)
        for layer, share in zip(chosen, keeps, strict=True)
    )
    return PruningMethod("switchable", bypasses=tuple(bypasses))


CARD = MethodCard(
    "switchable",
    switchable,
    "tokens that a policy of yours lets run through attention, MLP or blocks",
    paper="arXiv:2405.04513",
    points=("llm:K",),
    reduction="skip",
    tokens="text",
    equivariant=False,
    default_keep=0.5,
)
