"""Tiny Qwen2-VL, Qwen2.5-VL (windows of 2 x 2 tokens), Qwen3-VL (DeepStack behind two of four layers) and its mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from tests.tiny import IMAGE, PAD, VIDEO, VOCABULARY, TinyFamily, pixels

PATCH, MERGE = 4, 2
START, END, STAMP = 93, 94, 91  # around every picture; timestamp before a frame of Qwen3-VL
GRIDS = {"image": [(1, 8, 8), (1, 6, 10), (1, 12, 4)], "video": [(3, 4, 6), (4, 6, 4)]}  # frames, rows, columns in patches

VISION: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip
QWEN3_VISION = {
    **VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [1, 2],
}  # fmt: skip


@dataclass
class TinyQwen(TinyFamily):
    """A Qwen-VL model with pictures of three sizes and clips of two."""

    prefix: str = ""
    vision: ClassVar[dict[str, Any]] = {}
    text: ClassVar[dict[str, Any]] = TEXT
    stamps: ClassVar[bool] = False

    def make(self) -> nn.Module:
        """From the classes whose names start with ``prefix``."""
        make_config, make_model = (getattr(transformers, self.prefix + suffix) for suffix in ("Config", "ForConditionalGeneration"))
        config = make_config(
            vision_config=dict(self.vision), text_config=dict(self.text), image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END,
        )  # fmt: skip
        model: nn.Module = make_model(config)
        return model

    def visual(self, items: list[tuple[str, int, int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Packed patches of all images and of all videos, with their grids."""
        inputs: dict[str, Tensor] = {}
        for modality, names in (("image", ("pixel_values", "image_grid_thw")), ("video", ("pixel_values_videos", "video_grid_thw"))):
            found = [(GRIDS[modality][shape % len(GRIDS[modality])], seed) for kind, shape, seed in items if kind == modality]
            if found:
                inputs[names[0]] = torch.cat([pixels(seed, t * h * w, 3 * 2 * PATCH * PATCH) for (t, h, w), seed in found])
                inputs[names[1]] = torch.tensor([grid for grid, _ in found])
        return inputs, [self.stand_in(modality, GRIDS[modality][shape % len(GRIDS[modality])]) for modality, shape, _ in items]

    def stand_in(self, modality: str, grid: tuple[int, int, int]) -> list[int]:
        """Ids of one item, as the processor writes them."""
        frames, height, width = grid
        number = IMAGE if modality == "image" else VIDEO
        one = [number] * (height * width // MERGE**2)
        if modality == "video" and self.stamps:
            return [part for frame in range(frames) for part in (STAMP, STAMP - 1 - frame, START, *one, END)]
        return [START, *one * frames, END]

    def extra(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The processor says which ids are images (1) and videos (2)."""
        return {"mm_token_type_ids": (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()}


class TinyQwen2(TinyQwen):
    """Qwen2-VL."""

    vision: ClassVar[dict[str, Any]] = {**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}


class TinyQwen25(TinyQwen):
    """Qwen2.5-VL: blocks 1 and 3 see the whole picture, the others windows."""

    vision: ClassVar[dict[str, Any]] = {
        **VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }  # fmt: skip


class TinyQwen3(TinyQwen):
    """Qwen3-VL: DeepStack, timestamps between the frames of a video."""

    vision: ClassVar[dict[str, Any]] = QWEN3_VISION
    text: ClassVar[dict[str, Any]] = {**TEXT, "head_dim": 8}
    stamps: ClassVar[bool] = True


class TinyQwen3Moe(TinyQwen3):
    """Qwen3-VL-MoE: two of four experts a token."""

    text: ClassVar[dict[str, Any]] = {**TinyQwen3.text, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


SHAPES = {"image": 3, "video": 2}
FAMILIES = (
    TinyQwen2("qwen2_vl", ("image", "video"), shapes=SHAPES, prefix="Qwen2VL"),
    TinyQwen25("qwen2_5_vl", ("image", "video"), shapes=SHAPES, prefix="Qwen2_5_VL"),
    TinyQwen3("qwen3_vl", ("image", "video"), shapes=SHAPES, prefix="Qwen3VL"),
)
MOE = TinyQwen3Moe("qwen3_vl_moe", ("image", "video"), shapes=SHAPES, prefix="Qwen3VLMoe")
