"""Learned: a trained function of the tokens, and how its weights are read from what the user has.

Weights are never downloaded and no pickle is opened: a state dict, a module, or the path of a ``.safetensors`` file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

#: Weight and bias of a linear map or a norm.
Layer = tuple[Tensor, Tensor]
#: ``tokens (B, N, D) float32 -> (B, N)``: the higher, the more worth keeping.
TokenFunction = Callable[[Tensor], Tensor]
GIVE = "a state dict, a module, or the path of a .safetensors file"


@dataclass(frozen=True)
class Learned:
    """Scores by a function of the tokens at the point."""

    function: TokenFunction

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        return self.function(inputs.tokens.float())

    def flops(self, inputs: ScoreInputs) -> float:
        """Of the matrix products, where the function says."""
        count = getattr(self.function, "flops", None)
        return 0.0 if count is None else count(inputs.tokens.shape[0] * inputs.tokens.shape[1])


@dataclass(frozen=True)
class Layers:
    """Linear maps and norms, on whatever device and in whatever type they are asked for."""

    layers: tuple[Layer, ...]
    _placed: dict[Any, tuple[Layer, ...]] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Layer, ...]:
        """Copied once a device and type."""
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = tuple((weight.detach().to(device, dtype), bias.detach().to(device, dtype)) for weight, bias in self.layers)
        return self._placed[device, dtype]

    def flops(self, tokens: int) -> float:
        """Of the matrix products for so many tokens."""
        return 2.0 * tokens * sum(weight.numel() for weight, _ in self.layers if weight.dim() == 2)


@dataclass(frozen=True)
class LinearRouter(Layers):
    """One linear map to a logit."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N)."""
        ((weight, bias),) = self.on(tokens.device)
        return F.linear(tokens, weight, bias)[..., 0]


@dataclass(frozen=True)
class KeepPredictor(Layers):
    """DynamicViT's predictor: log-probability of keeping a token, from itself and from the mean of the tokens still there.

    Its layers are a norm (C), then linear maps C to C, C to C/2, C/2 to C/4 and C/4 to 2, GELU between them; behind the first map the second
    half of the channels is replaced by its mean over the tokens.
    """

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, N)."""
        norm, inner, first, second, last = self.on(tokens.device)
        features = F.gelu(F.linear(F.layer_norm(tokens, tokens.shape[-1:], *norm), *inner))
        own, shared = features.chunk(2, dim=-1)
        features = torch.cat((own, shared.mean(dim=1, keepdim=True).expand_as(shared)), dim=-1)
        for layer in (first, second):
            features = F.gelu(F.linear(features, *layer))
        return F.linear(features, *last).log_softmax(dim=-1)[..., 0]


@dataclass(frozen=True)
class Bottleneck(Layers):
    """An adapter: down to a narrow width, an activation, up again, times ``scale``; in the type of the states."""

    activation: Callable[[Tensor], Tensor] = F.relu
    scale: float = 1.0

    def __call__(self, states: Tensor) -> Tensor:
        """(B, L, D)."""
        down, up = self.on(states.device, states.dtype)
        return F.linear(self.activation(F.linear(states, *down)), *up) * self.scale


def read_layers(source: Any, option: str, marker: str) -> list[Layer]:
    """Weight and bias of every layer of ``source`` in natural order of the names.

    Args:
        source: of the weights.
        option: name of the user's option, for the messages.
        marker: where names of a larger model are among them, only those count that hold this word.
    """
    weights = read_weights(source, option)
    named = {name: value for name, value in weights.items() if marker in name} or weights
    prefixes = {name.rpartition(".")[0] for name in named if name.endswith((".weight", ".bias")) or name in ("weight", "bias")}
    layers = []
    for prefix in sorted(prefixes, key=lambda text: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]):
        pair = tuple(named.get(f"{prefix}.{name}" if prefix else name) for name in ("weight", "bias"))
        if not all(isinstance(value, Tensor) for value in pair):
            raise OptionError(f"{option}: {prefix or 'the only layer'} has no weight or no bias; both are needed")
        layers.append(pair)
    if not layers:
        raise OptionError(f"{option}: no weight with a bias in it (names: {', '.join(list(weights)[:5]) or 'none'})")
    return layers  # type: ignore[return-value]


def read_weights(source: Any, option: str) -> dict[str, Any]:
    """Name to tensor from what the user gave."""
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise OptionError(f"{option}={type(source).__name__}: {GIVE} is needed")
    path = Path(source)
    if path.suffix != ".safetensors":
        raise OptionError(
            f"{option}={str(source)!r}: only .safetensors files are read. Load others yourself (torch.load with weights_only=True) and give the state dict."
        )
    if not path.is_file():
        raise OptionError(f"{option}={str(source)!r}: no such file")
    from safetensors.torch import load_file

    return load_file(path)
