"""Options that methods for the text of a row share, and scores that look at places only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.points import Point, parse_point
from vlprune.protocols import ScoreInputs, Tap


@dataclass(frozen=True)
class SinkRecent:
    """The first ``sinks`` tokens of a row rank highest, then the last one, the one before it, and so on (FTP's static order: x0, x_{N-1}, x_{N-2}, ...)."""

    sinks: int = 1

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Nothing."""
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) places, with the number of tokens added to those of the first ones."""
        places = torch.arange(inputs.num_original, device=inputs.tokens.device, dtype=torch.float32)
        places = torch.where(places < self.sinks, 2.0 * inputs.num_original - places, places)
        return places.expand(inputs.tokens.shape[0], -1) if inputs.original is None else places[inputs.original]


def given_tokens(tokens: Any) -> str:
    """``"text"`` or ``"all"``, as the user wrote it."""
    if tokens not in ("text", "all"):
        raise OptionError(f"tokens={tokens!r}: 'text', or 'all' for text and visual tokens together")
    return str(tokens)


def given_protect(protect: Any) -> tuple[int, int]:
    """How many first and last text tokens stay: two whole numbers, the second at least 1."""
    numbers = tuple(protect) if isinstance(protect, (tuple, list)) else ()
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers) or numbers[1] < 1:
        raise OptionError(f"protect={protect!r}: two numbers, first and last text tokens that always stay; the last one has to (1 or more)")
    return numbers[0], numbers[1]


def given_point(point: str | Point) -> Point:
    """A point of the decoder."""
    found = parse_point(point)
    if found.tower != "decoder":
        raise OptionError(f"point={str(point)!r}: text is in the decoder; write 'before_llm' or 'llm:K'")
    return found


def given_layer(name: str, layer: Any, lowest: int, depth: int) -> int:
    """One layer number from the user."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not lowest <= layer < max(depth, lowest + 1):
        raise OptionError(f"{name}={layer!r}: a layer number from {lowest} to {depth - 1}, counted from 0")
    return layer
