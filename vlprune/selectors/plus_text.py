"""PlusText: another selector's choice, and beside it the tokens most like the text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.protocols import ScoreInputs, Selection, Selector, Tap
from vlprune.selectors.portion import Portion, check_portion, portion_of

TEXT = Tap("text_states", 0)


@dataclass(frozen=True)
class PlusText:
    """Of K tokens ``text`` are chosen by cosine with the mean of the text tokens behind the item, the others by ``selector``, which goes first.

    Attributes:
        selector: chooses K minus that many tokens.
        text: share or number of the kept tokens that are chosen for the text. Without text behind the item the score decides.
    """

    selector: Selector
    text: Portion = 0.1

    def __post_init__(self) -> None:
        check_portion("text", self.text)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The selector's, and the text."""
        return (*self.selector.needs, TEXT)

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        wanted = portion_of("text", self.text, inputs.num_keep)
        chosen = self.selector(scores, replace(inputs, num_keep=inputs.num_keep - wanted))
        names = chosen.role_names if chosen.roles is not None else ("kept",)
        roles = torch.zeros_like(chosen.keep_indices) if chosen.roles is None else chosen.roles
        kind = torch.full_like(scores, -1, dtype=torch.int64).scatter(1, chosen.keep_indices, roles)
        likeness = self.likeness(scores, inputs).masked_fill(kind >= 0, -torch.inf)
        kind = kind.scatter(1, likeness.argsort(dim=-1, descending=True, stable=True)[:, :wanted], len(names))
        keep = (kind >= 0).int().argsort(dim=-1, descending=True, stable=True)[:, : inputs.num_keep]
        return Selection(keep, kind.gather(1, keep), (*names, "text"))

    @staticmethod
    def likeness(scores: Tensor, inputs: ScoreInputs) -> Tensor:
        """(B, N) cosine with the mean text, or the score where there is no text."""
        states = inputs.signal(TEXT)
        valid = torch.ones(states.shape[:2], device=states.device) if inputs.text_valid is None else inputs.text_valid.to(states.dtype)
        text = (states * valid[..., None]).sum(dim=1, keepdim=True)                                # the sum has the direction of the mean
        cosine = F.cosine_similarity(inputs.tokens.float(), text, dim=-1)
        return torch.where(valid.sum(dim=1, keepdim=True) > 0, cosine, scores)
