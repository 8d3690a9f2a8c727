"""lmms-eval's class for any Hugging Face model, made to load models that answer, and to hand processors what they take.

Differences from `lmms_eval.models.chat.huggingface.Huggingface` of lmms-eval 0.7.3, and why:

* It compares a model type with a table whose keys are configuration classes, finds nothing, and loads `AutoModel`, which has no language head and cannot
  generate. Here `AutoModelForImageTextToText` loads.
* It hands every processor ``audios``, which transformers 5 refuses by that name, and empty lists of pictures and videos.
* It pads on the side of the tokenizer; a batch of prompts to go on from must be padded on the left.
* It leaves the frames of a video to the processor and ignores ``max_num_frames``. Here so many, evenly spread, are read with `vlprune.video`.
* ``dtype`` can be chosen; it is bfloat16 as there if it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlprune.errors import OptionError

DTYPES = ("bfloat16", "float16", "float32", "auto")


class ImageTextToText:
    """Mixed in front of `Huggingface`."""

    def __init__(self, dtype: str = "bfloat16", **arguments: Any) -> None:
        if dtype not in DTYPES:
            raise OptionError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
        with _loading(dtype):
            super().__init__(**arguments)
        self.processor = Processor(self.processor, int(self.max_num_frames))  # type: ignore[has-type,attr-defined]


class Loader:
    """Stands for transformers' automatic classes while `Huggingface` loads."""

    def __init__(self, dtype: str) -> None:
        from transformers import AutoModelForImageTextToText

        self.dtype, self._model_mapping = dtype, AutoModelForImageTextToText._model_mapping

    def from_pretrained(self, name: str, torch_dtype: Any = None, **arguments: Any) -> Any:
        """A model that answers questions about pictures."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(name, dtype=self.dtype, **arguments)


class Processor:
    """A processor called as `Huggingface` calls it."""

    def __init__(self, processor: Any, max_num_frames: int) -> None:
        self._processor, self._frames = processor, max_num_frames
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Sequence[Any] = (), videos: Sequence[Any] = (), audios: Sequence[Any] = (), **arguments: Any) -> Any:
        """Model inputs of a batch of prompts.

        Args:
            images: of all prompts, in order.
            videos: files, or frames that are in memory already.
            audios: sounds, for the few models that hear.
            arguments: ``text`` and whatever else the processor takes.
        """
        given: dict[str, Any] = {name: list(value) for name, value in (("images", images), ("audio", audios)) if value}
        if videos:
            given |= self._read(videos)
        return self._processor(**given, **arguments)

    def _read(self, videos: Sequence[Any]) -> dict[str, Any]:
        from vlprune.video import read_video

        if not all(isinstance(video, (str, Path)) for video in videos):
            return {"videos": list(videos)}
        clips = [read_video(video, self._frames) for video in videos]
        return {"videos": [clip.frames for clip in clips], "video_metadata": [clip.metadata() for clip in clips], "do_sample_frames": False}


@contextmanager
def _loading(dtype: str) -> Iterator[None]:
    """Put the loader in the place of the three classes that `Huggingface` chooses between."""
    module: Any = importlib.import_module("lmms_eval.models.chat.huggingface")
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    loader = Loader(dtype)
    try:
        for name in before:
            setattr(module, name, loader)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
