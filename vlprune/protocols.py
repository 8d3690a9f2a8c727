"""The contracts between the parts, in words that the tests check.

Shapes: B visual items of equal size in one call, N visual tokens of an item, K kept, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vlprune.errors import MissingSignalError

#: What can be tapped. Vision: ``column_mean`` (attention received: mean over heads and over all queries, CLS included),
#: ``cls_row`` (head-mean attention row of CLS), ``vision_keys`` (head-mean keys). Decoder: ``last_row`` (head-mean attention
#: row of the last prompt token), ``text_rows`` (mean of such rows over all text tokens after the item), ``text_mass``
#: (mean share of attention that those text tokens pay to the item), ``transition`` (module input against output).
TAP_KINDS = ("column_mean", "cls_row", "vision_keys", "last_row", "text_rows", "text_mass", "transition")
VISION_KINDS = ("column_mean", "cls_row", "vision_keys")


@dataclass(frozen=True)
class Tap:
    """A request for one signal.

    Attributes:
        kind: one of ``TAP_KINDS``.
        layer: 0-based block the signal is read from. Decoder attention taps at a layer that has not run when the point
            is reached are *probes*: that layer's own norm and projections applied to the point's input.
    """

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in TAP_KINDS:
            raise MissingSignalError(f"no signal {self.kind!r}. Known: {', '.join(TAP_KINDS)}.")

    @property
    def tower(self) -> str:
        """``"vision"`` or ``"decoder"``."""
        return "vision" if self.kind in VISION_KINDS else "decoder"

    def __str__(self) -> str:
        return f"{self.kind}@{self.tower}:{self.layer}"


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer or selector may look at: B visual items of equal size at one pruning point.

    Attributes:
        tokens: (B, N, D) hidden states of the visual tokens still there.
        num_keep: K, known before the data.
        grid: (B, N, 3) frame, row, column, or ``None`` where the model has no grid.
        original: (B, N) each token's number within its item before any reduction.
        num_original: number of tokens of each item before any reduction.
        modality: ``"image"``, ``"video"`` (or ``"text"``).
        signals: the tensors asked for, keyed by tap; (B, N) or (B, N, C), float32.
        sizes: (B, N) how many original tokens each token stands for, or ``None`` if one each.
    """

    tokens: Tensor
    num_keep: int
    grid: Tensor | None = None
    original: Tensor | None = None
    num_original: int = 0
    modality: str = "image"
    signals: Mapping[Tap, Tensor] = field(default_factory=dict)
    sizes: Tensor | None = None

    def signal(self, tap: Tap) -> Tensor:
        """Return the signal asked for in ``needs``; (B, N) or (B, N, C), float32."""
        try:
            return self.signals[tap]
        except KeyError:
            have = ", ".join(map(str, self.signals)) or "none"
            raise MissingSignalError(f"signal {tap} was not collected (there: {have}); name it in `needs`.") from None


@dataclass(frozen=True)
class Selection:
    """Which tokens stay.

    Attributes:
        keep_indices: (B, K) int64, strictly increasing, numbering the N tokens of ``ScoreInputs.tokens``.
        roles: (B, K) small ints that index ``role_names``, for pictures; ``None`` if there is one role only.
        role_names: names of the roles.
    """

    keep_indices: Tensor
    roles: Tensor | None = None
    role_names: tuple[str, ...] = ("kept",)


@dataclass(frozen=True)
class Reduced:
    """What a reducer hands back: new features for the kept tokens, or ``None`` when they are unchanged."""

    tokens: Tensor | None = None        # (B, K, D)
    sizes: Tensor | None = None         # (B, K)


@runtime_checkable
class Scorer(Protocol):
    """Maps visual tokens to importance.

    Returns float32 scores of shape (B, N); the higher, the more worth keeping. Pure: the same inputs give the same
    scores and nothing is modified. Permuting the tokens (with their signals) permutes the scores.
    """

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Signals that must be collected for it."""
        ...

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) float32."""
        ...


@runtime_checkable
class Selector(Protocol):
    """Chooses exactly ``inputs.num_keep`` tokens, in raster order, on the device and without reading it back."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Signals that must be collected for it."""
        ...

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """The tokens that stay."""
        ...


@runtime_checkable
class Reducer(Protocol):
    """Decides what becomes of the others: nothing (drop), or folded into the kept ones (merge, recycle)."""

    @property
    def exact(self) -> bool:
        """Whether kept tokens are unchanged, so that "drop equals mask" must hold."""
        ...

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """New features of the kept tokens."""
        ...


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Pick ``indices`` (B, K) along dimension 1 of ``x`` (B, N, ...)."""
    shape = indices.shape + (1,) * (x.dim() - 2)
    return torch.gather(x, 1, indices.reshape(shape).expand(*indices.shape, *x.shape[2:]))
