"""Several stages in a row: where they act in a decoder of any depth, and how many tokens each leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.points import Depth


@dataclass(frozen=True)
class EarlierStage(Budget):
    """A stage before the last where ``keep`` is a number: ``share``, raised to the power that leads to that number."""

    share: float = 1.0
    last_share: float = 0.125

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay; never fewer than the last stage needs."""
        last = super().num_keep(num_tokens, num_frames)
        return max(last, int(num_tokens * scaled_share(self.share, self.last_share, last / num_tokens)))


def scaled_share(share: float, last_share: float, keep: float) -> float:
    """Raise ``share`` to the power that turns ``last_share`` into ``keep``."""
    return float(share ** (math.log(keep) / math.log(last_share)))


def falling_budgets(
    keep: Keep | str | Sequence[Keep], published: Sequence[float], num_stages: int, named: Mapping[str, Sequence[float]] | None = None
) -> tuple[Budget, ...]:
    """One budget a stage, floored shares of the original number.

    Args:
        keep: a name in ``named``, one share or number per stage, or what the last stage leaves: then the others are the
            published shares raised to the power that leads there.
        published: shares of all stages; a decoder with fewer takes the last ones.
        num_stages: stages there are.
        named: schedules by name.
    """
    if isinstance(keep, str):
        if keep not in (named or {}):
            names = "".join(f"{name!r}, " for name in named or {})
            raise OptionError(f"keep={keep!r}: {names}a share or number for the last stage, or one share per stage")
        return tuple(Budget(share, "floor") for share in (named or {})[keep][-num_stages:])
    if not isinstance(keep, (int, float)):
        return given_budgets(keep, num_stages, "floor")
    last = Budget(keep, "floor")
    *earlier, end = published[-num_stages:]
    if isinstance(keep, int):
        return (*(EarlierStage(keep, "floor", share=share, last_share=end) for share in earlier), last)
    return (*(Budget(scaled_share(share, end, keep), "floor") for share in earlier), last)


def given_budgets(keep: Sequence[Keep], num_stages: int, rounding: str) -> tuple[Budget, ...]:
    """One share or number a stage, as the user wrote them."""
    if len(keep) != num_stages:
        raise OptionError(f"keep={tuple(keep)!r} has {len(keep)} shares, but there are {num_stages} stages; give `layers` as well, or one number")
    if any(type(after) is type(before) and after > before for before, after in pairwise(keep)):
        raise OptionError(f"keep={tuple(keep)!r}: shares of the original number can only fall from stage to stage")
    return tuple(Budget(share, rounding) for share in keep)


def scaled_layers(published: Sequence[Depth], depth: int) -> tuple[int, ...]:
    """Where the stages act in a decoder of ``depth`` layers: scaled, distinct, inside; too shallow a decoder has the last ones only."""
    layers: list[int] = []
    for layer in published[-max(1, min(len(published), depth - 1)) :]:
        layers.append(max(layer.resolve(depth), layers[-1] + 1 if layers else 1))
    room = range(max(depth, 2) - len(layers), max(depth, 2))
    return tuple(min(layer, limit) for layer, limit in zip(layers, room, strict=True))


def given_layers(name: str, given: Sequence[int], lowest: int, depth: int) -> tuple[int, ...]:
    """Layer numbers from the user: ints, rising, inside the decoder."""
    layers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    whole = bool(layers) and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    if not whole or layers[0] < lowest or layers[-1] >= max(depth, lowest + 1) or list(layers) != sorted(set(layers)):
        raise OptionError(f"{name}={given!r}: rising layer numbers from {lowest} to {depth - 1} are needed, counted from 0")
    return layers
