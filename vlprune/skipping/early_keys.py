"""EarlyKeys: the projections that SwiftKV trains: keys and values of the later layers from one earlier layer's state, and queries that go with them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.errors import OptionError

KIND = "vlprune.early_keys"


class EarlyKeys(nn.Module):
    """A norm, a query projection for each layer from ``start`` on, and key and value projections for each group of them.

    Args:
        depth: layers of the decoder.
        start: 0-based layer whose input the keys are made of.
        group: how many consecutive layers share keys and values (AcrossKV); 1: each has its own. The last group may be smaller.
        width: of the hidden states. queries, keys: widths of what the projections give.
        bias: whether they have biases.
        eps: of the norm.
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, depth: int, start: int, group: int, width: int, queries: int, keys: int, *, bias: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        if not 0 < start < depth or group < 1:
            raise OptionError(f"start={start}, group={group}: of {depth} layers, start at one from 1 to {depth - 1} and let 1 or more share keys")
        self.depth, self.start, self.group, self.eps = depth, start, group, eps
        self.norm = nn.Parameter(torch.ones(width))
        later, groups = depth - start, -(-(depth - start) // group)
        self.q = nn.Parameter(torch.zeros(later, queries, width))
        self.k, self.v = (nn.Parameter(torch.zeros(groups, keys, width)) for _ in range(2))
        for name, count, size in (("q_bias", later, queries), ("k_bias", groups, keys), ("v_bias", groups, keys)):
            self.register_parameter(name, nn.Parameter(torch.zeros(count, size)) if bias else None)

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Module], start: int, group: int = 1, *, own_norms: bool = True) -> EarlyKeys:
        """As before training: the norm of layer ``start``, the model's own queries, and keys and values averaged over the layers of a group.

        Args:
            layers: of the decoder, in order (`vlprune.skipping.layers.decoder_layers`).
            start: as in the class.
            group: as in the class.
            own_norms: multiply each layer's keys and values by what its own norm has for that of layer ``start``, so that they start as the layer's own;
                the paper takes them as they are.

        Raises:
            OptionError: no RMS norm, or no separate projections of queries, keys and values.
        """
        blocks: list[Any] = list(layers)
        norm = getattr(blocks[0], "input_layernorm", None)
        attns = [getattr(block, "self_attn", None) for block in blocks]
        parts: list[list[Any]] = [[getattr(attn, f"{name}_proj", None) for name in "qkv"] for attn in attns]
        if norm is None or "RMSNorm" not in type(norm).__name__ or not all(isinstance(part, nn.Linear) for three in parts for part in three):
            raise OptionError(
                f"{type(blocks[0]).__name__}: looked for input_layernorm (an RMS norm) and for self_attn with the linear maps q_proj, k_proj and v_proj; other "
                "layers have no early keys here"
            )
        q, k, _ = parts[0]
        eps = float(getattr(norm, "variance_epsilon", 0) or getattr(norm, "eps", 0) or 1e-6)
        made = cls(len(blocks), start, group, q.in_features, q.out_features, k.out_features, bias=k.bias is not None, eps=eps)
        made = made.to(q.weight.device, q.weight.dtype)
        ones = torch.ones(q.in_features, device=q.weight.device, dtype=q.weight.dtype)
        norms = [block.input_layernorm(ones).float() * (1 + eps) ** 0.5 for block in blocks]     # whatever form the weight is kept in
        made.norm.copy_(norms[start])
        factors = [torch.where(norms[start].abs() > 1e-6, own / norms[start], 0.0) if own_norms else torch.ones_like(own) for own in norms]
        for place, (query, _, _) in enumerate(parts[start:]):
            made.q[place].copy_(query.weight)
            if made.q_bias is not None and query.bias is not None:
                made.q_bias[place].copy_(query.bias)
        for number in range(made.k.shape[0]):
            members = range(start + number * group, min(start + (number + 1) * group, len(blocks)))
            for which, own, bias in ((1, made.k, made.k_bias), (2, made.v, made.v_bias)):
                own[number].copy_(torch.stack([parts[layer][which].weight.float() * factors[layer] for layer in members]).mean(dim=0))
                if bias is not None:
                    bias[number].copy_(torch.stack([parts[layer][which].bias for layer in members]).mean(dim=0))
        return made

    def leader(self, layer: int) -> int:
        """The layer whose keys and values a layer uses, itself or a lower one."""
        return layer - (layer - self.start) % self.group

    def project(self, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, Hkv d) of a layer for states (B, L, D) at the input of layer ``start``, before norms of heads and rotation."""
        self._follow(states)
        exact = states.float()
        normed = (exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)).to(states.dtype) * self.norm.to(states.dtype)
        number = (layer - self.start) // self.group
        return self._linear(normed, self.k, self.k_bias, number), self._linear(normed, self.v, self.v_bias, number)

    def query(self, layer: int, states: Tensor) -> Tensor:
        """Queries (B, L, H d) of a layer for what its attention is given."""
        self._follow(states)
        return self._linear(states, self.q, self.q_bias, layer - self.start)

    def calls(self, layer: int) -> tuple[Any, Any]:
        """`project` and `query` of one layer."""
        return partial(self.project, layer), partial(self.query, layer)

    @staticmethod
    def _linear(states: Tensor, weights: Tensor, biases: Tensor | None, number: int) -> Tensor:
        return F.linear(states, weights[number].to(states.dtype), None if biases is None else biases[number].to(states.dtype))

    def _follow(self, states: Tensor) -> None:
        if states.shape[-1] != self.norm.numel():
            raise OptionError(f"these projections were made for states of width {self.norm.numel()}, not {states.shape[-1]}: make some for this model")
        if self.norm.device != states.device:
            self.to(states.device)

    def save(self, path: str | os.PathLike[str], **notes: Any) -> Path:
        """Write a safetensors file; ``notes`` (plain numbers and words) go into its header."""
        from safetensors.torch import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"depth": self.depth, "start": self.start, "group": self.group, "eps": self.eps}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, target, metadata={"kind": KIND, "about": json.dumps(about), "notes": json.dumps(notes)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EarlyKeys:
        """Read them, or say what is wrong with the file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise OptionError(f"weights={str(path)!r} cannot be read: {error}") from error
        if header.get("kind") != KIND:
            raise OptionError(f"weights={str(path)!r} holds no early keys of vlprune: save them with vlprune.skipping.early_keys.EarlyKeys.save")
        about = json.loads(header["about"])
        _, queries, width = tensors["q"].shape
        made = cls(about["depth"], about["start"], about["group"], width, queries, tensors["k"].shape[1], bias="k_bias" in tensors, eps=about["eps"])
        made = made.to(tensors["q"].dtype)
        made.load_state_dict(tensors)
        return made.eval()
