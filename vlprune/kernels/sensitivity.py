"""How much a projector's output moves with its input, token by token: exactly for two layers, by drawn directions for any projector.

Both answer the same question, how long the output's change is for a small step of unit length in the input, averaged over directions on the sphere.
With J the Jacobian at a token and Dv the width of its input, the root of the mean square is ``||J||_F / sqrt(Dv)``; the drawn estimate is a mean of
central differences. For ``W2 act(W1 x + b1) + b2`` with d the derivative of ``act`` at ``W1 x + b1``::

    ||J||_F^2 = ||W2 diag(d) W1||_F^2 = d^T [(W2^T W2) * (W1 W1^T)] d

so the bracket, inner x inner, is made once for the weights and each token costs one row of a matrix product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 2**22       # floats of moved inputs held at once
_known: Any = WeakIdKeyDictionary()     # first weight -> (its stamp, the second one, its stamp, the bracket); gone with the weight


@torch.no_grad()
def mlp_sensitivity(first: Tensor, bias: Tensor | None, second: Tensor, derivative: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Exact sensitivity (B, N) of two linear layers with an elementwise function between them.

    Args:
        first: (inner, Dv) weight of the first layer; ``bias`` (inner,) is its bias.
        bias: of the first layer.
        second: (outer, inner) weight of the second; its bias moves nothing.
        derivative: of the function between.
        features: (B, N, Dv).
    """
    with torch.autocast(features.device.type, enabled=False):
        coupling = _coupling(first, second)
        weight, shift = first.float(), None if bias is None else bias.float()
        squares = []
        for item in features.float():                                       # one product an item: its bits do not depend on its batch
            slope = derivative(F.linear(item, weight, shift))               # (N, inner)
            squares.append(((slope @ coupling) * slope).sum(dim=-1))
        return (torch.stack(squares).clamp(min=0) / first.shape[1]).sqrt()


def _coupling(first: Tensor, second: Tensor) -> Tensor:
    """(inner, inner) the bracket; made anew when a weight is another one or was written to."""
    stamps = _stamp(first), _stamp(second)
    found = _known.get(first)
    if found is not None and found[0]() is second and found[1] == stamps:
        return found[2]  # type: ignore[no-any-return]
    left, right = first.float(), second.float()
    coupling = (right.mT @ right) * (left @ left.mT)
    _known[first] = (weakref.ref(second), stamps, coupling)
    return coupling


def _stamp(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.device, weight.dtype, 0 if weight.is_inference() else weight._version


def projector_sensitivity(forward: Callable[[Tensor], Tensor], features: Tensor, directions: int, step: float, seed: int) -> Tensor:
    """Estimated sensitivity (B, N) of any projector.

    Args:
        forward: the projector in float32, (m, N, Dv) to (m, N, D); each row on its own.
        features: (B, N, Dv).
        directions: how many are drawn, the same for all tokens.
        step: length of the step to either side.
        seed: of the draw.
    """
    drawn = torch.randn(directions, features.shape[-1], generator=torch.Generator().manual_seed(seed))
    return central_differences(forward, features, drawn.to(features.device, non_blocking=True), step)


@torch.no_grad()
def central_differences(forward: Callable[[Tensor], Tensor], features: Tensor, directions: Tensor, step: float) -> Tensor:
    """Mean size (B, N) of the output's change along ``directions`` (m, Dv), which are brought to length 1, per unit of the input's."""
    with torch.autocast(features.device.type, enabled=False):
        steps = step * F.normalize(directions.float(), dim=-1)[:, None]     # (m, 1, Dv)
        at_once = max(1, CHUNK // max(1, features[0].numel()))
        means = []
        for item in features.float():
            total = item.new_zeros(item.shape[0])
            for part in torch.split(steps, at_once):
                total = total + torch.linalg.vector_norm(forward(item + part) - forward(item - part), dim=-1).sum(dim=0)
            means.append(total / (2 * step * steps.shape[0]))
        return torch.stack(means)
