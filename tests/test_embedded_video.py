"""The models for videos that ship with vlprune: the trained Qwen2.5-VL, and the picture model's weights that read frames as a video."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlprune
from vlprune.budget import Budget
from vlprune.embedded_video import ASSETS, QwenVideo, load_embedded_video, pack_frames
from vlprune.errors import OptionError
from vlprune.method import PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.protocols import ScoreInputs, Tap
from vlprune.reducers import Drop
from vlprune.selectors import TopK

pytest.importorskip("sklearn")
QUESTION = "which digit moves ?"
SENSITIVITY, COLUMNS, STATES = Tap("sensitivity", 0, ("closed",)), Tap("column_mean", 9), Tap("vision_states", 9)


class Look:
    """A scorer that keeps what it sees."""

    def __init__(self, *needs: Tap) -> None:
        self.needs, self.seen = needs, []  # type: ignore[var-annotated]

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        self.seen.append(inputs)
        return inputs.tokens.float().mean(dim=-1)


def look(model: Any, inputs: dict[str, Any], *needs: Tap) -> ScoreInputs:
    scorer = Look(*needs)
    with vlprune.apply(model, PruningMethod("look", (Stage(BeforeLLM(), scorer, TopK(), Drop(), Budget(0.5)),))), torch.no_grad():
        model(**inputs)
    (seen,) = scorer.seen
    return seen


trained = pytest.mark.skipif(not (ASSETS / "model.safetensors").exists(), reason="the video model has not been exported")


# the picture model on frames


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    from vlprune.evals import moving_digits

    return [Image.fromarray(frame) for frame in moving_digits.clip("heldout", 3).frames[:3]]


@pytest.mark.parametrize("needs", [(SENSITIVITY,), (COLUMNS,), (SENSITIVITY, STATES, COLUMNS)], ids=["after", "before", "both"])
def test_signals_of_a_frame_are_those_of_the_picture(frames: list[Image.Image], needs: tuple[Tap, ...]) -> None:
    """Also those that are made behind the pooling, in the projector."""
    from vlprune.embedded_video import load_llava_video
    from vlprune.loading import load_embedded

    video, picture = load_llava_video(), load_embedded()
    together = look(video.model, video.inputs(QUESTION, frames), *needs)
    assert together.modality == "video"
    assert together.tokens.shape[1] == 3 * 256
    for number, frame in enumerate(frames):
        alone = look(picture.model, picture.inputs(QUESTION, [frame]), *needs)
        part = slice(256 * number, 256 * (number + 1))
        for tap in needs:
            torch.testing.assert_close(together.signal(tap)[:, part], alone.signal(tap), rtol=1e-4, atol=1e-5)
        assert together.grid is not None
        assert together.grid[0, part, 0].unique().tolist() == [number]


def test_one_frame_is_the_picture(frames: list[Image.Image]) -> None:
    """The same weights, the same prompt, the same logits."""
    from vlprune.embedded_video import load_llava_video
    from vlprune.loading import load_embedded

    video, picture = load_llava_video(), load_embedded()
    given = video.inputs(QUESTION, frames[:1])
    known = picture.processor(images=[frames[0]], text=f"USER: <image> {QUESTION} ASSISTANT:", return_tensors="pt")
    assert torch.equal(given["input_ids"], known["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(video.model(**given).logits, picture.model(**known).logits)


# the trained video model


@pytest.fixture(scope="module")
def loaded() -> QwenVideo:
    return load_embedded_video()


def test_frames_are_packed_as_the_image_processor_packs_pictures() -> None:
    """Two equal frames are what a picture is to it; with two frames that differ, the second stands behind the first in every channel of a patch."""
    from transformers import Qwen2VLImageProcessorPil

    frame, other = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2)
    one, two = (images(images=[Image.fromarray(x)], return_tensors="pt", do_resize=False)["pixel_values"].reshape(-1, 3, 2, 8, 8) for x in (frame, other))
    packed, grid = pack_frames(torch.from_numpy(np.stack([frame, other])), 8, 2, 2)
    assert grid == (1, 4, 6)
    torch.testing.assert_close(packed.reshape(-1, 3, 2, 8, 8), torch.stack([one[:, :, 0], two[:, :, 0]], 2))


def test_frame_pairs_follow_each_other() -> None:
    """Each pair is packed as if it stood alone; a last frame without a partner is its own."""
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8))
    packed, grid = pack_frames(frames, 8, 2, 2)
    assert grid == (3, 2, 2)
    pairs = [frames[:2], frames[2:4], frames[[4, 4]]]
    assert torch.equal(packed, torch.cat([pack_frames(pair, 8, 2, 2)[0] for pair in pairs]))
    with pytest.raises(OptionError, match="multiples of 16"):
        pack_frames(frames[:, :12], 8, 2, 2)


@trained
def test_inputs_of_a_clip(loaded: QwenVideo, tmp_path: Path) -> None:
    """Placeholders for 64 tokens a frame pair; time positions one apart for the clips it was trained on, two apart at half the speed."""
    from vlprune.evals import moving_scenes

    scene = moving_scenes.clip("heldout", 0)
    inputs = loaded.inputs("which digit moves ?", list(scene.frames))
    assert (inputs["input_ids"] == loaded.model.config.video_token_id).sum() == 4 * 64
    text = loaded.processor.tokenizer.decode(inputs["input_ids"][0][-8:])
    assert text.split() == "<|vision_end|> which digit moves ? <|im_end|> <|im_start|> assistant".split()
    found = moving_scenes.read(moving_scenes.write(scene, tmp_path / "clip.avi"))
    slow = dataclasses.replace(found, times=[2 * time for time in found.times])
    for clip, apart in ((None, 1), (found, 1), (slow, 2)):
        given = loaded.inputs("which digit moves ?", found.frames, clip=clip)
        given = {name: given[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")}
        positions, _ = loaded.model.model.get_rope_index(**given)
        assert positions[0, 0, 3 : 3 + 256].unique().diff().tolist() == [apart] * 3


@trained
def test_other_sizes_and_pictures(loaded: QwenVideo) -> None:
    """Large frames are made about as large as those it was trained on; several pictures stay pictures."""
    wide = [Image.new("RGB", (640, 360), (number, 90, 20)) for number in range(4)]
    inputs = loaded.inputs("which digit moves ?", wide)
    assert inputs["video_grid_thw"].tolist() == [[2, 12, 20]]                          # 96 x 160 pixels, within 16,384
    assert loaded.seen(wide[0], inputs).size == (640, 360)
    single = loaded.inputs("which digit moves ?", wide[:1], video=False)
    assert single["image_grid_thw"].shape == (1, 3)
    with torch.no_grad():
        assert torch.isfinite(loaded.model(**single).logits).all()
    with pytest.raises(OptionError, match="one size"):
        loaded.inputs("which digit moves ?", [wide[0], wide[0].resize((64, 64))])


@trained
def test_methods_for_videos_run_on_it(loaded: QwenVideo) -> None:
    from vlprune.evals import moving_scenes

    inputs = loaded.inputs("which digit moves ?", list(moving_scenes.clip("heldout", 0).frames))
    for name in ("random", "evs", "vidcom2"):
        with vlprune.apply(loaded.model, name, keep=0.25) as handle:
            (said,) = loaded.answers(inputs, 2)
            assert handle.report().points[-1].kept[0].numel() == 64
        assert said


@trained
def test_it_answers(loaded: QwenVideo) -> None:
    """Two questions of each kind about held-out clips: far better with the clip than without. The README next to the weights has the full table."""
    from vlprune.evals import moving_scenes

    asked = moving_scenes.heldout_questions(2 * len(moving_scenes.KINDS), seed=1)
    right = {"clip": 0, "blank": 0}
    for scene, question in asked:
        blank = np.broadcast_to(scene.frames.mean((1, 2), keepdims=True).astype(np.uint8), scene.frames.shape)
        for name, shown in (("clip", scene.frames), ("blank", blank)):
            right[name] += loaded.answers(loaded.inputs(question.text, list(shown)), 2) == [question.answer]
    assert right["clip"] >= 0.75 * len(asked), right
    assert right["blank"] <= 0.45 * len(asked), right
