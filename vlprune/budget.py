"""How many visual tokens stay: counted, and rounded, in this one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlprune.errors import OptionError

Keep = float | int


@dataclass(frozen=True)
class Budget:
    """A share in (0, 1] of a visual item's tokens (float), or a number of tokens per item (int).

    ``rounding`` is ``"round"`` (Python's, half to even: what most reference programs call) or ``"floor"``
    (``int()``), as a paper's code does it. At least one token stays, unless the budget is an explicit 0.
    ``at_most``: a number above those that an item has is all of them, not an error.
    """

    keep: Keep
    rounding: str = "round"
    allow_zero: bool = False
    at_least_one_frame: bool = False
    at_most: bool = False

    def __post_init__(self) -> None:
        keep = self.keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise OptionError(f"keep={keep!r}: give a float in (0, 1], the share that stays, or an int, tokens per visual item")
        if isinstance(keep, float) and not math.isfinite(keep):
            raise OptionError(f"keep={keep!r} is not a number; give a float in (0, 1] or an int")
        if keep == 0 and self.allow_zero:
            return
        if isinstance(keep, float) and not 0.0 < keep <= 1.0:
            hint = f" For {int(keep)} tokens per item write keep={int(keep)}." if keep > 1 and keep == int(keep) else ""
            raise OptionError(f"keep={keep!r}: a share must lie in (0, 1].{hint}")
        if isinstance(keep, int) and keep < 1:
            raise OptionError(f"keep={keep!r}: at least one token per visual item must stay")
        if self.rounding not in ("round", "floor"):
            raise OptionError(f"rounding={self.rounding!r}: 'round' or 'floor'")

    @property
    def is_everything(self) -> bool:
        """Whether this budget keeps every token whatever their number (``keep=1.0``)."""
        return isinstance(self.keep, float) and self.keep == 1.0

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of an item's ``num_tokens`` in ``num_frames`` stay, between 1 (0 if allowed) and ``num_tokens``."""
        if isinstance(self.keep, int) and self.keep > 0:
            if self.keep > num_tokens and self.at_most:
                return num_tokens
            if self.keep > num_tokens:
                raise OptionError(
                    f"keep={self.keep} tokens per visual item, but an item here has only {num_tokens}. "
                    f"Give at most {num_tokens}, or a share such as keep=0.25."
                )
            return self.keep
        exact = self.keep * num_tokens
        wanted = int(exact) if self.rounding == "floor" else round(exact)
        fewest = num_tokens // num_frames if self.at_least_one_frame else 0 if self.allow_zero else 1
        return min(num_tokens, max(fewest, wanted))
