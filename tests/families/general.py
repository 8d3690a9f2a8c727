"""Tiny models of families without an adapter of their own, served by structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.tiny import IMAGE, Row, TinyFamily, pixels, tiny_clip, tiny_llama

SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}


class TinyGeneral(TinyFamily):
    """A model with one square picture an item and a fixed number of tokens for each."""

    tokens = 36

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """One square picture an item."""
        return {"pixel_values": torch.stack([pixels(seed, 3, 24, 24) for _, _, seed in items])}, [[IMAGE] * self.tokens for _ in items]


class TinyInternVL(TinyGeneral):
    """InternVL: pixel shuffle, Qwen2 decoder."""

    tokens = 9

    def make(self) -> nn.Module:
        """36 patches to 9 tokens."""
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [24, 24], "patch_size": [4, 4]}
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=tiny_llama(model_type="qwen2"), image_token_id=IMAGE, image_seq_length=9, downsample_ratio=0.5
        )
        return transformers.InternVLForConditionalGeneration(config)


class TinySmolVLM(TinyGeneral):
    """SmolVLM / Idefics3: pixel shuffle by a factor, Llama decoder."""

    tokens = 9

    def make(self) -> nn.Module:
        """36 patches to 9 tokens."""
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 4}
        config = transformers.SmolVLMConfig(vision_config=vision, text_config=tiny_llama(), image_token_id=IMAGE, scale_factor=2)
        return transformers.SmolVLMForConditionalGeneration(config)

    def prompt(self, rows: Sequence[Row], **kwargs: Any) -> dict[str, Tensor]:
        """Pictures come as (rows, most pictures of a row, 3, H, W), zeros where a row has fewer."""
        inputs = super().prompt(rows, **kwargs)
        counts = [sum(not isinstance(part, int) for part in row) for row in rows]
        if sum(counts):
            padded = torch.zeros(len(rows), max(counts), 3, 24, 24)
            for row, pictures in enumerate(inputs["pixel_values"].split(counts)):
                padded[row, : len(pictures)] = pictures
            inputs["pixel_values"] = padded
        return inputs


class TinyPaliGemma(TinyGeneral):
    """PaliGemma: the prompt sees itself in both directions."""

    generated_type = 1

    def extra(self, input_ids: Tensor) -> dict[str, Tensor]:
        """All of it is prompt."""
        return {"token_type_ids": torch.zeros_like(input_ids)}

    def make(self) -> nn.Module:
        """SigLIP tower, Gemma decoder."""
        text = tiny_llama(model_type="gemma", head_dim=8)
        config = transformers.PaliGemmaConfig(
            vision_config=tiny_clip(**SIGLIP, projection_dim=32), text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32
        )
        return transformers.PaliGemmaForConditionalGeneration(config)


class TinyGemma3(TinyGeneral):
    """Gemma 3: sliding windows, pictures see themselves in both directions."""

    tokens = 9

    def make(self) -> nn.Module:
        """SigLIP tower pooled to 9 tokens, alternating windows."""
        text = tiny_llama(
            model_type="gemma3_text", head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
        config = transformers.Gemma3Config(vision_config=tiny_clip(**SIGLIP), text_config=text, image_token_index=IMAGE, mm_tokens_per_image=9)
        return transformers.Gemma3ForConditionalGeneration(config)

    def extra(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are pictures."""
        return {"token_type_ids": (input_ids == IMAGE).long()}


class TinyVipLlava(TinyGeneral):
    """VipLlava: several feature layers of a CLIP tower, Llama decoder."""

    def make(self) -> nn.Module:
        """The last two blocks."""
        config = transformers.VipLlavaConfig(
            vision_config=tiny_clip(), text_config=tiny_llama(), image_token_index=IMAGE, vision_feature_layers=[-2, -1], image_seq_length=36
        )
        return transformers.VipLlavaForConditionalGeneration(config)


class TinyGlm4v(TinyFamily):
    """GLM-4V: M-RoPE with partial rotation, merged patches, pictures of different sizes."""

    def make(self) -> nn.Module:
        """Packed tower, 2x2 merger."""
        text = tiny_llama(
            model_type="glm4v_text", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
        )
        vision: dict[str, Any] = {
            "hidden_size": 32, "depth": 2, "num_heads": 4, "image_size": 32, "patch_size": 4, "out_hidden_size": 32, "intermediate_size": 48,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        config = transformers.Glm4vConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=98, image_start_token_id=101, image_end_token_id=102,
            video_start_token_id=103, video_end_token_id=104,
        )  # fmt: skip
        return transformers.Glm4vForConditionalGeneration(config)

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Flattened patches with grids."""
        shapes = [(1, 8, 8), (1, 4, 12)]
        grids = [shapes[shape % 2] for _, shape, _ in items]
        patches = [pixels(seed, t * h * w, 3 * 2 * 4 * 4) for (_, _, seed), (t, h, w) in zip(items, grids, strict=True)]
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}, [[IMAGE] * (t * h * w // 4) for t, h, w in grids]

    def extra(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are pictures."""
        return {"mm_token_type_ids": (input_ids == IMAGE).long()}


FAMILIES = (
    TinyInternVL("internvl"),
    TinySmolVLM("smolvlm"),
    TinyPaliGemma("paligemma"),
    TinyGemma3("gemma3"),
    TinyVipLlava("vipllava"),
    TinyGlm4v("glm4v", shapes={"image": 2, "video": 1}),
)
