"""The layers of a model's decoder, for what is measured in them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlprune.adapter import find_adapter
from vlprune.errors import UnsupportedModelError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order, as the adapter of this model finds them.

    Raises:
        UnsupportedModelError: no adapter knows the model, or it has no decoder.
    """
    adapter: Any = find_adapter(model)
    decoder = getattr(adapter, "decoder", None)
    if decoder is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder to calibrate for text")
    return list(decoder.layers)
