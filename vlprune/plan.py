"""Plan files: which method with which numbers, for which model, and how these were found. Small JSON that people can read.

    {"vlprune": "0.1.0", "method": "vflowopt", "keep": [0.3, 0.25, 0.2], "options": {"t": 2.1},
     "model": {"class": "LlavaForConditionalGeneration", "decoder_layers": 32, "vision_layers": 24},
     "found": {...}}

``vlprune.apply(model, plan="plan.json")`` puts one on; ``vlprune tune`` writes one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprune.budget import Keep
from vlprune.errors import OptionError, unknown
from vlprune.method import ModelFacts

FIELDS = ("vlprune", "method", "keep", "options", "model", "found")
MODEL_FIELDS = ("class", "decoder_layers", "vision_layers")


@dataclass(frozen=True)
class Plan:
    """A method with its numbers, for one kind of model.

    Attributes:
        method, keep, options: as `vlprune.apply` takes them.
        model: what the model must be like; made by `fingerprint`.
        found: how the numbers were found; for people, nothing reads it.
        version: of the vlprune that made it.
    """

    method: str
    keep: Keep | str | Sequence[Keep]
    model: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def check(self, model: Any, facts: ModelFacts) -> None:
        """Raise an error unless the plan was made for a model like this one."""
        here = fingerprint(model, facts)
        wrong = [f"{name} {self.model.get(name)!r} (here {here[name]!r})" for name in MODEL_FIELDS if self.model.get(name) != here[name]]
        if wrong:
            options = "".join(f", {name}={value!r}" for name, value in self.options.items())
            raise OptionError(
                f"this plan was made for another model: {', '.join(wrong)}. Make one with `vlprune tune --method {self.method}`, or give its numbers by "
                f"hand: vlprune.apply(model, {self.method!r}, keep={self.keep!r}{options})"
            )


def fingerprint(model: Any, facts: ModelFacts) -> dict[str, Any]:
    """What two models must share for the numbers of one to make sense on the other: class and depths."""
    return {"class": type(model).__name__, "decoder_layers": facts.decoder_layers, "vision_layers": facts.vision_layers}


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a plan, whole or not at all."""
    from vlprune import __version__

    target = Path(path)
    entries = {
        "vlprune": plan.version or __version__, "method": plan.method, "keep": plan.keep, "options": dict(plan.options), "model": dict(plan.model),
        "found": dict(plan.found),
    }  # fmt: skip
    try:
        text = json.dumps(entries, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"this plan cannot be written: {error}. Numbers, words, and lists of them can; functions and tensors cannot.") from error
    _read(json.loads(text), "this plan")                                 # what is written can be read
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, target)
    return target


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan, or say what is wrong with the file."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"plan={str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:                                          # no JSON, or no text at all
        raise OptionError(f"plan={str(path)!r} is no plan file: it must hold JSON as `vlprune tune` writes it ({error})") from error
    return _read(entries, f"plan={str(path)!r}")


def _read(entries: Any, what: str) -> Plan:
    _only(entries, FIELDS, what, needed=("vlprune", "method", "keep", "model"))
    _only(entries["model"], MODEL_FIELDS, f"{what}: 'model'", needed=MODEL_FIELDS)
    for name in ("options", "found"):
        if not isinstance(entries.get(name, {}), dict):
            raise OptionError(f"{what}: {name!r} must be a JSON object, not {entries[name]!r}")
    keep = entries["keep"]
    numbers = keep if isinstance(keep, list) and keep else [keep]
    if not isinstance(entries["method"], str) or not (isinstance(keep, str) or all(type(number) in (int, float) for number in numbers)):
        raise OptionError(f"{what}: 'method' is a name, 'keep' a number, one number per stage, or a word; got {entries['method']!r} and {keep!r}")
    options = {name: _tuples(value) for name, value in entries.get("options", {}).items()}
    return Plan(entries["method"], _tuples(keep), entries["model"], options, entries.get("found", {}), str(entries["vlprune"]))


def _only(entries: Any, known: Sequence[str], what: str, needed: Sequence[str]) -> None:
    if not isinstance(entries, dict):
        raise OptionError(f"{what} must be a JSON object with {', '.join(known)}")
    for name in entries:
        if name not in known:
            raise unknown(f"key in {what}:", name, known)
    missing = [name for name in needed if name not in entries]
    if missing:
        raise OptionError(f"{what} lacks {', '.join(missing)}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
