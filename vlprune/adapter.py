"""What the engine expects of an adapter, and how the right one is found."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

from torch import nn

from vlprune.errors import UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point


class Adapter(ABC):
    """Knowledge of one model family. It knows no method.

    Attributes:
        name: of the family.
        priority: adapters are asked in ascending order; the general ones come last.
        token_sets: which tokens of its models can be reduced (`vlprune.tokens.TOKEN_SETS`).
    """

    name: ClassVar[str] = ""
    priority: ClassVar[int] = 0
    token_sets: ClassVar[tuple[str, ...]] = ("visual",)

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter serves the model. Cheap, imports nothing."""

    @property
    @abstractmethod
    def facts(self) -> ModelFacts:
        """Depths and signals of this model."""

    @abstractmethod
    def points(self) -> list[str]:
        """Labels of every pruning point this model has."""

    @abstractmethod
    def offers(self, point: Point) -> frozenset[str]:
        """Kinds of signals that can be had at a point."""

    @abstractmethod
    def attach(self, hooks: HookSet, pruner: Any) -> None:
        """Put the hooks on. ``pruner`` is a `vlprune.pruner.Pruner`."""

    def bypass_layers(self) -> tuple[int, ...]:
        """Vision blocks in which some patches may skip the MLP."""
        return ()

    def default_method(self) -> tuple[str, float]:
        """Name and ``keep`` used by ``vlprune.apply(model)`` alone."""
        return "hiprune", 1 / 3

    def dimensions(self) -> dict[str, Any]:
        """Widths and depths for the FLOPs count; keys of `vlprune.flops.TowerShape` for ``"vision"`` and ``"decoder"``."""
        return {}


@cache
def adapter_classes() -> tuple[type[Adapter], ...]:
    """Every adapter in ``vlprune.adapters``, in the order they are asked."""
    package = importlib.import_module("vlprune.adapters")
    found: list[type[Adapter]] = []
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            found.extend(importlib.import_module(f"{package.__name__}.{info.name}").ADAPTERS)
    return tuple(sorted(found, key=lambda adapter: (adapter.priority, adapter.name)))


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter for a model, or say what was looked for."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"vlprune prunes a torch.nn.Module, got {type(model).__name__}. Pass the model itself, not a pipeline or a path.")
    for adapter in adapter_classes():
        if adapter.matches(model):
            return adapter(model)
    known = ", ".join(adapter.name for adapter in adapter_classes())
    kind = getattr(getattr(model, "config", None), "model_type", None)
    raise UnsupportedModelError(
        f"no adapter for {type(model).__name__} (model_type {kind!r}). Known families: {known}. "
        "To add one, see CONTRIBUTING.md, 'Add a model family'."
    )
