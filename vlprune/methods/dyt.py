"""DyT: in every block of a vision tower, a trained router says which patches run through the MLP; a small adapter serves all of them.

Reference: "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation", arXiv:2403.11808 (NeurIPS 2024), in its form "MLP
dispatch". Official code: https://github.com/NUS-HPC-AI-Lab/Dynamic-Tuning

Convention: behind the attention of block l (0-based), ``x <- x + s MLP(norm(x)) + adapter(x)``; s is 1 for CLS and for the patches that run, else 0.
The router is one linear map of x to a number. The training aims at half the patches a block: ``keep=0.5``.

Routers and adapters are trained for a task and do not come with this package: ``weights`` takes them. They are found by block number and shape: in
each block one linear map to a single number, and at most one pair of maps through a width below the tower's, with a ``scale`` beside it where that
was trained.

Differences:
- Exactly K patches of every image run in each block, those with the highest router values. The released program runs those whose sigmoid is above
  0.5, in numbers that differ by image: that is ``keep="router"``, which costs one host read a block.
- The released program computes every MLP and masks it, except in its speed test; here MLPs run on fewer rows.
- With ``keep=1.0`` nothing happens at all, also no adapter.
- Inference only: the Gumbel noise and the losses on rates, full path and distillation are the trainer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError, UnsupportedPointError
from vlprune.method import MethodCard, ModelFacts, PatchBypass, PruningMethod
from vlprune.scorers.learned import GIVE, Bottleneck, Layer, Learned, LinearRouter, TokenFunction, read_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
ROUTER = "router"
#: Router and adapter (or ``None``) of one block.
Parts = tuple[TokenFunction, Callable[[Tensor], Tensor] | None]


def dyt(facts: ModelFacts, keep: Keep | str = 0.5, *, weights: Any = None, scale: float | None = None, activation: str = "relu") -> PruningMethod:
    """Let patches skip MLPs as trained routers say.

    Args:
        facts: of the model.
        keep: share or number of an image's patches that run through the MLP of each block; ``"router"``: as many as the router lets.
        weights: a state dict, a module, or the path of a .safetensors file with routers and adapters by block number (other weights in it do not
            matter); or ``(router, adapter)``, functions from states (B, N, D) to scores (B, N) and to what is added (B, L, D) or ``None``, for all
            blocks or a list of them.
        scale: factor on the adapters' output; by default what the weights say, else 1.
        activation: inside the adapters, ``"relu"`` or ``"gelu"``.
    """
    if activation not in ACTIVATIONS:
        raise OptionError(f"activation={activation!r}: {' or '.join(map(repr, ACTIVATIONS))}")
    if isinstance(scale, bool) or not (scale is None or isinstance(scale, (int, float))):
        raise OptionError(f"scale={scale!r}: a number")
    if isinstance(keep, str) and keep != ROUTER:
        raise OptionError(f"keep={keep!r}: a share such as 0.5, a number of patches, or {ROUTER!r}")
    if weights is None:
        raise OptionError(f"dyt needs its trained routers and adapters: weights= {GIVE}, or (router, adapter) functions")
    if facts.vision_layers == 0:
        raise UnsupportedPointError("dyt lets patches skip the MLPs of vision blocks, but no vision blocks are known of this model")
    budget = None if isinstance(keep, str) else Budget(keep)
    parts = given_parts(weights, facts.vision_layers) if isinstance(weights, (list, tuple)) else read_parts(weights, facts.vision_layers, scale, activation)
    bypasses = (PatchBypass(layer, Learned(router), budget, adapter) for layer, (router, adapter) in parts.items())
    return PruningMethod("dyt", patch_bypasses=tuple(bypasses))


def given_parts(weights: Sequence[Any], depth: int) -> dict[int, Parts]:
    """Functions from the user, one pair for all blocks or one for each."""
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None) for pair in weights]
    if len(weights) == 2 and callable(weights[0]) and (weights[1] is None or callable(weights[1])):
        pairs = [tuple(weights)] * depth
    if len(pairs) != depth or not all(callable(router) and (adapter is None or callable(adapter)) for router, adapter in pairs):
        raise OptionError(f"weights: (router, adapter) functions are needed, one pair for all or a list of {depth}, one for each vision block")
    return dict(enumerate(pairs))


def read_parts(source: Any, depth: int, scale: float | None, activation: str) -> dict[int, Parts]:
    """Routers and adapters found by block number and shape."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, value in read_weights(source, "weights").items():
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        if number is not None and isinstance(value, Tensor):
            blocks.setdefault(int(number[1]), {})[name] = value
    found: dict[int, Parts] = {}
    for layer, named in sorted(blocks.items()):
        maps = {name.removesuffix("weight"): value for name, value in named.items() if name.endswith("weight") and value.dim() == 2}
        routers = [prefix for prefix, weight in maps.items() if weight.shape[0] == 1]
        if not routers:
            continue
        width = maps[routers[0]].shape[1]
        downs = [prefix for prefix, weight in maps.items() if 1 < weight.shape[0] < width and weight.shape[1] == width]
        ups = [prefix for prefix, weight in maps.items() if weight.shape[0] == width and weight.shape[1] < width]
        if len(routers) > 1 or len(downs) > 1 or len(ups) != len(downs):
            raise OptionError(f"weights: block {layer} has {len(routers)} maps to one number, {len(downs)} down to a narrow width and {len(ups)} up; one each")
        router = LinearRouter((_layer(named, routers[0], maps),))
        adapter = None
        if downs:
            beside = _beside(named, downs[0], ups[0])
            factor = scale if scale is not None else float(beside[0]) if beside else 1.0
            adapter = Bottleneck((_layer(named, downs[0], maps), _layer(named, ups[0], maps)), activation=ACTIVATIONS[activation], scale=factor)
        found[layer] = (router, adapter)
    if not found:
        raise OptionError("weights: no block of it has a router, a linear map of the states to one number; names must hold the block's number ('blocks.3.')")
    if max(found) >= depth:
        raise OptionError(f"weights: there is a router for block {max(found)}, but the model has vision blocks 0 to {depth - 1}")
    return found


def _layer(named: Mapping[str, Tensor], prefix: str, maps: Mapping[str, Tensor]) -> Layer:
    bias = named.get(f"{prefix}bias")
    if bias is None:
        raise OptionError(f"weights: {prefix}weight has no {prefix}bias beside it; both are needed")
    return maps[prefix], bias


def _beside(named: Mapping[str, Tensor], down: str, up: str) -> list[Tensor]:
    """What else belongs to an adapter: a trained scale, or nothing that we know."""
    parent = down.removesuffix(".").rpartition(".")[0] + "."
    if not parent.strip(".") or re.search(r"(?:^|\.)\d+\.$", parent) or not up.startswith(parent):
        return []                                                        # the maps stand in the block itself
    others = {name: value for name, value in named.items() if name.startswith(parent) and not name.startswith((down, up)) and not name.endswith("num_batches")}
    strange = [name for name, value in others.items() if value.numel() != 1]
    if strange or len(others) > 1:
        raise OptionError(f"weights: {strange[0] if strange else ', '.join(others)} belongs to an adapter in a way not known here; give functions instead")
    return [value.detach() for value in others.values()]


class Untrained(nn.Module):
    """A random router and adapter of whatever width the tokens have: for tests, worth nothing else."""

    def __init__(self, outputs: int | None, seed: int) -> None:
        super().__init__()
        self.outputs, self.seed = outputs, seed

    def forward(self, states: Tensor) -> Tensor:
        """(B, N) or (B, N, D)."""
        width = states.shape[-1]
        weight = torch.randn(self.outputs or width, width, generator=torch.Generator().manual_seed(self.seed)) * (0.3 if self.outputs is None else 1.0)
        found = F.linear(states, weight.to(states) * width**-0.5)
        return found[..., 0] if self.outputs == 1 else found


CARD = MethodCard(
    "dyt",
    dyt,
    "patches that trained routers choose run through the MLPs of a vision tower, all through adapters (weights needed)",
    paper="arXiv:2403.11808",
    code="https://github.com/NUS-HPC-AI-Lab/Dynamic-Tuning",
    points=("vision_mlp:K",),
    modality="image",
    exact=False,
    default_keep=0.5,
    test_options={"weights": (Untrained(1, 0), Untrained(None, 1))},
)
