"""Contextual: what leaves is folded into the contextual place whose key is most like its own; dominant tokens stay as they are (VisionZip).

A token is folded into a place of its own tile or frame only; where that has none, and for separators, it is dropped. Features are merged before
the projector where that can be applied again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.kernels.similarity import cosine
from vlprune.protocols import Reduced, ScoreInputs, Selection, Tap, gather_tokens
from vlprune.reducers.features import mergeable
from vlprune.selectors.places import together
from vlprune.selectors.strided import Strided


@dataclass(frozen=True)
class Contextual:
    """Merge into the contextual places that `Strided` chose.

    Attributes:
        places: the selector, for its counts.
        keys: signal whose cosine assigns the tokens.
        features: signal that is merged before the projector.
        summed: a contextual token is its own feature plus the mean of those assigned (as VisionZip's program does); else the mean of all of them.
        cls: state of the CLS token, which then takes its place. The kept places are filled in the order CLS, dominant, contextual.
    """

    places: Strided
    keys: Tap
    features: Tap
    summed: bool = False
    cls: Tap | None = None

    @property
    def exact(self) -> bool:
        """Contextual tokens change."""
        return False

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Keys, features, and the CLS token if it is kept."""
        return (self.keys, self.features) if self.cls is None else (self.keys, self.features, self.cls)

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens and (B, K) sizes."""
        keep, roles = selection.keep_indices, selection.roles
        assert roles is not None
        features, project = mergeable(inputs, self.features)
        tokens, sizes = gather_tokens(inputs.tokens, keep), torch.ones_like(keep, dtype=torch.float32)
        _, count = self.places.split(keep.shape[1])
        if count:
            slots = (roles == 1).int().argsort(dim=-1, descending=True, stable=True)[:, :count]     # (B, C) places among K
            targets = keep.gather(1, slots)
            assigned = self._assign(inputs, keep, roles, targets).to(features.dtype)                # (B, C, N), zeros and ones
            number, added = assigned.sum(dim=-1, keepdim=True), assigned @ features
            own = gather_tokens(features, targets)
            merged = own + added / number.clamp(min=1) if self.summed else (own + added) / (1 + number)
            tokens = _put(tokens, slots, project(merged))
            sizes = sizes.scatter(1, slots, 1 + number[..., 0])
        if self.cls is None:
            return Reduced(tokens, sizes)
        if inputs.project is None:
            raise OptionError("variant='code' keeps the CLS token, but here no projector turns it into a visual token; leave `variant` out")
        tokens = _put(tokens, (roles == 2).int().argmax(dim=-1, keepdim=True), project(inputs.signal(self.cls)[:, :1]))
        order = ((roles + 1) % 3).argsort(dim=-1, stable=True)                                      # CLS, dominant, contextual
        return Reduced(gather_tokens(tokens, order), sizes.gather(1, order))

    def _assign(self, inputs: ScoreInputs, keep: Tensor, roles: Tensor, targets: Tensor) -> Tensor:
        """(B, C, N) bool: which tokens each target takes in; it does not take itself."""
        keys = inputs.signal(self.keys)
        likeness = cosine(gather_tokens(keys, targets), keys).masked_fill(~together(inputs, targets), -torch.inf)
        owner = torch.zeros_like(likeness, dtype=torch.bool).scatter(1, likeness.argmax(dim=1, keepdim=True), True) & likeness.isfinite()
        stays = torch.zeros(keep.shape[0], keys.shape[1], dtype=torch.bool, device=keep.device).scatter(1, keep, roles != 2)
        return owner & ~stays[:, None]


def _put(tokens: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """Tokens (B, K, D) with ``values`` (B, C, D) at ``slots`` (B, C)."""
    return tokens.scatter(1, slots[..., None].expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))
