"""A sample opened and put into model inputs: pictures, frames, several samples in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Sample
from vlprune.loading import Loaded
from vlprune.video import Clip, read_video

#: Inputs with one entry a token, padded on the left in a batch, with what they are padded by (``None``: the tokenizer's padding).
TOKENWISE: dict[str, int | None] = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True)
class Frames:
    """How a video is read: see `vlprune.video.read_video`.

    Attributes:
        count: frames of a video, at most.
        sampling: ``"uniform"``, ``"fps"`` or ``"keyframes"``.
        fps: frames a second for ``"fps"``.
        resize: longest side in pixels; ``None``: as in the file.
    """

    count: int = 8
    sampling: str = "uniform"
    fps: float | None = None
    resize: int | None = None


@dataclass
class Opened:
    """A sample with its pictures or frames in memory.

    Attributes:
        parts: the prompt where it depends on the frames, see `Sample.words`.
    """

    sample: Sample
    pictures: list[Any] = field(default_factory=list)
    clip: Clip | None = None
    parts: Sequence[str | int] | None = None


def open_sample(sample: Sample, frames: Frames) -> Opened:
    """Read the files of a sample.

    Raises:
        OptionError: a file that is missing or broken; it is named.
    """
    if sample.video is None:
        return Opened(sample, [_picture(entry) for entry in sample.pictures])
    extra: dict[str, Any] = {}
    if frames.sampling != "uniform":
        extra |= {"sampling": frames.sampling, "fps": frames.fps}
    if sample.start is not None or sample.end is not None:
        extra |= {"start": sample.start, "end": sample.end}
    if frames.resize is not None:
        extra["resize"] = frames.resize

    def read(file: Path) -> Clip:
        if sample.rate is not None and file.is_dir():
            from vlprune.evals.frame_folders import read_frames

            return read_frames(file, frames.count, sample.rate, **extra)
        return read_video(file, frames.count, **extra)

    clip = sample.video(read) if callable(sample.video) else read(sample.video)
    return Opened(sample, list(clip.frames), clip, None if sample.words is None else sample.words(clip))


def _picture(entry: Any) -> Any:
    from PIL import Image

    if callable(entry):
        entry = entry()
    if isinstance(entry, (str, Path)):
        try:
            with Image.open(entry) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise OptionError(f"cannot open the picture {str(entry)!r}: {error}") from error
    return entry.convert("RGB")


def inputs_for(loaded: Loaded, opened: Opened) -> dict[str, Any]:
    """Model inputs of one sample. A model that takes no videos gets the frames as pictures, with subtitles between them where a benchmark wants that."""
    parts, video = opened.parts, opened.clip is not None and loaded.takes_video
    if parts is None:
        return loaded.inputs(opened.sample.question, opened.pictures, video=video, clip=opened.clip)
    if video or all(isinstance(part, str) for part in parts):            # a video is one item: its words come behind it
        text = "\n".join(part for part in parts if isinstance(part, str))
        return loaded.inputs(text, opened.pictures, video=video, clip=opened.clip)
    return interleaved(loaded, parts, opened.pictures)


def interleaved(loaded: Loaded, parts: Sequence[str | int], pictures: Sequence[Any]) -> dict[str, Any]:
    """Model inputs of pictures with text between them.

    Args:
        loaded: a model that takes pictures.
        parts: texts, and places of pictures; a line each without a chat template.
        pictures: all of them.
    """
    processor, places = loaded.processor, [part for part in parts if not isinstance(part, str)]
    if getattr(processor, "chat_template", None):
        content = [{"type": "text", "text": f"{part}\n"} if isinstance(part, str) else {"type": "image"} for part in parts]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    else:
        token = getattr(processor, "image_token", None) or "<image>"
        prompt = "USER: " + "\n".join(part if isinstance(part, str) else token for part in parts) + " ASSISTANT:"
    made = processor(text=[str(prompt)], images=[pictures[place] for place in places], return_tensors="pt", padding=True)
    return loaded._placed(made)


def collate(parts: Sequence[dict[str, Any]], pad: int) -> dict[str, Any] | None:
    """One batch from the inputs of several samples, padded on the left; ``None`` where their shapes do not go together.

    Args:
        parts: inputs of one prompt each: tokenwise tensors (1, L_i), everything else with a first dimension to go side by side along.
        pad: id of the padding token.
    """
    if len(parts) == 1:
        return parts[0]
    names = parts[0].keys()
    if any(part.keys() != names for part in parts):
        return None
    longest = max(part["input_ids"].shape[1] for part in parts)
    out: dict[str, Any] = {}
    for name in names:
        values = [part[name] for part in parts]
        if name in TOKENWISE:
            fill = pad if TOKENWISE[name] is None else TOKENWISE[name]
            out[name] = torch.cat([F.pad(value, (longest - value.shape[1], 0), value=fill) for value in values])
        elif all(isinstance(value, Tensor) for value in values):
            if len({value.shape[1:] for value in values}) > 1:
                return None
            out[name] = torch.cat(values)
        elif all(isinstance(value, list) for value in values):
            out[name] = [entry for value in values for entry in value]
        else:
            return None
    return out


def pad_token(loaded: Loaded) -> int:
    """The id that rows are padded with."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    for found in (getattr(tokenizer, "pad_token_id", None), loaded.model.generation_config.pad_token_id, getattr(tokenizer, "eos_token_id", None)):
        if isinstance(found, int):
            return found
    return 0
