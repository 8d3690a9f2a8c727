"""What is run on every sample: dense first, then random, then the methods, each at each keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import nn

import vlprune
from vlprune.adapter import find_adapter
from vlprune.api import build_method, check_stages
from vlprune.errors import OptionError, VlpruneError
from vlprune.fitting import fit, reason
from vlprune.method import PruningMethod

DENSE = "dense"
RANDOM = "random"


@dataclass(frozen=True)
class Setting:
    """One way to run the model.

    Attributes:
        method, keep: as the user wrote them; ``keep`` is ``"1"`` for dense.
        draw: number of the random draw; 0 for everything that is not random.
        built: what `vlprune.apply` gets; ``None`` for dense.
        options: what the method was given beside ``keep``, in words.
        counted: whether the method leaves a number of tokens that is known before it sees them.
    """

    method: str
    keep: str
    draw: int = 0
    built: PruningMethod | None = field(default=None, repr=False, compare=False)
    options: str = ""
    counted: bool = True

    @property
    def label(self) -> str:
        """Unique in a run of `vlprune eval`, and what answers are kept under."""
        return self.method if self.method == DENSE else f"{self.method}@{self.keep}" + (f"#{self.draw}" if self.draw else "")

    @property
    def row(self) -> str:
        """The row of the table; draws of random share one."""
        return self.label.partition("#")[0]


def make_settings(
    model: nn.Module,
    methods: Sequence[str],
    keeps: Sequence[str],
    modality: str,
    *,
    draws: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[Setting], dict[str, str]]:
    """The settings in the order of the tables, and why the other methods are left out.

    Args:
        model: to build the methods for.
        methods: names, or ``["all"]``. ``dense`` and ``random`` are always among them, and first.
        keeps: shares such as ``"1/3"`` or numbers such as ``"64"``.
        modality: of the items that the model sees: ``"image"`` or ``"video"``.
        draws: runs of random with different seeds.
        options: by method, beside ``keep``.

    Raises:
        VlpruneError: a method, a keep or an option that does not exist or cannot work.
    """
    names = vlprune.list_methods("visual") if list(methods) == ["all"] else list(dict.fromkeys(methods))
    for name in names:
        vlprune.get_method(name)
    extra = {name: dict(given) for name, given in (options or {}).items()}
    strange = sorted(set(extra) - set(names))
    if strange:
        raise OptionError(f"options for {', '.join(strange)}, which is not among the methods {', '.join(names)}")
    fixed = sorted({DENSE, RANDOM} & set(extra))
    if fixed:
        raise OptionError(f"options for {', '.join(fixed)}: the baselines take none; more draws of random are --draws N")
    named = [name for name in names if name not in (DENSE, RANDOM)]
    found, left_out = [Setting(DENSE, "1")], {}
    for keep in keeps:
        share = parse_share(keep)
        found += [Setting(RANDOM, keep, draw, _build(model, RANDOM, share, {"seed": draw})) for draw in range(draws)]
        for name in named:
            card = vlprune.get_method(name)
            if name in extra and card.modality in ("any", modality):     # options that a user wrote are right, or an error
                words = ", ".join(f"{key}={value!r}" for key, value in extra[name].items())
                found.append(Setting(name, keep, 0, _build(model, name, share, extra[name]), words, not card.adaptive))
                continue
            try:
                one = fit(model, name, share, modality)
            except VlpruneError as error:
                left_out[name] = reason(error).removeprefix(f"{name} ")
                continue
            found.append(Setting(name, keep, 0, one.method, one.options, not card.adaptive))
    return found, left_out


def parse_share(text: str) -> float | int:
    """``"1/3"`` and ``"0.5"`` are shares, ``"64"`` is a number of tokens an item."""
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise OptionError(f"keep {text!r}: a share such as 1/3 or 0.25, or a number of visual tokens an item such as 64") from None
    if number > 1 and number.denominator == 1 and "." not in text:
        return int(number)
    if not 0 < number <= 1:
        raise OptionError(f"keep {text!r}: a share lies above 0 and is at most 1")
    return float(number)


def _build(model: nn.Module, name: str, keep: Any, options: Mapping[str, Any]) -> PruningMethod:
    adapter = find_adapter(model)
    built = build_method(name, adapter.facts, keep, dict(options))[0]
    check_stages(built, adapter)
    return built
