"""Tiny random vision towers of every host library, and what a pruned run of each must equal.

A family is a file in ``tests/vit_families/`` with a function ``families()``; the laws run over all of them without an edit here.
Where a host library cannot be imported, its families say why, and their tests skip with that reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.torchvision_stub import why_not

SIDE, PATCH, WIDTH, HEADS, DEPTH = 24, 4, 32, 4, 4


@dataclass
class TinyVit:
    """One model of one host library.

    Attributes:
        make: a fresh model; weights are redrawn afterwards.
        run: ``(model, pixels) -> outputs`` by name; every one is compared between runs. Names that start with ``tokens.`` hold a state for
            every token, or for every patch.
        blocks: the blocks of the tower.
        mask: ``(args, kwargs, bias (B, 1, L, L)) -> (args, kwargs)`` of a block with that additive attention mask.
        pool: ``(model, states) -> outputs`` of the heads for what the last block returned, as ``run`` names them; for towers whose heads
            read more than CLS.
        prefix: tokens in front of the patches.
        missing: why the model cannot be built here.
        eager: whether the attention implementation can be switched to eager.
        size: height and width of the pictures.
        sequence_first: whether the blocks work on (L, B, D).
        taps: whether the tower's attention can be read.
    """

    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    blocks: Callable[[nn.Module], list[nn.Module]]
    mask: Callable[[Any, Any, Tensor], tuple[Any, Any]]
    prefix: int
    pool: Callable[[nn.Module, Tensor], dict[str, Tensor]] | None = None
    missing: str | None = None
    eager: Callable[[nn.Module], None] | None = None
    size: tuple[int, int] = (SIDE, SIDE)
    sequence_first: bool = False
    taps: bool = True

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.size[0] // PATCH) * (self.size[1] // PATCH)

    def build(self, *, eager: bool = False, seed: int = 0) -> nn.Module:
        """An evaluation-mode model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        model = self.make()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():             # larger than usual weights: choices differ clearly
                if parameter.dim() > 1:
                    scale = 0.5 if "pos" in name or "token" in name or "probe" in name or "latent" in name else 1.3 / parameter.flatten(1).shape[1] ** 0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                elif name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                elif name.endswith("gamma"):
                    parameter.fill_(0.7)
        if eager:
            assert self.eager is not None
            self.eager(model)
        return model.eval()

    def pixels(self, count: int, seed: int = 0) -> Tensor:
        """``count`` reproducible pictures; picture ``i`` is the same whatever ``count``."""
        pictures = [torch.randn(3, *self.size, generator=torch.Generator().manual_seed(1000 * seed + number)) for number in range(count)]
        return torch.stack(pictures)

    @contextmanager
    def hidden_columns(self, model: nn.Module, gone: list[Tensor]) -> Iterator[None]:
        """Hide columns ``gone[block]`` (B, L) bool as keys in every block."""

        def make(number: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                bias = torch.zeros(gone[number].shape).masked_fill(gone[number], torch.finfo(torch.float32).min)
                return self.mask(args, kwargs, bias[:, None, None, :].expand(-1, 1, bias.shape[1], -1))

            return hook

        handles = [block.register_forward_pre_hook(make(number), with_kwargs=True) for number, block in enumerate(self.blocks(model))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@cache
def vit_families() -> dict[str, TinyVit]:
    """Every tiny tower by name."""
    why_not("timm")                                                      # before transformers looks for torchvision
    package = importlib.import_module("tests.vit_families")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        for family in importlib.import_module(f"tests.vit_families.{info.name}").families():
            found[family.name] = family
    return found
