"""Trials: a search for the highest value with Optuna's TPE that goes on where it was stopped, also by force.

Each trial has a sampler with a seed of its own, made from how many were finished before it, and each finished trial is in the file, whole, before the
next one begins (SQLite undoes a half-written one). So a search that was killed and started again draws the same numbers as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError, VlpruneError

STARTUP = 10                    # drawn at random before TPE has enough to go by
CLOSE = 1e-3                    # a search goes on only where its default still has the same value, up to this

#: ``(name, low, high) -> number``
Suggest = Callable[[str, float, float], float]


class Trials:
    """Finished trials, and the way to the next.

    Args:
        path: file to keep them in; ``None``: in memory. One process at a time.
        setup: plain values that say what is searched; a file of another search is refused.
        default: value of the default, which is not among the trials: it need not lie in their ranges.
        seed: of the search.
    """

    def __init__(self, path: Path | None, setup: Mapping[str, Any], default: float, seed: int = 0) -> None:
        self.optuna, self.default, self.seed = _optuna(), default, seed
        if path is not None:
            if "?" in str(path):
                raise OptionError(f"the trials cannot be kept in {str(path)!r}: there is a question mark in its name")
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._quiet():
            self.study, self.kept = self.optuna.create_study(direction="maximize"), None
            if path is not None:
                name = f"sqlite:///{path.absolute()}"
                self.kept = self.optuna.create_study(storage=name, study_name="vlprune tune", direction="maximize", load_if_exists=True)
                _same(path, self.kept, json.loads(json.dumps(dict(setup))), default)
                self.study.add_trials(self.kept.trials)

    def __len__(self) -> int:
        return len(self.study.trials)

    @property
    def refused(self) -> int:
        """How many of them had no value."""
        return sum(trial.value is None for trial in self.study.trials)

    def best(self) -> tuple[float, dict[str, float] | None]:
        """The highest value with its numbers; ``None`` where that is the default."""
        better = [trial for trial in self.study.trials if trial.value is not None and trial.value > self.default]
        top = max(better, key=lambda trial: trial.value, default=None)
        return (self.default, None) if top is None else (top.value, dict(top.params))

    def run(self, measure: Callable[[Suggest], float | None]) -> None:
        """One trial; ``measure`` draws numbers and returns their value, ``None`` where they have none."""
        with self._quiet():
            seed = (1_000_003 * self.seed + len(self)) % 2**32
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
            trial = self.study.ask()
            value = measure(trial.suggest_float)
            state = self.optuna.trial.TrialState
            finished = self.study.tell(trial, value, state=state.PRUNED if value is None else state.COMPLETE)
            if self.kept is not None:
                self.kept.add_trial(finished)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps Optuna's lines off the screen."""
        level = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            yield
        finally:
            self.optuna.logging.set_verbosity(level)


def _same(path: Path, kept: Any, setup: dict[str, Any], default: float) -> None:
    """Write down what is searched, or compare with what is written down."""
    known = kept.user_attrs
    if "setup" not in known:
        kept.set_user_attr("default", default)
        kept.set_user_attr("setup", setup)                               # last: a file with it is complete
        return
    other = [f"{name} {known['setup'].get(name)!r}, not {value!r}" for name, value in setup.items() if known["setup"].get(name) != value]
    if not other and abs(known["default"] - default) > CLOSE:
        other = [f"its default has {known['default']:.6g}, not {default:.6g} (other weights, or another precision)"]
    if other:
        raise OptionError(f"{path} holds the trials of another search: {'; '.join(other)}. Write to another file, or delete it.")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise VlpruneError(f"tuning needs {error.name}, which is not installed: pip install 'vlprune[tune]'") from error
    return optuna
