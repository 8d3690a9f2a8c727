"""Measure beforehand what a method wants to know of a model, on texts of yours.

    calibrate("spts", model, inputs, "probes", width=512, rank=192)
    vlprune.apply(model, "spts", probe="probes")

``vlprune calibrate`` is the same from the command line. `vlprune.skipping.CALIBRATIONS` holds the functions; all of them go on where they were stopped.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.errors import OptionError, unknown
from vlprune.registry import get_method
from vlprune.skipping import CALIBRATIONS
from vlprune.skipping.running_sums import Progress

#: Arguments that every calibration has; the others are its options.
COMMON = ("model", "inputs", "out", "progress", "resume", "options")


def calibrate(
    method: str,
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    resume: bool = True,
    **options: Any,
) -> Path:
    """Measure on a model and write a folder for the method's option (`option_of`).

    Args:
        method: a name in `vlprune.skipping.CALIBRATIONS`.
        model: dense, in evaluation mode; it is left as it was.
        inputs: calls of the model with ``input_ids`` and perhaps ``attention_mask``, such as `vlprune.skipping.texts.read_texts` makes.
        out: folder to write to.
        progress: told ``(done, total, what)``.
        resume: go on from what a stopped run left in the folder; else start anew.
        options: of the calibration.

    Raises:
        OptionError: a method that is not calibrated, or an option that does not exist.
    """
    function = calibration_of(method)
    known = options_of(function)
    for name in options:
        if known is not None and name not in known:
            raise unknown(f"option of the calibration of {method}", name, known)
    if model.training:
        raise OptionError("the model is in training mode, where dropout makes every run another: call model.eval() first")
    path: Path = function(model, inputs, Path(out), progress=progress, resume=resume, **options)
    return path


def calibration_of(method: str) -> Callable[..., Any]:
    """The function that measures for a method."""
    get_method(method)
    if method not in CALIBRATIONS:
        raise OptionError(f"{method} is not calibrated; these are: {', '.join(sorted(CALIBRATIONS))}")
    module, _, name = CALIBRATIONS[method].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def options_of(function: Callable[..., Any]) -> list[str] | None:
    """Names of a calibration's own options; ``None`` where it hands them on and checks them itself."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return [name for name in parameters if name not in COMMON]


def option_of(method: str) -> str | None:
    """The method's option that takes what was written; ``None`` where the calibration does not say."""
    calibration_of(method)
    return getattr(importlib.import_module(CALIBRATIONS[method].partition(":")[0]), "OPTION", None)


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as options; values are read as JSON where they are JSON."""
    found: dict[str, Any] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not name.isidentifier():
            raise OptionError(f"--option {text!r}: write NAME=VALUE, such as rank=192")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
