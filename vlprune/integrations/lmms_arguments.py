"""What `--model_args` of lmms-eval says to vlprune, and what it says to the class of lmms-eval that is wrapped.

``pretrained=...,method=hiprune,keep=1/3`` and, for several methods, ``method=visionzip+transprune,keep=1/9,visionzip.dominant=0.8``. lmms-eval has already
made numbers, true and false of what looks like them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

import vlprune
from vlprune.api import PruneHandle
from vlprune.budget import Budget
from vlprune.errors import OptionError, unknown
from vlprune.registry import get_method, list_methods

OWN = ("method", "keep", "positions", "plan", "report")


@dataclass(frozen=True)
class Pruning:
    """What to do to the model, and where to write what it cost.

    Attributes:
        methods: names; none of them: the default of the model family, or what the plan says.
        keep: as `vlprune.apply` takes it; ``1.0`` is the dense model.
        options: of the one method, or of each by its name.
        positions, plan: as `vlprune.apply` takes them.
        report: JSON file for the token counts.
    """

    methods: tuple[str, ...] = ()
    keep: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: str | None = None
    plan: str | None = None
    report: Path | None = None

    @property
    def dense(self) -> bool:
        """Whether the model is left alone."""
        return self.keep == 1.0 or self.methods == ("dense",)

    def apply(self, model: nn.Module) -> PruneHandle | None:
        """Prune the model; ``None`` where it is left alone."""
        if self.dense:
            return None
        method = None if not self.methods else self.methods[0] if len(self.methods) == 1 else list(self.methods)
        return vlprune.apply(model, method, self.keep, positions=self.positions, plan=self.plan, **self.options)


def split_arguments(given: Mapping[str, Any], wrapped: Collection[str], name: str) -> tuple[Pruning, dict[str, Any]]:
    """Sort the arguments: those of vlprune, and those of the wrapped class.

    Args:
        given: as lmms-eval parsed them.
        wrapped: parameters of the wrapped class.
        name: of the model id, for messages.

    Raises:
        UnknownNameError, OptionError: a name that nobody knows, or a value that cannot work. Nothing has been loaded by then.
    """
    passed_on = {key: value for key, value in given.items() if key in wrapped}
    own = {key: value for key, value in given.items() if key in OWN}
    rest = {key: value for key, value in given.items() if key not in passed_on and key not in own}
    methods = method_names(str(own["method"])) if "method" in own else ()
    options = _options(rest, methods, [*OWN, *wrapped], name)
    keep = parse_keep(own.get("keep"))
    if "plan" in own and (methods or rest or keep not in (None, 1.0)):
        raise OptionError("plan=FILE says method, keep and options by itself: leave them out, or leave out plan. Only keep=1, the dense model, goes with it.")
    report = Path(str(own["report"])) if "report" in own else None
    return Pruning(methods, keep, options, own.get("positions"), own.get("plan"), report), passed_on


def method_names(text: str) -> tuple[str, ...]:
    """Names joined by ``+``. Some names end in plus signs themselves, so the longest known one is taken first."""
    known = set(list_methods())
    found = _split_names(text, known)
    if found is None:
        wrong = next((part for part in text.split("+") if part and part not in known), text)
        raise unknown("method", wrong, known)
    if len(set(found)) < len(found):
        raise OptionError(f"method={text}: each of them once")
    return found


def parse_keep(value: Any) -> Any:
    """A share (also as ``1/3``), a number of visual tokens an item, ``[0.9,0.5,0.1]`` by stage, or a schedule's word. 1 is everything, not one token."""
    if isinstance(value, str):
        if value.startswith("["):
            return tuple(_listed("keep", value))
        try:
            value = float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            return value
    if value == 1:
        return 1.0
    if isinstance(value, (int, float)):
        Budget(value)                                                    # say what is wrong with it before the model is loaded
    return value


def _split_names(text: str, known: Collection[str]) -> tuple[str, ...] | None:
    if text in known:
        return (text,)
    for place in range(len(text) - 1, 0, -1):
        if text[place] == "+" and text[:place] in known and (rest := _split_names(text[place + 1 :], known)) is not None:
            return (text[:place], *rest)
    return None


def _options(rest: Mapping[str, Any], methods: tuple[str, ...], others: Collection[str], name: str) -> dict[str, Any]:
    """Options of the methods: by their names, or ``METHOD.OPTION``."""
    by_method: dict[str, dict[str, Any]] = {method: {} for method in methods}
    able = {method: [key for key, p in inspect.signature(get_method(method).build).parameters.items() if p.kind is p.KEYWORD_ONLY] for method in methods}
    for key, value in rest.items():
        method, dot, option = key.rpartition(".")
        if not dot and not any(key in names for names in able.values()):
            raise unknown(f"argument of {name}", key, {*others, *(option for names in able.values() for option in names)})
        if not dot and len(methods) > 1:
            raise OptionError(f"{key}={value} with several methods: say whose it is, such as {next(m for m in methods if key in able[m])}.{key}={value}")
        method = method if dot else methods[0]
        if method not in by_method:
            raise unknown(f"method in {key}={value}:", method, methods)
        if option == "keep" and len(methods) > 1:
            value = parse_keep(value)
        elif option not in able[method]:
            raise unknown(f"option of {method}", option, able[method])
        by_method[method][option] = tuple(_listed(key, value)) if isinstance(value, str) and value.startswith("[") else value
    return by_method[methods[0]] if len(methods) == 1 else {method: found for method, found in by_method.items() if found}


def _listed(name: str, text: str) -> list[Any]:
    try:
        return [tuple(entry) if isinstance(entry, list) else entry for entry in json.loads(text)]
    except ValueError as error:
        raise OptionError(f"{name}={text}: a list is written [0.9,0.5,0.1] ({error})") from error
