"""How much a projector's output moves with its input, token by token: the kernel of `vlprune.kernels.sensitivity` on a host's module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import MissingSignalError


def two_layers(module: nn.Module) -> tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear] | None:
    """First linear layer, activation and second one of a projector that is nothing else, or ``None``."""
    names = (("linear_1", "act", "linear_2"), ("linear_fc1", "act_fn", "linear_fc2"))
    for first, act, second in names:
        parts = [getattr(module, name, None) for name in (first, act, second)]
        if isinstance(parts[0], nn.Linear) and callable(parts[1]) and isinstance(parts[2], nn.Linear):
            return parts[0], parts[1], parts[2]
    inner = getattr(module, "mlp", module)
    if isinstance(inner, nn.Sequential) and len(inner) == 3 and isinstance(inner[0], nn.Linear) and isinstance(inner[2], nn.Linear):
        return inner[0], inner[1], inner[2]
    return None


def sensitivity(
    module: nn.Module,
    features: Tensor,
    options: tuple[Any, ...],
    prepare: Callable[[Tensor], Tensor] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Sensitivity (B, N) of a projector at ``features`` (B, N, Dv), and the FLOPs of finding it.

    Args:
        module: the projector.
        features: its inputs, a row a token.
        options: ``("closed",)`` for the exact norm of the Jacobian of a two-layer projector, or ``("monte_carlo", m, h, seed)``.
        prepare: what stands before the two layers inside the module (a norm); the closed form is that of the layers alone.
        forward: the module's forward on (..., Dv) where the module itself takes another shape.
    """
    from vlprune.kernels.sensitivity import mlp_sensitivity, projector_sensitivity

    layers = two_layers(module)
    rows = features.shape[0] * features.shape[1]
    if options[0] == "closed":
        if layers is None:
            raise MissingSignalError(
                f"the closed form is that of two linear layers with an activation between them, and {type(module).__name__} is not made so; "
                "choose estimator='monte_carlo', which takes any projector"
            )
        first, act, second = layers
        inner = first.out_features
        flops = 2.0 * rows * (first.in_features * inner + inner**2) + 2.0 * inner**2 * (first.in_features + second.out_features)
        ready = features.float() if prepare is None else prepare(features).float()
        return mlp_sensitivity(first.weight, first.bias, second.weight, lambda x: elementwise_derivative(act, x), ready), flops
    _, directions, step, seed = options
    each = 2.0 * sum(parameter.numel() for parameter in module.parameters())
    return projector_sensitivity(single_precision(module, forward), features.float(), directions, step, seed), 2.0 * directions * rows * each


def single_precision(module: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """``forward`` (default: the module's) in float32, on a copy where the weights are of another type; the module itself is not changed."""
    if all(value.dtype == torch.float32 for value in module.parameters()):
        return forward or module.forward  # type: ignore[return-value]
    double = copy.deepcopy(module).float()
    return double.forward if forward is None else partial(forward, module=double)  # type: ignore[call-arg, return-value]


def elementwise_derivative(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function at ``x``, also where the caller records nothing (``torch.inference_mode``)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(act(x).sum(), x)[0]
