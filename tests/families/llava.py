"""Tiny LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from tests.tiny import IMAGE, VIDEO, TinyFamily, pixels, tiny_clip, tiny_llama

SIDE = 24                                    # pixels; 6 x 6 patches
SIZES = [(24, 24), (40, 20), (30, 48)]       # height, width of the pictures that get tiled
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48]]


class TinyLlava(TinyFamily):
    """LLaVA-1.5: 36 tokens an image."""

    def make(self) -> nn.Module:
        """CLIP tower, feature layer -2."""
        config = LlavaConfig(vision_config=tiny_clip(), text_config=tiny_llama(), image_token_index=IMAGE, vision_feature_layer=-2, image_seq_length=36)
        return LlavaForConditionalGeneration(config)

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """One square picture an item."""
        return {"pixel_values": torch.stack([pixels(seed, 3, SIDE, SIDE) for _, _, seed in items])}, [[IMAGE] * 36 for _ in items]


class TinyLlavaNext(TinyFamily):
    """LLaVA-NeXT: tiles and newlines."""

    def make(self) -> nn.Module:
        """The same parts with tiles."""
        config = LlavaNextConfig(
            vision_config=tiny_clip(), text_config=tiny_llama(), image_token_index=IMAGE, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextForConditionalGeneration(config)

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Tiled pictures of different sizes, padded to the largest number of tiles."""
        return tiled(self, [item for item in items if item[0] == "image"], [item for item in items if item[0] == "video"], items)


class TinyLlavaNextVideo(TinyLlavaNext):
    """LLaVA-NeXT-Video: average-pooled frames."""

    def make(self) -> nn.Module:
        """With both placeholders."""
        config = LlavaNextVideoConfig(
            vision_config=tiny_clip(), text_config=tiny_llama(), image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-2,
            image_grid_pinpoints=PINPOINTS, spatial_pool_mode="average", spatial_pool_stride=2,
        )  # fmt: skip
        return LlavaNextVideoForConditionalGeneration(config)


class TinyOneVision(TinyLlavaNext):
    """LLaVA-OneVision: SigLIP tower, bilinear pooling, one newline a video."""

    def make(self) -> nn.Module:
        """SigLIP tower without CLS, Qwen2 decoder."""
        vision = tiny_clip(model_type="siglip_vision_model", vision_use_head=False)
        config = LlavaOnevisionConfig(
            vision_config=vision, text_config=tiny_llama(model_type="qwen2"), image_token_index=IMAGE, video_token_index=VIDEO,
            vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip
        return LlavaOnevisionForConditionalGeneration(config)


def tiled(family: TinyFamily, images: list, videos: list, items: list) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Inputs and placeholder counts of tiled images and pooled videos; counts are asked from the model's own packing."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    inputs: dict[str, Tensor] = {}
    counts: dict[int, int] = {}
    if images:
        sizes = [SIZES[shape % len(SIZES)] for _, shape, _ in images]
        tiles = [int(image_size_to_num_patches(size, PINPOINTS, SIDE)) for size in sizes]
        stacked = torch.zeros(len(images), max(tiles), 3, SIDE, SIDE)
        for number, ((_, _, seed), count) in enumerate(zip(images, tiles, strict=True)):
            stacked[number, :count] = pixels(seed, count, 3, SIDE, SIDE)
        inputs["pixel_values"] = stacked
        inputs["image_sizes"] = torch.tensor(sizes)
        model = family.build()
        with torch.no_grad():
            features = model.get_image_features(stacked, image_sizes=inputs["image_sizes"]).pooler_output
        for (_, _, seed), feature in zip(images, features, strict=True):
            counts[seed] = feature.shape[0]
    if videos:
        frames = 3
        inputs["pixel_values_videos"] = torch.stack([pixels(seed, frames, 3, SIDE, SIDE) for _, _, seed in videos])
        extra = 1 if "onevision" in family.name else 0
        for _, _, seed in videos:
            counts[seed] = frames * 9 + extra
    return inputs, [[IMAGE if modality == "image" else VIDEO] * counts[seed] for modality, _, seed in items]


FAMILIES = (
    TinyLlava("llava"),
    TinyLlavaNext("llava_next", shapes={"image": 3, "video": 1}),
    TinyLlavaNextVideo("llava_next_video", ("image", "video"), shapes={"image": 3, "video": 1}),
    TinyOneVision("llava_onevision", ("image", "video"), shapes={"image": 3, "video": 1}),
)
