"""Relevance: how like a token is to the text, as a mean of cosines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

TEXT = Tap("text_states", 0)


@dataclass(frozen=True)
class Relevance:
    """Mean cosine of a token with the text tokens behind its item, or with embeddings that the user gives.

    Attributes:
        sign: 1, or -1 where the least like tokens matter most.
        text_embeds: (M, C) embeddings of the text, or a function that returns them, asked at every choice; the same for every item of a call.
            ``None``: the decoder's own states, and tokens are compared as they are.
        image_embeds: ``(B, N, Dv) -> (B, N, C)``, from the tower's features to the space of the text. With ``text_embeds``.
        features: signal (B, N, Dv) that ``image_embeds`` gets.
    """

    sign: int = 1
    text_embeds: Tensor | Callable[[], Tensor] | None = None
    image_embeds: Callable[[Tensor], Tensor] | None = None
    features: Tap | None = None

    def __post_init__(self) -> None:
        if (self.text_embeds is None) != (self.image_embeds is None):
            raise OptionError(
                "text_embeds and image_embeds belong together: embeddings (M, C) of the text, or a function that returns them, and a function that maps "
                "the vision tower's features (B, N, Dv) to (B, N, C). Give both, or neither to compare with the language model's own text states."
            )
        if self.image_embeds is not None and not callable(self.image_embeds):
            raise OptionError(f"image_embeds={type(self.image_embeds).__name__}: a function from (B, N, Dv) to (B, N, C) is needed")
        if self.text_embeds is not None and not callable(self.text_embeds):
            _check_text(self.text_embeds)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The text's states, or the features."""
        return (TEXT,) if self.text_embeds is None or self.features is None else (self.features,)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); 0 where no text follows the item."""
        with torch.autocast(inputs.tokens.device.type, enabled=False):
            if self.text_embeds is None:
                tokens, states = inputs.tokens, inputs.signal(TEXT)
                valid = torch.ones_like(states[..., 0]) if inputs.text_valid is None else inputs.text_valid.to(states.dtype)
                unit = F.normalize(states.float(), dim=-1) * valid[..., None]
                text = unit.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)
            else:
                assert self.image_embeds is not None
                assert self.features is not None
                tokens = self.image_embeds(inputs.signal(self.features))
                given = self.text_embeds() if callable(self.text_embeds) else self.text_embeds
                _check_text(given, tokens.shape[-1])
                text = F.normalize(given.to(tokens.device).float(), dim=-1).mean(dim=0).expand(tokens.shape[0], -1)
            unit = F.normalize(tokens.float(), dim=-1)
            return self.sign * torch.stack([item @ words for item, words in zip(unit, text, strict=True)])    # the mean of cosines, in one product


def _check_text(text: Tensor, width: int | None = None) -> None:
    if not isinstance(text, Tensor) or text.dim() != 2 or not text.shape[0] or width not in (None, text.shape[1]):
        shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise OptionError(f"text_embeds={shape}: a tensor (M, {width or 'C'}) is needed, one row a piece of the text, as wide as what image_embeds returns")
