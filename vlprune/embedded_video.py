"""The embedded model as a model for videos: its own weights in LLaVA-NeXT-Video, every frame with all its tokens.

It was trained on single pictures and answers nothing sensible about clips, but its tower, projector and decoder are the real ones, so it shows what
methods for videos keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlprune.loading import Loaded, load_embedded, quiet
from vlprune.video import Clip


@dataclass
class EmbeddedVideo(Loaded):
    """The embedded model with frames for input."""

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


def load_embedded_video() -> EmbeddedVideo:
    """The embedded model's weights (or those of its stand-in) as LLaVA-NeXT-Video without pooling."""
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
    return EmbeddedVideo(model.eval(), loaded.processor, loaded.name, embedded=True, trained=loaded.trained, notes=[*loaded.notes, note])
