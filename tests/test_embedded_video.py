"""The embedded model's weights read frames as a video: what it sees of each is what the model for pictures sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vlprune
from vlprune.budget import Budget
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


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    from vlprune.evals import moving_digits

    return [Image.fromarray(frame) for frame in moving_digits.clip("heldout", 3).frames[:3]]


@pytest.mark.parametrize("needs", [(SENSITIVITY,), (COLUMNS,), (SENSITIVITY, STATES, COLUMNS)], ids=["after", "before", "both"])
def test_signals_of_a_frame_are_those_of_the_picture(frames: list[Image.Image], needs: tuple[Tap, ...]) -> None:
    """Also those that are made behind the pooling, in the projector."""
    from vlprune.embedded_video import load_embedded_video
    from vlprune.loading import load_embedded

    video, picture = load_embedded_video(), load_embedded()
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
    from vlprune.embedded_video import load_embedded_video
    from vlprune.loading import load_embedded

    video, picture = load_embedded_video(), load_embedded()
    given = video.inputs(QUESTION, frames[:1])
    known = picture.processor(images=[frames[0]], text=f"USER: <image> {QUESTION} ASSISTANT:", return_tensors="pt")
    assert torch.equal(given["input_ids"], known["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(video.model(**given).logits, picture.model(**known).logits)
