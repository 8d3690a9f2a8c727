"""What a decoder must have to be held by structure, and what is said where it is missing."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlprune.adapters._decoder_taps import attention_of
from vlprune.errors import UnsupportedModelError

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def decoder_in(owners: tuple[Any, ...]) -> Any:
    """The first module with a list of layers that one of ``owners`` calls its decoder, or ``None``."""
    for owner in owners:
        found = owner.get_decoder() if hasattr(owner, "get_decoder") else None
        for candidate in (found, getattr(found, "model", None), getattr(owner, "language_model", None), getattr(owner, "text_model", None)):
            if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
                return candidate
    return None


def missing_in(decoder: Any) -> list[str]:
    """What was looked for and not found, in words."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return ["a decoder with a list of layers (get_decoder().layers)"]
    missing = []
    strange = set(getattr(decoder.config, "layer_types", None) or []) - LAYER_TYPES
    if strange:
        missing.append(f"attention in every decoder layer (this one also has {', '.join(sorted(strange))})")
    for name in ("input_layernorm", "mlp"):
        if not isinstance(getattr(layers[0], name, None), nn.Module):
            missing.append(f"{name} in {type(layers[0]).__name__}")
    try:
        attention_of(layers[0])
    except UnsupportedModelError as error:
        missing.append(str(error))
    return missing


def require(model: nn.Module, missing: list[str]) -> None:
    """An error that says what was looked for, if anything is missing."""
    if missing:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {kind!r}) cannot be pruned by structure; looked for and did not find: {'; '.join(missing)}. "
            "See CONTRIBUTING.md, 'Add a model family'."
        )


def has_multimodal_rope(decoder: Any) -> bool:
    """Whether the rotary ids have sections for time, height and width."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    nested = rope.values() if isinstance(rope, dict) else ()
    return "mrope_section" in rope or any(isinstance(part, dict) and "mrope_section" in part for part in nested)
