"""DeleteGate: learns which tokens of an encoder can go, softly while it trains, by deleting them afterwards.

Reference: MrT5, arXiv:2410.20771. Official code: https://github.com/jkallini/mrt5 (`models/modeling_mrt5.py`, `training/trainer.py`)

Convention: behind some early layer each state x gets ``G = s * sigmoid(-(W norm(x) + b))`` with s = -30, so G lies between 0 (stays) and s (leaves). *Soft*:
G is added to the attention logits of its key in all later layers, and in the cross-attention of a decoder; the loss of the task reaches the gate through it.
*Hard*: tokens with G at or below s / 2 leave, and with them their places in masks and in T5's relative position bias, along both axes. Filler has s from
the start. The bias b begins at 1, so that nothing much leaves at first.

Differences:
- The norm is a layer norm, as written in the paper; ``norm="rms"`` is T5's.
- ``W`` begins at zero, so that every token has the same gate at first (how the released one begins is not known here).
- Hard choices of a batch are as long as the longest; shorter rows get the tokens that came closest to staying, marked as filler in ``valid``. With
  ``num_keep`` exactly so many stay, the ones with the highest G.
- `DeletionControl`: the weight of the loss is ``p * error + i * sum of errors``, never below 0; error is target less rate. This form is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlprune.errors import NotFiniteError, OptionError
from vlprune.protocols import ScoreInputs, Tap, gather_tokens

SCALE = -30.0
NORMS = ("layer", "rms")
FORMAT = "vlprune.delete_gate"


class HardChoice(NamedTuple):
    """Which tokens stay.

    Attributes:
        keep_indices: (B, K) int64, strictly increasing, as every selector gives them.
        valid: (B, K) False where the token is there only to make rows equally long: mask it as a key.
    """

    keep_indices: Tensor
    valid: Tensor


class DeleteGate(nn.Module):
    """The trainable part.

    Args:
        width: of the encoder.
        scale: s, below 0: the lowest gate.
        norm: ``"layer"`` or ``"rms"``.
        bias: where b begins.
        eps: of the norm.
    """

    def __init__(self, width: int, scale: float = SCALE, norm: str = "layer", bias: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(f"width={width!r}: of the encoder's states, an int from 1")
        if not scale < 0:
            raise OptionError(f"scale={scale!r}: the lowest gate, a number below 0 (MrT5: -30)")
        if norm not in NORMS:
            raise OptionError(f"norm={norm!r}: {' or '.join(map(repr, NORMS))}")
        self.width, self.scale, self.kind, self.eps = width, float(scale), norm, eps
        self.norm: nn.Module = nn.LayerNorm(width, eps=eps) if norm == "layer" else nn.RMSNorm(width, eps=eps)
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, bias)

    @property
    def threshold(self) -> float:
        """Tokens with a gate at or below it leave."""
        return self.scale / 2

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gates (B, L), float32, of states (B, L, D); filler, where ``mask`` (B, L) is 0, has the lowest."""
        if states.shape[-1] != self.width:
            raise OptionError(f"this gate is for states of width {self.width}, but these have {states.shape[-1]}; build one with width={states.shape[-1]}")
        gates = self.scale * torch.sigmoid(-self.linear(self.norm(states.to(self.linear.weight.dtype)))[..., 0].float())
        return gates if mask is None else gates.masked_fill(mask == 0, self.scale)

    def key_bias(self, gates: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B, 1, 1, L), to be added to the attention logits of later layers, beside their masks."""
        return gates[:, None, None].to(dtype or gates.dtype)

    def keep_mask(self, gates: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L) which tokens stay; a row whose tokens would all leave keeps its best. Filler never stays."""
        there = torch.ones_like(gates, dtype=torch.bool) if mask is None else mask != 0
        stays = (gates > self.threshold) & there
        best = torch.zeros_like(stays).scatter(1, gates.masked_fill(~there, -torch.inf).argmax(dim=1, keepdim=True), True)
        return torch.where(stays.any(dim=1, keepdim=True), stays, best & there)

    def choose(self, gates: Tensor, mask: Tensor | None = None, num_keep: int | None = None) -> HardChoice:
        """The tokens that stay.

        Args:
            gates: (B, L).
            mask: (B, L), 0 for filler.
            num_keep: K; ``None``: as many as are above the threshold in the row that keeps most. That number is read back from the device.
        """
        length = gates.shape[1]
        if num_keep is not None and (isinstance(num_keep, bool) or not isinstance(num_keep, int) or not 1 <= num_keep <= length):
            raise OptionError(f"num_keep={num_keep!r}: from 1 to the {length} tokens there are")
        stays = self.keep_mask(gates, mask)
        count = int(stays.sum(dim=1).max()) if num_keep is None else num_keep
        there = torch.ones_like(stays) if mask is None else mask != 0
        order = gates.detach() + 2 * abs(self.scale) * stays                             # those that stay are above all others
        order = order.masked_fill(~there, -torch.inf)
        indices = order.topk(count, dim=1).indices.sort(dim=1).values                    # (B, K), left to right
        return HardChoice(indices, (there if num_keep is not None else stays).gather(1, indices))

    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file that `load` reads."""
        from safetensors.torch import save_file

        target = _checked(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "scale": repr(self.scale), "norm": self.kind, "eps": repr(self.eps)}
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, target, metadata=about)
        return target

    @classmethod
    def load(cls, path: str | Path) -> DeleteGate:
        """Read such a file, in evaluation mode on the CPU.

        Raises:
            OptionError: no such file, or not one that `save` wrote.
        """
        from safetensors import SafetensorError, safe_open

        source = _checked(path)
        if not source.is_file():
            raise OptionError(f"{str(path)!r}: no such file")
        try:
            with safe_open(str(source), framework="pt") as file:
                about = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise OptionError(f"{str(path)!r} cannot be read: {error}") from error
        if about.get("format") != FORMAT or "linear.weight" not in weights:
            raise OptionError(f"{str(path)!r} does not hold a delete gate as DeleteGate.save writes it")
        gate = cls(weights["linear.weight"].shape[1], float(about["scale"]), about["norm"], eps=float(about["eps"]))
        gate.load_state_dict(weights)
        return gate.eval()


def _checked(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise OptionError(f"{str(path)!r}: only .safetensors files are read and written")
    return Path(path)


def cut(states: Tensor, choice: HardChoice) -> Tensor:
    """(B, K, ...) of states or of a mask (B, L, ...)."""
    return gather_tokens(states, choice.keep_indices)


def cut_bias(bias: Tensor, choice: HardChoice) -> Tensor:
    """(B, H, K, K) of a relative position bias (1 or B, H, L, L): rows and columns of the tokens that stay."""
    keep = choice.keep_indices
    batch, count = keep.shape
    heads, length = bias.shape[1], bias.shape[3]
    rows = bias.expand(batch, -1, -1, -1).gather(2, keep[:, None, :, None].expand(-1, heads, -1, length))
    return rows.gather(3, keep[:, None, None].expand(-1, heads, count, -1))


def gate_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean gate over the tokens that are no filler: the lower, the more leaves. Weighted by `DeletionControl`, add it to the task's loss."""
    return gates.mean() if mask is None else (gates * (mask != 0)).sum() / (mask != 0).sum().clamp(min=1)


def deletion_rate(gates: Tensor, threshold: float, mask: Tensor | None = None) -> Tensor:
    """Share of the tokens, filler not counted, whose gate is at or below the threshold; a scalar on the device."""
    there = torch.ones_like(gates, dtype=torch.bool) if mask is None else mask != 0
    return ((gates <= threshold) & there).sum() / there.sum().clamp(min=1)


@dataclass
class DeletionControl:
    """Moves the weight of `gate_loss` so that a share of the tokens leaves.

    Attributes:
        target: share of tokens that is to leave, from 0 to below 1.
        proportional: MrT5's is 0.5.
        integral: MrT5's is 1e-5.
        total: sum of the errors up to now; with ``weight`` all that a checkpoint needs.
        weight: of the loss, as of the latest `update`.
    """

    target: float
    proportional: float = 0.5
    integral: float = 1e-5
    total: float = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise OptionError(f"target={self.target!r}: share of the tokens that is to leave, from 0 to below 1")

    def update(self, rate: float | Tensor) -> float:
        """The weight for the next step, given the rate of this one."""
        value = float(rate)
        if not 0 <= value <= 1:
            raise NotFiniteError(f"rate={value!r}: a share between 0 and 1 is wanted")
        error = self.target - value
        self.total += error
        self.weight = max(0.0, self.proportional * error + self.integral * self.total)
        return self.weight


@dataclass(frozen=True)
class GateScores:
    """The gate as a scorer of the engine: the higher, the more worth keeping."""

    gate: nn.Module

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own: it looks at the tokens at the point."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N)."""
        scores: Tensor = self.gate(inputs.tokens)
        return scores.float()
