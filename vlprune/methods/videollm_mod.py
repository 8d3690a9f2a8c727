"""VideoLLM-MoD: in every other layer a router picks some vision tokens of each frame to run; the others pass by with their states as they are.

Reference: "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation", arXiv:2408.16730. Code not released.

Convention: ``keep`` is the share of a frame's tokens that run in a layer with a router (the paper's r = 0.2); all layers with an odd number have one
(``layers="interleaved"``, best in the paper's table), the others run everything, as does all text. Tokens that pass by leave no keys in that layer
(``kv="active_only"``), so the cache gets shorter there. The router is a linear map from a token's state to one number, one for each layer.

Training: the choice has no gradient, the weight of what a block adds has. ``examples/train_videollm_mod.py`` trains routers on the embedded video model.

- ``router="file.safetensors"``: of `vlprune.scorers.layer_routers.LayerRouters.save`; or the module, or ``"random"``: the baseline at the same budget, a
  seeded choice anew in every layer.

Measured on the embedded video model, which stays as it is (``evals/results/videollm_mod``): routers of the upper half of the layers are better than random
choices at the same budget, those of every other layer are not; perhaps because random choices differ from layer to layer and leave some of every object.

Differences and open places:
- Whether the paper multiplies a block's result by the router's score is not written where we could read it. ``weigh="through"`` (default) multiplies by 1
  and hands the gradient of the score's sigmoid on, so that a model that was not trained with routers stays itself; ``"sigmoid"`` multiplies by it, for
  models trained that way; ``"none"`` does neither.
- A picture counts as one frame; where the model sees no pictures, the text of a row does, without its last token.
- Decoded tokens run everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import KV_POLICIES, Bypass, MethodCard, ModelFacts, PruningMethod
from vlprune.methods.random_drop import RandomScore
from vlprune.scorers.layer_routers import WEIGHTS, LayerRouters, LayerRouterScore
from vlprune.selectors.frame_topk import FrameTopK

PLACES = ("interleaved", "all", "deep")


def routed_layers(depth: int, layers: str | Sequence[int]) -> tuple[int, ...]:
    """Layers with a router: every second, all but the first, the deeper half, or those given."""
    if isinstance(layers, str):
        known = {"interleaved": range(1, depth, 2), "all": range(1, depth), "deep": range(depth // 2, depth)}
        if layers not in known:
            raise OptionError(f"layers={layers!r}: one of {', '.join(map(repr, PLACES))}, or layer numbers from 0 to {depth - 1}")
        return tuple(known[layers])
    found = tuple(layers)
    if any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth for layer in found) or len(set(found)) < len(found):
        raise OptionError(f"layers={layers!r}: layer numbers from 0 to {depth - 1}, each once, or one of {', '.join(map(repr, PLACES))}")
    return found


def videollm_mod(
    facts: ModelFacts,
    keep: Keep = 0.2,
    *,
    router: str | os.PathLike[str] | nn.Module | None = None,
    layers: str | Sequence[int] | None = None,
    weigh: str = "through",
    tokens: str | None = None,
    kv: str = "active_only",
    seed: int = 0,
) -> PruningMethod:
    """Let a router choose which vision tokens run in some layers.

    Args:
        facts: of the model.
        keep: share of a frame's tokens that run in a layer with a router, or how many of an item do, at most.
        router: a file of routers, the routers, or ``"random"``.
        layers: which layers have one: ``"interleaved"``, ``"all"`` (but the first), ``"deep"`` (the upper half), or their numbers; those that the file says,
            else ``"interleaved"``.
        weigh: what a router's score does to what a block adds: ``"through"``, ``"sigmoid"`` or ``"none"``.
        tokens: ``"visual"``, ``"text"`` or ``"all"``; visual ones where the model sees, else text.
        kv: what a token that passes by leaves in the layer's cache.
        seed: of the random choice.
    """
    for name, given, known in (("weigh", weigh, WEIGHTS), ("kv", kv, KV_POLICIES)):
        if given not in known:
            raise OptionError(f"{name}={given!r}: one of {', '.join(map(repr, known))}")
    net = given_routers(router)
    trained = getattr(net, "layers", None)
    trained = trained if isinstance(trained, tuple) else None
    where = routed_layers(facts.decoder_layers, layers if layers is not None else trained if trained is not None else "interleaved")
    if trained is not None and (missing := sorted(set(where) - set(trained))):
        raise OptionError(f"layers={layers!r}: these routers are of layers {', '.join(map(str, trained))}; there is none for {', '.join(map(str, missing))}")
    bypasses: list[Bypass] = []
    for layer in where:
        scorer: Any = RandomScore(seed + layer) if net is None else LayerRouterScore(net, layer, weigh)
        factor = None if net is None or weigh == "none" else scorer.weigh
        bypasses.append(
            Bypass(layer, "block", kv=kv, tokens=tokens or facts.own_set, budget=Budget(keep, at_most=True), scorer=scorer, selector=FrameTopK(), weigh=factor)
        )  # fmt: skip
    return PruningMethod("videollm_mod", bypasses=tuple(bypasses))


def given_routers(router: Any) -> nn.Module | None:
    """The routers from what the user gave; ``None``: the random choice."""
    if router is None:
        raise OptionError(
            "videollm_mod needs trained routers: router=FILE.safetensors. Train some for your model as examples/train_videollm_mod.py does, give a module "
            "(vlprune.scorers.layer_routers.LayerRouters) to train it yourself, or router='random' for the baseline at the same budget."
        )
    if isinstance(router, nn.Module):
        return router
    if router == "random":
        return None
    if not isinstance(router, (str, os.PathLike)):
        raise OptionError(f"router={type(router).__name__}: the path of a .safetensors file, a module, or 'random'")
    return LayerRouters.load(router)


class Untrained(nn.Module):
    """Random routers for whatever layer and width: for tests, worth nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Any, LayerRouters] = {}                          # by layer, width and device: brought there once

    def forward(self, states: Any, layer: int) -> Any:
        """(B, L)."""
        key = (layer, states.shape[-1], states.device)
        if key not in self.made:
            self.made[key] = LayerRouters(states.shape[-1], (layer,), seed=layer).to(states.device)
        return self.made[key](states, layer)


CARD = MethodCard(
    "videollm_mod",
    videollm_mod,
    "in every other layer a trained router picks the vision tokens of each frame that run (weights needed)",
    paper="arXiv:2408.16730",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    default_keep=0.2,
    test_options={"router": Untrained()},
)
