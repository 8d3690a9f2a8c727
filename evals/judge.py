"""A judge of open answers that the user brings: a function ``(sample, answer) -> share in [0, 1] that is right``, such as one that asks a large model.

    vlprune eval --benchmarks activitynet-qa --judge my_judge:gpt --data ... --out ...

Benchmarks whose official score is a judge's say ``judge=True``; they are scored by matching words if none is given, and all others always are. No
judge comes with vlprune. `Sample` has the question, the right answers and what else the score needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from vlprune.errors import OptionError, VlpruneError
from vlprune.evals.benchmark import Sample

Judge = Callable[[Sample, str], float]


def load_judge(given: str | Judge | None) -> Judge | None:
    """A function as it is; by its name ``"module:function"`` it is imported, from the folder one is in, too.

    Raises:
        OptionError: there is no such function.
    """
    if given is None or callable(given):
        return given
    name, _, attribute = given.partition(":")
    if not name or not attribute:
        raise OptionError(f"--judge {given!r}: write MODULE:FUNCTION")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)                                            # behind what is installed
    try:
        found = getattr(importlib.import_module(name), attribute)
    except Exception as error:                                           # whatever a user's module does when it is imported
        raise OptionError(f"--judge {given!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise OptionError(f"--judge {given!r}: it is no function, but {type(found).__name__}")
    judge: Judge = found
    return judge


def judge_name(given: str | Judge | None) -> str | None:
    """For the config: answers that another one judged are not mixed with these."""
    if given is None or isinstance(given, str):
        return given
    return f"{getattr(given, '__module__', '?')}:{getattr(given, '__qualname__', type(given).__qualname__)}"


def judged(judge: Judge, sample: Sample, answer: str) -> float:
    """What the judge says.

    Raises:
        VlpruneError: that is no share.
    """
    share = judge(sample, answer)
    try:
        number = float(share)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise VlpruneError(f"the judge said {share!r} where a share from 0 to 1 is wanted")
    return number
