"""Thresholds on attention as numbers that can be learned: the soft side of `ltp`.

    thresholds = SoftThresholds(depth=len(model.get_decoder().layers))
    with thresholds.on(model):
        loss = model(**inputs, labels=labels).loss + weight * thresholds.kept()
        loss.backward()                                     # reaches thresholds.theta
    save_thresholds(thresholds.theta, "thresholds.safetensors")
    vlprune.apply(model, "ltp", thresholds="thresholds.safetensors")

A token that would leave is fainter instead: with M = sigmoid((p - theta) / temperature), multiplied up over the layers, log M is added to the attention
logits of its key in all later layers, and it counts with M as a query. The lower the temperature, the nearer to the hard choice.

Difference: the paper multiplies the states of an encoder with M. In a causal decoder a token of zeros would still be a key that takes attention, and the
limit would not be the hard choice; a bias on the key is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError, UnsupportedCallError
from vlprune.hooks import HookSet
from vlprune.selectors.above import RULES, cut_of
from vlprune.skipping.layers import decoder_layers

KIND = "vlprune.thresholds"


class SoftThresholds(nn.Module):
    """One threshold a layer.

    Args:
        depth: number of decoder layers.
        threshold: of the last layer to begin with; those below rise to it linearly.
        rule, per: as `ltp` has them.
        temperature: of the sigmoid, in units of the scores: with the rules ``"mean"`` and ``"max"`` in units of these.
        protect: how many of the first and last tokens of a row always stay.
    """

    def __init__(
        self, depth: int, threshold: float = 1.0, rule: str = "mean", per: str = "seen", temperature: float = 0.1, protect: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        if rule not in RULES or per not in ("seen", "all"):
            raise OptionError(f"rule={rule!r}, per={per!r}: rule is one of {', '.join(RULES)}, per is seen or all")
        if not temperature > 0:
            raise OptionError(f"temperature={temperature!r}: above 0")
        self.rule, self.per, self.temperature, self.protect = rule, per, temperature, protect
        self.theta = nn.Parameter(torch.tensor([threshold * (number + 1) / depth for number in range(depth)]))
        self.masks: list[Tensor] = []

    def kept(self) -> Tensor:
        """Mean of the soft masks of the last call over layers and tokens: the share that stays, to be made small. A scalar with a gradient."""
        if not self.masks:
            raise OptionError("no prompt has run yet under these thresholds")
        return torch.stack([mask.mean() for mask in self.masks]).mean()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[SoftThresholds]:
        """Soft masks in the prompts of a decoder, without cache, as in training. The model's weights may be frozen or not."""
        hooks, call = HookSet(), _Call()
        layers = decoder_layers(model)
        if len(layers) != self.theta.numel():
            raise OptionError(f"{self.theta.numel()} thresholds, and this model has {len(layers)} layers")
        try:
            hooks.before(_decoder_of(model), call.note)
            for number, layer in enumerate(layers):
                hooks.before(layer, self._before(number, call))
                if number + 1 < len(layers):
                    hooks.after(_attention_of(layer), self._after(number, call))
            yield self
        finally:
            hooks.remove()

    def _before(self, number: int, call: _Call) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
                raise UnsupportedCallError("soft thresholds need attn_implementation='sdpa' or 'eager'")
            if number == 0:
                call.begin(hidden, self.protect)
                self.masks = []
            call.enter(hidden, mask)
            if call.bias is None:
                return None
            return args, {**kwargs, "attention_mask": call.mask(hidden)}

        return hook

    def _after(self, number: int, call: _Call) -> Any:
        from vlprune.adapters import _attention

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            queries, keys = (_attention.project(module, hidden, which) for which in "qk")
            if kwargs.get("position_embeddings") is not None:
                queries, keys = (_attention.rotate(module, part, *kwargs["position_embeddings"]) for part in (queries, keys))
            mask = call.mask(hidden)
            weights = call.real.float() if call.bias is None else call.real * call.bias.exp()
            how = "seen" if self.per == "seen" else "mean"
            p = _attention.received(module, queries, keys, lambda places: mask[:, :, places].float(), weights, how, open_to=call.open)
            free = weights * call.free
            theta = self.theta[number]
            unit = cut_of(p, 1.0, self.rule, None if call.bias is None and bool(call.free.all()) else free)
            margin = p - theta if self.rule == "absolute" else p / unit.clamp(min=1e-12) - theta
            soft = torch.where(call.free, torch.nn.functional.logsigmoid(margin / self.temperature), 0.0)
            call.bias = soft if call.bias is None else call.bias + soft
            self.masks.append(call.bias.exp()[call.real & call.free])

        return hook


class _Call:
    """What one prompt has come to."""

    padding: Tensor | None = None

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The call of the decoder: which tokens are padding."""
        given = kwargs.get("attention_mask")
        self.padding = given if isinstance(given, Tensor) and given.dim() == 2 else None

    def begin(self, hidden: Tensor, protect: tuple[int, int]) -> None:
        """The first layer."""
        self.bias: Tensor | None = None
        batch, length = hidden.shape[:2]
        everything = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        self.real = everything if self.padding is None else self.padding[:, -length:].to(hidden.device).bool()
        order = self.real.cumsum(dim=1)
        self.free = self.real & (order > protect[0]) & (order <= order[:, -1:] - protect[1])

    def enter(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Each layer: (B, L, L) what its own mask lets see, windows among it."""
        length = hidden.shape[1]
        if mask is None:
            self.open = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril() & self.real[:, None]
        else:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            self.open = allowed.expand(hidden.shape[0], -1, -1, -1)[:, 0, :, :length]

    def mask(self, hidden: Tensor) -> Tensor:
        """(B, 1, L, L) additive: what the model allows, and the biases."""
        lowest = torch.finfo(hidden.dtype).min
        hard = torch.zeros(self.open.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~self.open, lowest)[:, None]
        return hard if self.bias is None else (hard + self.bias[:, None, None].to(hidden.dtype)).clamp(min=lowest)


def _decoder_of(model: nn.Module) -> nn.Module:
    from vlprune.adapter import find_adapter

    found: nn.Module = find_adapter(model).decoder  # type: ignore[attr-defined]
    return found


def _attention_of(layer: nn.Module) -> nn.Module:
    from vlprune.adapters._decoder_taps import attention_of

    return attention_of(layer)


def save_thresholds(thresholds: Tensor | Sequence[float], path: str | os.PathLike[str]) -> Path:
    """Write one threshold a layer to a safetensors file."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({"thresholds": torch.as_tensor(thresholds).detach().float().cpu().contiguous()}, target, metadata={"kind": KIND})
    return target


def load_thresholds(path: str | os.PathLike[str]) -> list[float]:
    """Read them, or say what is wrong with the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("kind") != KIND:
                raise OptionError(f"thresholds={str(path)!r} holds no thresholds: write them with vlprune.skipping.soft_thresholds.save_thresholds")
            return [float(value) for value in file.get_tensor("thresholds").tolist()]
    except (OSError, SafetensorError) as error:
        raise OptionError(f"thresholds={str(path)!r} cannot be read: {error}") from error
