"""The models for videos that need no download: the trained Qwen2.5-VL that ships with vlprune, and the picture model's weights made to read frames.

The first was trained on `vlprune.evals.moving_scenes` and answers questions about what moves, appears and stays. Transformers' video processor of the
Qwen family needs torchvision; `QwenVideo` packs the frames itself, in the same order and with the same numbers. The second, LLaVA-NeXT-Video with
the weights of the embedded LLaVA, answers nothing sensible about clips, but its tower has a class token and square pictures, which some methods want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlprune.errors import OptionError, VlpruneError
from vlprune.loading import Loaded, load_embedded, load_processor, quiet
from vlprune.video import Clip

ASSETS = Path(__file__).parent / "assets" / "tiny_video_vlm"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FPS = 8.0                                                                 # of frames whose times are not known: those of the clips it was trained on


@dataclass
class QwenVideo(Loaded):
    """A Qwen2-VL or Qwen2.5-VL model with frames for input, without transformers' video processor."""

    @property
    def takes_video(self) -> bool:
        """It does."""
        return True

    def inputs(self, question: str, pictures: Sequence[Any], *, video: bool = True, clip: Clip | None = None) -> dict[str, Any]:
        """Model inputs for one question about the frames together.

        Args:
            question: the text.
            pictures: frames, all of one size; they are resized as the image processor's limits say.
            video: false gives them as pictures of their own.
            clip: where the frames come from; its times space the frames, else there are eight a second.
        """
        if not video:
            return super().inputs(question, pictures)
        vision = self.model.config.vision_config
        patch, merge, temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        packed, grid = pack_frames(self._resized(pictures, patch * merge), patch, merge, temporal)
        tokenizer, number = self.processor.tokenizer, self.model.config.video_token_id
        pad = tokenizer.convert_ids_to_tokens(number)
        text = self.prompt(question, video=True).replace(pad, pad * (len(packed) // merge**2))
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        times = clip.times if clip is not None and len(clip.times) > 1 else [0.0, 1 / FPS]
        spacing = round(temporal * (times[-1] - times[0]) / (len(times) - 1), 4)                  # transformers cuts position ids off: 0.24999 is not 0.25
        given = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": 2 * (ids == number).int(), "pixel_values_videos": packed,
            "video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([spacing]),
        }  # fmt: skip
        return self._placed(given)

    def _resized(self, pictures: Sequence[Any], factor: int) -> torch.Tensor:
        """uint8 (F, H, W, 3) with sides that are multiples of ``factor``."""
        from PIL import Image
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        frames = [frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame)) for frame in pictures]
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise OptionError("a video needs at least one frame, and all of one size")
        size = self.processor.image_processor.size
        height, width = smart_resize(frames[0].height, frames[0].width, factor, size["shortest_edge"], size["longest_edge"])
        same = frames[0].size == (width, height)
        fitted = [frame.convert("RGB") if same else frame.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
        return torch.from_numpy(np.stack([np.asarray(frame) for frame in fitted]))


@dataclass
class LlavaVideo(Loaded):
    """The embedded picture model with frames for input."""

    @property
    def takes_video(self) -> bool:
        """It does."""
        return True

    def inputs(self, question: str, pictures: Sequence[Any], *, video: bool = True, clip: Clip | None = None) -> dict[str, Any]:
        """Model inputs for one question about the frames together."""
        pixels = self.processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]          # (F, 3, H, W)
        text = self.processor.tokenizer(f"USER: <image> {question} ASSISTANT:", return_tensors="pt")["input_ids"][0].tolist()
        token, config = self.model.config.video_token_id, self.model.config.vision_config
        count = len(pictures) * (config.image_size // config.patch_size) ** 2
        ids = torch.tensor([[number for word in text for number in ([token] * count if word == token else [word])]])
        return self._placed({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels[None]})

    def seen(self, picture: Any, inputs: dict[str, Any]) -> Any:
        """The middle of a frame, as of a picture."""
        return super().seen(picture, {"pixel_values": inputs["pixel_values_videos"][0]})


def load_embedded_video() -> QwenVideo:
    """The trained Qwen2.5-VL that ships with vlprune.

    Raises:
        VlpruneError: its files are missing.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    if not (ASSETS / "model.safetensors").exists():
        raise VlpruneError(f"the embedded video model is not in {str(ASSETS)!r}; train and export it with examples/train_tiny_video_vlm.py")
    with quiet():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ASSETS, dtype=torch.float32, local_files_only=True)
        processor = load_processor(str(ASSETS), model.config)
    return QwenVideo(model.eval(), processor, "the embedded video model", embedded=True)


def load_llava_video() -> LlavaVideo:
    """The embedded picture model's weights (or those of its stand-in) as LLaVA-NeXT-Video without pooling."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    loaded = load_embedded()
    config = loaded.model.config
    taken = LlavaNextVideoConfig(
        vision_config=config.vision_config, text_config=config.text_config, vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy, projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias, video_token_index=config.image_token_id, image_token_index=config.text_config.pad_token_id,
        spatial_pool_mode="average", spatial_pool_stride=1, tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip
    with quiet():
        model = LlavaNextVideoForConditionalGeneration(taken)
    missing = model.load_state_dict(loaded.model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert [name.rpartition(".")[2] for name in missing.missing_keys] == ["image_newline"]                    # of pictures in tiles, not of videos
    note = "The embedded model was trained on single pictures; here its weights read the frames as one video."
    return LlavaVideo(model.eval(), loaded.processor, loaded.name, embedded=True, trained=loaded.trained, notes=[*loaded.notes, note])


def pack_frames(frames: torch.Tensor, patch: int, merge: int, temporal: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames into the patches that Qwen2-VL's and Qwen2.5-VL's towers take, as their video processor does.

    Args:
        frames: uint8, (F, H, W, 3); H and W are multiples of ``patch * merge``. The last frame is repeated up to a multiple of ``temporal``.
        patch: side of a patch in pixels.
        merge: side of a visual token in patches.
        temporal: frames in a patch.

    Returns:
        float32 (T * H/patch * W/patch, 3 * temporal * patch * patch), normalised, the patches of a visual token one after the other; and T, H/patch,
        W/patch.

    Raises:
        OptionError: the frames have another shape.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or any(side % (patch * merge) for side in frames.shape[1:3]):
        raise OptionError(f"frames of shape {tuple(frames.shape)}: give (F, H, W, 3) with sides that are multiples of {patch * merge}")
    missing = -len(frames) % temporal
    filled = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    pixels = (filled.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)                                     # (F, H, W, 3)
    times, rows, columns = len(filled) // temporal, frames.shape[1] // patch, frames.shape[2] // patch
    cut = pixels.reshape(times, temporal, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    packed = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)                                                              # T, h, w, mh, mw, C, tp, p, p
    return packed.reshape(times * rows * columns, -1), (times, rows, columns)
