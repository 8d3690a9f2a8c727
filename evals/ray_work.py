"""A task that is with the workers of a cluster: what has not come yet, what has and waits for its turn, and who is to blame where workers die over it.

A worker that dies leaves what it had not handed in, which is asked for again: one answer at a time from then on, so that it is seen what kills. Three
deaths in a row over several samples: they are asked one by one. Three in a row over one question: it fails, and the run goes on. Where that question is
the sample's dense one, no method is to blame, and the whole sample fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlprune.evals.benchmark import Sample
from vlprune.evals.evaluate import Task
from vlprune.evals.settings import DENSE

TRIES = 3               # deaths in a row over one question, then it fails


@dataclass
class Work:
    """A task on its way: what has not come yet, and what has and waits for its turn."""

    task: Task
    lacking: dict[str, list[str]]
    records: deque[dict[str, Any]] = field(default_factory=deque)
    done: bool = False
    deaths: int = 0                                                      # in a row, without an answer in between
    careful: bool = False                                                # after a death answers are handed in one by one
    alone: bool = False                                                  # and, if that does not help, samples are asked one by one

    @classmethod
    def of(cls, task: Task) -> Work:
        return cls(task, {sample.id: list(task.lacking[sample.id]) for sample in task.samples})

    def samples(self) -> list[Sample]:
        """Those that a worker is asked about next."""
        left = [sample for sample in self.task.samples if self.lacking[sample.id]]
        return left[:1] if self.alone else list(self.task.samples) if left else []         # a batch stays together, as in one process

    def took(self, records: Sequence[dict[str, Any]]) -> None:
        """Answers have come."""
        for record in records:
            if record["setting"] in self.lacking[record["id"]]:
                self.lacking[record["id"]].remove(record["setting"])
                self.records.append(record)
                self.deaths = 0
        self.done = not self.samples()

    def died(self, why: str) -> None:
        """A worker died over this. Too often: what it was at fails."""
        self.careful = True
        self.deaths += 1
        if self.deaths < TRIES:
            return
        self.deaths = 0
        left = self.samples()
        if len(left) > 1:
            self.alone = True
            return
        labels = self.lacking[left[0].id]
        whole = labels[0] == DENSE                                       # not one answer: the sample's fault, not a method's
        words = f"{TRIES} workers in a row died over this: {why}"
        failure = {"id": left[0].id, "answer": "", "score": 0.0, "failed": "open" if whole else "run", "error": words}
        self.took([{"setting": label, **failure} for label in (list(labels) if whole else labels[:1])])
