"""LowRankFFN: how far an MLP would move each token, guessed by a small copy of it: its most important channels, their matrices factored (SPTS's LTP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class LowRankMLP:
    """A gated MLP of width C instead of M, each matrix the product of two.

    Attributes:
        gate, up: (D, r) and (r, C). down: (C, r) and (r, D).
        activation: of the gate, a name in ``ACTIVATIONS``.
    """

    gate: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    activation: str = "silu"

    def __call__(self, states: Tensor) -> Tensor:
        """(..., D) of (..., D), what the MLP is given."""
        act = ACTIVATIONS[self.activation]
        inner = act(states @ self.gate[0] @ self.gate[1]) * (states @ self.up[0] @ self.up[1])
        return inner @ self.down[0] @ self.down[1]

    def flops(self, tokens: int) -> float:
        """Of the matrix products, for ``tokens``."""
        return 2.0 * tokens * sum(part.numel() for pair in (self.gate, self.up, self.down) for part in pair)

    def to(self, like: Tensor) -> LowRankMLP:
        """On the device and in the type of a tensor."""
        pairs = [(pair[0].to(like), pair[1].to(like)) for pair in (self.gate, self.up, self.down)]
        return LowRankMLP(pairs[0], pairs[1], pairs[2], self.activation)


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of (n, rank) and (rank, m) for a matrix (n, m)."""
    left, sizes, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def slimmed(gate: Tensor, up: Tensor, down: Tensor, channels: Tensor, rank: int, activation: str) -> LowRankMLP:
    """A small copy of an MLP with weights ``gate``, ``up`` (M, D) and ``down`` (D, M), as linear layers hold them, from some of its M channels."""
    if activation not in ACTIVATIONS:
        raise OptionError(f"activation {activation!r}: one of {', '.join(map(repr, ACTIVATIONS))}")
    return LowRankMLP(factor(gate[channels].T, rank), factor(up[channels].T, rank), factor(down[:, channels].T, rank), activation)


class LowRankFFN:
    """Scores at an MLP: the norm of what the small copy gives, times the last token's attention in the same layer (``attention=None``: the norm alone)."""

    def __init__(self, net: LowRankMLP, attention: Tap | None) -> None:
        self.net, self.attention = net, attention

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The attention row, if it takes part."""
        return () if self.attention is None else (self.attention,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        if self.net.gate[0].device != inputs.tokens.device or self.net.gate[0].dtype != inputs.tokens.dtype:
            self.net = self.net.to(inputs.tokens)
        norm: Tensor = self.net(inputs.tokens).float().norm(dim=-1)
        return norm if self.attention is None else norm * inputs.signal(self.attention)

    def flops(self, inputs: ScoreInputs) -> float:
        """Of the small copy."""
        return self.net.flops(inputs.tokens.shape[0] * inputs.tokens.shape[1])
