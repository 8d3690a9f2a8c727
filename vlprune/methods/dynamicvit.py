"""DynamicViT: inside a vision tower, keep the patches that small trained predictors want to keep, in three stages.

Reference: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", arXiv:2106.02034 (NeurIPS 2021).
Official code: https://github.com/raoyongming/DynamicViT

Convention: the predictors stand before the blocks 3, 6 and 9 of 12, counted from 0: ``VisionLayer(3)``, ``VisionLayer(6)``, ``VisionLayer(9)``,
scaled to the depth. The paper's rho is what each stage leaves of what reached it; its counts are ``int(N * rho^s)`` of the original N. Our
``keep`` is what is left at the end, rho^3: the paper's 0.7 is ``keep=0.343`` and leaves 137, 96 and 67 of 196. One share per stage may be
given instead.

The predictors are trained with the tower they belong to and do not come with this package: ``predictor`` takes them. Layers are found by the
natural order of their names (norm, then four linear maps, for each stage); in the state dict of a whole model, those with "predictor" in
their names.

Differences:
- Inference only: exactly K patches by score. The differentiable decisions of the training (Gumbel softmax, attention under a policy, ratio
  and distillation losses) are the trainer's.
- The policy-weighted mean of a predictor is the mean over the patches still there, as in the released inference.
- Survivors stay in raster order (released: by score).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._stages import given_budgets, given_layers, scaled_layers
from vlprune.points import Depth, VisionLayer
from vlprune.reducers import Drop
from vlprune.scorers.learned import GIVE, KeepPredictor, Layer, Learned, TokenFunction, read_layers
from vlprune.selectors import TopK

LAYERS = (Depth(3, of=12), Depth(6, of=12), Depth(9, of=12))
PARTS = 5  # a norm and four linear maps


def dynamicvit(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 0.343,
    *,
    predictor: Any = None,
    layers: Sequence[int] | None = None,
) -> PruningMethod:
    """Keep what the predictors want to keep, stage by stage.

    Args:
        facts: of the model.
        keep: share of an image's patches left at the end, reached in equal ratios; or a share or number per stage.
        predictor: the trained predictors of all stages: a state dict, a module, or the path of a .safetensors file; one of these for each
            stage; or functions from tokens (B, N, D) to scores (B, N), one for all stages or one for each.
        layers: vision blocks, counted from 0, before which patches leave; by default 3, 6 and 9 of 12, scaled to the depth.
    """
    depth = facts.vision_layers
    chosen = scaled_layers(LAYERS, depth) if layers is None else given_layers("layers", layers, 0, depth)
    functions = predictors(predictor, len(chosen))
    if isinstance(keep, float):
        steps = range(1, len(chosen) + 1)
        budgets = tuple(Budget(round(keep ** (step / len(chosen)), 9), "floor") if step < len(chosen) else Budget(keep, "floor") for step in steps)
    elif isinstance(keep, Sequence) and not isinstance(keep, str):
        budgets = given_budgets(keep, len(chosen), "floor")
    elif len(chosen) == 1:
        budgets = (Budget(keep),)
    else:
        raise OptionError(f"keep={keep!r} with {len(chosen)} stages: a share such as 0.343, or one share or number per stage")
    stages = (
        Stage(VisionLayer(layer), Learned(function), TopK(), Drop(), budget) for layer, function, budget in zip(chosen, functions, budgets, strict=True)
    )
    return PruningMethod("dynamicvit", tuple(stages))


def predictors(source: Any, num_stages: int) -> list[TokenFunction]:
    """One function a stage from what the user gave."""
    if source is None:
        raise OptionError(f"dynamicvit needs its trained predictors: predictor= {GIVE}, with {PARTS} layers (a norm, four linear maps) for each stage")
    if _is_function(source):
        return [source] * num_stages
    parts = list(source) if isinstance(source, (list, tuple)) else [source]
    if parts and all(_is_function(part) for part in parts):
        found = parts
    else:
        layers = [layer for part in parts for layer in read_layers(part, "predictor", "predictor")]
        found = [checked(layers[start : start + PARTS]) for start in range(0, len(layers), PARTS)]
    if len(found) != num_stages:
        raise OptionError(f"predictor: {len(found)} stages in it, but the method has {num_stages}; give `layers` with as many blocks")
    return found


def checked(layers: Sequence[Layer]) -> KeepPredictor:
    """A predictor whose shapes fit."""
    shapes = [tuple(weight.shape) for weight, _ in layers]
    width = shapes[0][0]
    wanted = [(width,), (width, width), (width // 2, width), (width // 4, width // 2), (2, width // 4)]
    if shapes != wanted or any(bias.shape != weight.shape[:1] for weight, bias in layers):
        raise OptionError(f"predictor: a stage has weights of shapes {shapes}; {wanted} are needed, each with a bias")
    return KeepPredictor(tuple(layers))


def untrained(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Random weights of whatever width the tokens have: for tests, worth nothing else."""

    def score(tokens: Tensor) -> Tensor:
        width, generator = tokens.shape[-1], torch.Generator().manual_seed(seed)
        sizes = [(width, width), (width // 2, width), (width // 4, width // 2), (2, width // 4)]
        maps = [(torch.randn(size, generator=generator) * size[1] ** -0.5, torch.randn(size[0], generator=generator)) for size in sizes]
        return KeepPredictor(((torch.ones(width), torch.zeros(width)), *maps))(tokens)

    return score


def _is_function(source: Any) -> bool:
    return callable(source) and not isinstance(source, torch.nn.Module)


CARD = MethodCard(
    "dynamicvit",
    dynamicvit,
    "trained predictors before three blocks of a vision tower (weights needed)",
    paper="arXiv:2106.02034",
    code="https://github.com/raoyongming/DynamicViT",
    points=("vision:K",),
    modality="image",
    default_keep=0.343,
    test_options={"predictor": untrained()},
)
