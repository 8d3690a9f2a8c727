"""LayerRouters: for each of some decoder layers one linear map from a token's state to a number, trained (VideoLLM-MoD's LayerExperts)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

KIND = "vlprune.layer_routers"
WEIGHTS = ("none", "through", "sigmoid")


class LayerRouters(nn.Module):
    """One scalar router a layer.

    Args:
        width: of the hidden states.
        layers: 0-based decoder layers that have one.
        seed: of the first weights, drawn small.

    Attributes:
        noise: scale of Gumbel noise on the logits that choose, in training mode, so that other tokens get their turn.
    """

    noise = 0.0

    def __init__(self, width: int, layers: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.width, self.layers = width, tuple(layers)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(len(self.layers), width, generator=generator) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(self.layers)))

    def forward(self, states: Tensor, layer: int) -> Tensor:
        """(B, L) float32 logits for states (B, L, D) at the input of a layer."""
        if states.shape[-1] != self.width:
            raise OptionError(f"these routers were made for states of width {self.width}, and here they are {states.shape[-1]} wide: train some for this model")
        if self.weight.device != states.device:
            self.to(states.device)
        row = self.layers.index(layer)
        return states.float() @ self.weight[row].float() + self.bias[row].float()

    def save(self, path: str | os.PathLike[str], **notes: Any) -> Path:
        """Write a safetensors file; ``notes`` (plain numbers and words) go into its header."""
        from safetensors.torch import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, target, metadata={"kind": KIND, "layers": json.dumps(self.layers), "notes": json.dumps(notes)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerRouters:
        """Read one, or say what is wrong with the file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise OptionError(f"router={str(path)!r} cannot be read: {error}") from error
        if header.get("kind") != KIND:
            raise OptionError(f"router={str(path)!r} holds no routers of vlprune: save them with vlprune.scorers.layer_routers.LayerRouters.save")
        made = cls(int(tensors["weight"].shape[1]), json.loads(header["layers"]))
        made.load_state_dict(tensors)
        return made.eval()


class LayerRouterScore:
    """Scores of the router of one layer, and what it multiplies a block's result by."""

    def __init__(self, routers: nn.Module, layer: int, weigh: str = "none") -> None:
        self.routers, self.layer, self.how = routers, layer, weigh

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing but the tokens."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) logits."""
        logits: Tensor = self.routers(inputs.tokens, self.layer)
        noise = float(getattr(self.routers, "noise", 0.0)) if self.routers.training else 0.0
        return logits - noise * torch.empty_like(logits).exponential_().log() if noise else logits

    def flops(self, inputs: ScoreInputs) -> float:
        """Of one product a token."""
        return 2.0 * inputs.tokens.numel()

    def weigh(self, states: Tensor) -> Tensor:
        """(B, L) factors: the sigmoid of the logit, or 1 with the gradient of it."""
        share = torch.sigmoid(self.routers(states, self.layer))
        return share if self.how == "sigmoid" else 1.0 + share - share.detach()
