"""Which methods fit a model, and why the others do not: for benchmarks, pictures and evaluations that go through all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlprune.adapter import find_adapter
from vlprune.api import build_method, check_stages
from vlprune.errors import OptionError, VlpruneError
from vlprune.method import MethodCard, PruningMethod
from vlprune.registry import get_method


@dataclass(frozen=True)
class Fit:
    """A method made ready for a model. ``vlprune.apply(model, fit.method)`` puts it on.

    Attributes:
        options: what it was given beside ``keep``, in words; empty where its defaults do.
    """

    card: MethodCard
    method: PruningMethod
    options: str = ""

    @property
    def name(self) -> str:
        """As in the registry."""
        return self.card.name

    @property
    def points(self) -> str:
        """Labels of where it acts; a long row of neighbours shortened."""
        labels = list(dict.fromkeys([*(stage.point.label for stage in self.method.stages), *(bypass.label for bypass in self.method.patch_bypasses)]))
        return ", ".join(labels) if len(labels) < 4 else f"{labels[0]} ... {labels[-1]} ({len(labels)} points)"


def fit(model: nn.Module, name: str | MethodCard, keep: Any, modality: str = "image", *, untrained: bool = False) -> Fit:
    """Build a method for a model with its defaults.

    Methods that act in training only are asked to act always. Those that come without the weights that they need are refused, unless ``untrained``:
    then random ones stand in, which is enough to measure time.

    Raises:
        VlpruneError: it does not fit, and why.
    """
    card = name if isinstance(name, MethodCard) else get_method(name)
    if card.modality not in ("any", modality):
        raise OptionError(f"works on {card.modality}s only")
    adapter = find_adapter(model)
    options: dict[str, Any] = {}
    try:
        built = build_method(card, adapter.facts, keep, options)[0]
    except OptionError:
        if not untrained or not card.test_options:
            raise
        options = dict(card.test_options)
        built = build_method(card, adapter.facts, keep, options)[0]
    if built.stages and all(stage.training for stage in built.stages):
        options = dict(card.test_options)
        built = build_method(card, adapter.facts, keep, options)[0]
        if all(stage.training for stage in built.stages):
            raise OptionError("acts in training only")
    check_stages(built, adapter)
    return Fit(card, built, ", ".join(f"{key}={value!r}" if isinstance(value, (int, float, str)) else f"{key}=untrained" for key, value in options.items()))


def fitting(model: nn.Module, names: Iterable[str], keep: Any, modality: str = "image", *, untrained: bool = False) -> tuple[list[Fit], dict[str, str]]:
    """Those of ``names`` that fit, in their order, and the reason for each of the others."""
    found: list[Fit] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            found.append(fit(model, name, keep, modality, untrained=untrained))
        except VlpruneError as error:
            left_out[name] = reason(error).removeprefix(f"{name} ")
    return found, left_out


def reason(error: VlpruneError) -> str:
    """The first sentence of an error."""
    line = " ".join(str(error).split())
    return line.split(". ")[0].removesuffix(".")
