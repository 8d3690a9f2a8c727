"""Search a method's numbers for one model, on samples without labels, and write them down as a plan.

    plan = vlprune.tune.tune(model, samples, "vflowopt", keep=1 / 3, out="plan.json")
    vlprune.apply(model, plan="plan.json")

What is maximised is `vlprune.agreement`: how near the pruned model stays to itself unpruned; with ``continuation``, on the end of each text, given
token by token (`vlprune.skipping.continuations`), for methods that reduce text. The ranges are the method's own (``MethodCard.search``).
The method's default comes first, as trial 0, and is what the plan holds where nothing better is found. `vlprune.trials` says how a search goes on.

Difference from VFlowOpt's own calibration: that has a Gaussian process and 50 (paper) or 300 (program) trials.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.agreement import Agreement
from vlprune.api import apply
from vlprune.errors import NotFiniteError, OptionError, VlpruneError
from vlprune.method import MethodCard, ModelFacts
from vlprune.plan import Plan, fingerprint, save_plan
from vlprune.registry import get_method, list_methods
from vlprune.skipping.continuations import TextAgreement
from vlprune.trials import Suggest, Trials


def tune(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    method: str | MethodCard,
    keep: float | None = None,
    *,
    trials: int = 60,
    objective: str = "cosine",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    about: str = "",
    continuation: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Find the numbers with which the pruned model stays nearest to itself unpruned.

    Args:
        model: in evaluation mode and unpruned; it is left as it was.
        samples: model inputs, about 30; with ``continuation`` texts as ``{"input_ids": (1, L)}``.
        method: one with numbers to search.
        keep: the average share that stays; the method's default if not given. It is not searched.
        trials: how many, the default not counted.
        objective: ``"cosine"`` or ``"kl"``, see `vlprune.agreement`.
        out: where the plan is written; the trials are kept beside it (`trials_file`). Without it nothing is written.
        seed: of the search.
        progress: whether a bar is shown.
        about: where the samples come from, for the plan.
        continuation: how many tokens at the end of each text follow its prompt one by one and are looked at, too; 0: none, the prompt's last token is.
        options: of the method, the same in all trials and in the plan, such as a trained router's file; those that are searched cannot be among them.
    """
    card, given = searchable(method), dict(options or {})
    share = card.default_keep if keep is None else keep
    if not isinstance(share, float) or not 0 < share < 1:
        raise OptionError(f"keep={share!r}: a search needs the average share that stays, a float between 0 and 1")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise OptionError(f"trials={trials!r}: an int from 1")
    if out is not None:
        _plain(given)
    with apply(model, card, share, **given) as handle:                   # what does not fit ends here, before any work
        facts = handle.adapter.facts
    _not_searched(card, facts, share, given)
    agreement = TextAgreement(model, samples, objective, continuation) if continuation else Agreement(model, samples, objective)
    default = measure(agreement, card, share, given)
    if default is None:
        raise VlpruneError(f"the default of {card.name} has no finite {objective} on these samples, so there is nothing to be better than")
    setup = {"method": card.name, "keep": share, "objective": objective, "model": fingerprint(model, facts), "samples": digest(samples), "seed": seed}
    setup |= {name: value for name, value in (("continuation", continuation), ("options", given)) if value}      # not in files from before there were these
    search = Trials(None if out is None else trials_file(out), setup, default, seed)

    def one(suggest: Suggest) -> float | None:
        numbers = card.search(facts, share, suggest) if card.search else None
        return None if numbers is None else measure(agreement, card, numbers[0], {**given, **numbers[1]})

    with _bar(progress, trials) as show:
        show(len(search), default, search.best()[0])
        while len(search) < trials:
            search.run(one)
            show(len(search), default, search.best()[0])
    score, params = search.best()
    numbers = (share, {}) if params is None or card.search is None else card.search(facts, share, lambda name, low, high: params[name])
    assert numbers is not None, "numbers that were measured"
    found = {
        "with": f"vlprune tune, optuna {search.optuna.__version__}, TPE", "objective": objective, "default": default, "score": score, "keep": share,
        "trials": len(search), "refused": search.refused, "seed": seed, "samples": len(samples), "sha256": setup["samples"], "from": about,
        **({"continuation": continuation} if continuation else {}),
    }  # fmt: skip
    plan = Plan(card.name, numbers[0], fingerprint(model, facts), {**given, **numbers[1]}, found)
    if out is not None:
        save_plan(plan, out)
    return plan


def _plain(options: Mapping[str, Any]) -> None:
    """A plan holds its options, so they have to be what a file can hold; said before the search and not behind it."""
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"options={dict(options)!r} cannot be written into a plan: {error}. Give a file's name as text, or search without out.") from error


def _not_searched(card: MethodCard, facts: ModelFacts, keep: float, options: Mapping[str, Any]) -> None:
    """No option that the search would overwrite."""
    numbers = card.search(facts, keep, lambda name, low, high: (low + high) / 2) if options and card.search else None
    both = [name for name in options if numbers is not None and name in numbers[1]]
    if both:
        raise OptionError(f"{', '.join(both)} cannot be given: the search of {card.name} finds it")


def searchable(method: str | MethodCard) -> MethodCard:
    """The card, if its method has numbers to search."""
    card: MethodCard = method if isinstance(method, MethodCard) else get_method(str(method))
    if card.search is None:
        able = ", ".join(name for name in list_methods() if get_method(name).search is not None)
        raise OptionError(f"{card.name} has no numbers to search; these have: {able}")
    return card


def trials_file(out: str | os.PathLike[str]) -> Path:
    """Where the trials of a plan are kept: ``plan.json`` has ``plan.json.trials.sqlite3``."""
    return Path(f"{os.fspath(out)}.trials.sqlite3")


def measure(agreement: Agreement, card: MethodCard, keep: Any, options: Mapping[str, Any]) -> float | None:
    """Agreement with the method on; ``None`` where these numbers are refused, or give no number."""
    try:
        with apply(agreement.model, card, keep, **options):
            value = agreement.score()
    except (NotFiniteError, OptionError):
        return None
    return value if math.isfinite(value) else None


def digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the samples, to know them again."""
    known = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample):
            value = sample[name]
            known.update(name.encode())
            if isinstance(value, Tensor):
                known.update(f"{value.dtype} {tuple(value.shape)}".encode())
                known.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                known.update(repr(value).encode())
    return known.hexdigest()


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int, float, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not wanted) as progress:
        task = progress.add_task("trials", total=total)

        def show(done: int, default: float, best: float) -> None:
            progress.update(task, completed=done, description=f"trials   default {default:.5f}, best {best:.5f}")

        yield show
