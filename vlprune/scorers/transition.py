"""TransitionVariation: how much a token changes inside the attention and MLP modules of some decoder layers (TTV).

Reference: TransPrune, arXiv:2507.20630 (CVPR 2026).
Official code: https://github.com/liaolea/TransPrune (`compute_transf_weight`)

For a module with input T_in (after its norm) and output T_out (before the residual add), ``m = |T_out| / |T_in|`` and
``c = cos(T_out, T_in)``. A layer's score is the attention module's plus the MLP's, and layers are summed.

- ``"code"``: ``m * exp(1 - c) / z`` with ``z`` the sum of ``exp(1 - c)`` over the tokens of the whole row, text
  included.
- ``"paper"``: ``m * softmax(1 - |c|)`` over the visual tokens.

Differences: the released denominator runs over the whole batch; ours over one row, so that a row of a batch equals
that row alone (the same thing for one prompt). In the paper variant the softmax runs over the tokens still there when
the score is asked for, also for layers recorded before an earlier cut, because the dropped tokens' statistics are
gone by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

VARIANTS = ("code", "paper")


def transition_statistics(before: Tensor, after: Tensor, valid: Tensor | None = None) -> Tensor:
    """The statistics [m, c, z] (B, L, 3) of one module from its input and output (B, L, D), in float32.

    ``valid`` (B, L) is false on padding, which ``z`` leaves out.
    """
    before, after = before.float(), after.float()
    magnitude = after.norm(dim=-1) / before.norm(dim=-1)
    cosine = F.cosine_similarity(after, before, dim=-1)
    turn = torch.exp(1 - cosine)
    total = (turn if valid is None else turn.masked_fill(~valid, 0.0)).sum(dim=-1, keepdim=True)
    return torch.stack((magnitude, cosine, total.expand_as(turn)), dim=-1)


def transition_variation(statistics: Tensor, variant: str = "code") -> Tensor:
    """TTV (B, N) of one module from its statistics [m, c, z] (B, N, 3)."""
    magnitude, cosine, total = statistics.float().unbind(dim=-1)
    if variant == "paper":
        return magnitude * (1 - cosine.abs()).softmax(dim=-1)
    return magnitude * torch.exp(1 - cosine) / total


@dataclass(frozen=True)
class TransitionVariation:
    """Sum of TTV over ``layers`` (0-based decoder layers that have run before the point)."""

    layers: tuple[int, ...]
    variant: str = "code"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"variant={self.variant!r}: 'code' (as released) or 'paper'")
        if not self.layers:
            raise OptionError("token transitions need at least one decoder layer to look at")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Both modules' statistics of each layer."""
        return tuple(Tap("transition", layer) for layer in self.layers)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        score = inputs.tokens.new_zeros(inputs.tokens.shape[:2], dtype=torch.float32)
        for tap in self.needs:
            signal = inputs.signal(tap)
            for module in (signal[..., :3], signal[..., 3:]):  # attention, MLP: (B, N, 3) each
                score = score + transition_variation(module, self.variant)
        return score
