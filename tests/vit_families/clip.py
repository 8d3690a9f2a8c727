"""Tiny CLIP, SigLIP and ViT of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from tests.tiny_vit import DEPTH, HEADS, PATCH, SIDE, WIDTH, TinyVit

TOWER: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[1, 7, 9, 2], [1, 5, 4, 2]])


def mask(args: Any, kwargs: Any, bias: Tensor) -> tuple[Any, Any]:
    """Encoder layers take the mask second, by position."""
    return (args[0], bias, *args[2:]), kwargs


def eager(model: nn.Module) -> None:
    """Switch the attention implementation."""
    model.set_attn_implementation("eager")  # type: ignore[operator]


def states(output: Any) -> dict[str, Tensor]:
    """Recorded hidden states by number."""
    return {f"tokens.{number}": state for number, state in enumerate(output.hidden_states)}


def run_tower(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """A bare vision model, ViT included."""
    out = model(pixel_values=pixels, output_hidden_states=True)
    found = {"tokens.last": out.last_hidden_state, **states(out)}
    return found if out.pooler_output is None else {**found, "pooled": out.pooler_output}


def run_projection(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """With the projection."""
    out = model(pixel_values=pixels, output_hidden_states=True)
    return {"embeds": out.image_embeds, "tokens.last": out.last_hidden_state, **states(out)}


def run_dual(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Image and text towers."""
    out = model(input_ids=IDS, pixel_values=pixels)
    vision = out.vision_model_output
    found = {"logits": out.logits_per_image, "embeds": out.image_embeds, "text": out.text_embeds}
    return {**found, "pooled": vision.pooler_output, "tokens.last": vision.last_hidden_state}


def run_classifier(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Logits."""
    out = model(pixel_values=pixels, output_hidden_states=True)
    return {"logits": out.logits, **states(out)}


def wide(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """A picture that is not square, with interpolated position embeddings."""
    out = model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    return {"tokens.last": out.last_hidden_state, "pooled": out.pooler_output, **states(out)}


def vision_blocks(model: Any) -> list[nn.Module]:
    """Of CLIP and SigLIP."""
    return list(getattr(model, "vision_model", model).encoder.layers)


def siglip_pool(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The attention head."""
    tower = getattr(model, "vision_model", model)
    pooled = tower.head(tower.post_layernorm(tokens))
    return {"pooled": pooled, "embeds": pooled / pooled.norm(dim=-1, keepdim=True)}


def families() -> tuple[TinyVit, ...]:
    """Towers of transformers."""
    clip, siglip, vit = CLIPVisionConfig(**TOWER, projection_dim=16), SiglipVisionConfig(**TOWER), ViTConfig(**TOWER, pooler_output_size=WIDTH)
    labels = {"num_labels": 5}

    def family(name: str, make: Any, run: Any, prefix: int, **more: Any) -> TinyVit:
        return TinyVit(name, make, run, more.pop("blocks", vision_blocks), mask, prefix, eager=eager, **more)

    return (
        family("clip_vision", lambda: CLIPVisionModel(clip), run_tower, 1),
        family("clip_projection", lambda: CLIPVisionModelWithProjection(clip), run_projection, 1),
        family("clip", lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=16)), run_dual, 1),
        family(
            "clip_classifier", lambda: CLIPForImageClassification(CLIPConfig(text_config=TEXT, vision_config=TOWER, **labels)), run_classifier, 1,
            pool=lambda model, tokens: {"logits": model.classifier(tokens[:, 1:].mean(dim=1))},
        ),
        family("clip_wide", lambda: CLIPVisionModel(clip), wide, 1, size=(SIDE, 32)),
        family("siglip_vision", lambda: SiglipVisionModel(siglip), run_tower, 0, pool=siglip_pool),
        family("siglip", lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=TOWER)), run_dual, 0, pool=siglip_pool),
        family(
            "siglip_classifier", lambda: SiglipForImageClassification(SiglipConfig(text_config=TEXT, vision_config=TOWER, **labels)), run_classifier, 0,
            pool=lambda model, tokens: {"logits": model.classifier(model.vision_model.post_layernorm(tokens).mean(dim=1))},
        ),
        family("vit", lambda: ViTModel(vit), run_tower, 1, blocks=lambda model: list(model.layers)),
        family(
            "vit_classifier", lambda: ViTForImageClassification(ViTConfig(**TOWER, **labels)), run_classifier, 1,
            blocks=lambda model: list(model.vit.layers),
        ),
    )  # fmt: skip
