"""Models and processors for the command line: the embedded model, or any Hugging Face model by path or hub id."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlprune.errors import OptionError, UnsupportedModelError, VlpruneError
from vlprune.video import Clip

ASSETS = Path(__file__).parent / "assets" / "tiny_vlm"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Loaded:
    """A model with its processor.

    Attributes:
        name: what to call it.
        embedded: whether it is the model that ships with vlprune.
        trained: false for the stand-in with random weights.
        notes: what the user should know.
    """

    model: Any
    processor: Any
    name: str
    embedded: bool = False
    trained: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def takes_video(self) -> bool:
        """Whether frames can be given as one video."""
        config = self.model.config
        known = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None)
        return known is not None and getattr(self.processor, "video_processor", None) is not None

    def inputs(self, question: str, pictures: Sequence[Any], *, video: bool = False, clip: Clip | None = None) -> dict[str, Any]:
        """Model inputs for one question about all pictures together, on the model's device.

        Args:
            question: the text.
            pictures: images, or the frames of a video.
            video: give the pictures as one video.
            clip: where the frames come from; models that know time are told theirs.
        """
        arguments: dict[str, Any] = {"text": [self.prompt(question, len(pictures), video)], "return_tensors": "pt", "padding": True}
        if video:
            arguments["videos"] = [list(pictures)]
            arguments["videos_kwargs"] = {"do_sample_frames": False}
            if clip is not None:
                known = {"fps": clip.fps, "total_num_frames": clip.num_frames, "frames_indices": clip.indices, "duration": clip.num_frames / clip.fps}
                arguments["videos_kwargs"]["video_metadata"] = [known]
        else:
            arguments["images"] = list(pictures)
        return self._placed(self.processor(**arguments))

    def batch(self, question: str, pictures: Sequence[Any]) -> dict[str, Any]:
        """Model inputs that ask the same question about each picture by itself."""
        texts = [self.prompt(question, 1)] * len(pictures)
        return self._placed(self.processor(images=[[picture] for picture in pictures], text=texts, padding=True, return_tensors="pt"))

    def prompt(self, question: str, pictures: int = 1, video: bool = False) -> str:
        """The chat template if there is one, else LLaVA's ``USER: <image> ... ASSISTANT:``."""
        kind = "video" if video else "image"
        count = 1 if video else pictures
        if getattr(self.processor, "chat_template", None):
            content = [{"type": kind}] * count + [{"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        token = getattr(self.processor, f"{kind}_token", None) or f"<{kind}>"
        return f"USER: {' '.join([token] * count)}\n{question} ASSISTANT:"

    def answers(self, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
        """Greedy answers, one a row."""
        with torch.no_grad():
            made = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def seen(self, picture: Any, inputs: dict[str, Any]) -> Any:
        """The part of the picture that the model looks at: processors that crop cut the middle out."""
        images = getattr(self.processor, "image_processor", None)
        pixels = inputs.get("pixel_values")
        if not getattr(images, "do_center_crop", False) or pixels is None or pixels.dim() != 4:
            return picture
        edge, crop = (getattr(images, "size", None) or {}).get("shortest_edge"), getattr(images, "crop_size", None) or {}
        if not edge or not crop.get("height"):
            return picture
        scale = min(picture.size) / edge
        width, height = min(picture.width, crop["width"] * scale), min(picture.height, crop["height"] * scale)
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        return picture.crop((round(left), round(top), round(left + width), round(top + height)))

    def _placed(self, inputs: Any) -> dict[str, Any]:
        device, dtype = self.model.device, self.model.dtype
        return {name: value.to(device, dtype) if value.is_floating_point() else value.to(device) for name, value in inputs.items()}


def load_embedded() -> Loaded:
    """The model that ships with vlprune; a stand-in with random weights of the same shape where its files are missing."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if (ASSETS / "model.safetensors").exists():
        with quiet():
            processor = AutoProcessor.from_pretrained(ASSETS, local_files_only=True)
            model = LlavaForConditionalGeneration.from_pretrained(ASSETS, dtype=torch.float32, local_files_only=True)
        return Loaded(model.eval(), processor, "the embedded model", embedded=True)
    loaded = _stand_in()
    loaded.notes.append(
        "RANDOM WEIGHTS: the trained model is not in vlprune/assets/tiny_vlm, so an untrained LLaVA of the same shape stands in. "
        "Its answers and its choice of tokens mean nothing; counts, FLOPs, bytes and times are real."
    )
    return loaded


def _stand_in() -> Loaded:
    """A LLaVA of the embedded model's shape with random weights and a word-level tokenizer."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    digits: Any = importlib.import_module("vlprune.evals.digits")
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user:", "assistant:", *digits.vocabulary()]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.]"), "isolated")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"],
        padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": digits.SIZE}, crop_size={"height": digits.SIZE, "width": digits.SIZE})
    processor = LlavaProcessor(images, tokenizer, patch_size=digits.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=11, num_attention_heads=3, image_size=digits.SIZE, patch_size=digits.PATCH
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=96, intermediate_size=256, num_hidden_layers=10, num_attention_heads=3, num_key_value_heads=3,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=digits.GRID**2,
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    torch.set_rng_state(state)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return Loaded(model, processor, "a stand-in with random weights", embedded=True, trained=False)


def load_model(name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> Loaded:
    """A model that answers questions about pictures, with its processor.

    Args:
        name: folder or hub id.
        dtype: one of ``DTYPES``; ``"auto"`` is float32 on a CPU and the checkpoint's own elsewhere.
        device: such as ``"cpu"`` or ``"cuda:0"``; ``"auto"`` takes CUDA where there is one.
        trust_remote_code: whether code from the model's repository may run.
    """
    from transformers import AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
    place = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    try:
        target = torch.device(place)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {_first_line(error)}") from error
    config = load_config(name, trust_remote_code)
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust_remote_code:
        raise UnsupportedModelError(
            f"{name!r} is a {config.model_type!r} model; the demo needs one that answers questions about pictures (such as LLaVA or Qwen-VL)"
        )
    chosen: Any = (torch.float32 if target.type == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
    notes: list[str] = []
    processor = load_processor(name, config, trust_remote_code, notes)
    with quiet():
        try:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=chosen, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise VlpruneError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    return Loaded(model.to(target).eval(), processor, str(name), notes=notes)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, or one clear line."""
    from transformers import AutoConfig

    if ("/" in name or "\\" in name or name.startswith(".")) and name.count("/") != 1 and not Path(name).exists():
        raise OptionError(f"there is no model folder {name!r}")
    with quiet():
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            where = "in this folder" if Path(name).is_dir() else "as a folder or on the hub"
            raise OptionError(f"no model {name!r} found {where}: {_first_line(error)}") from error


def load_processor(name: str, config: Any, trust_remote_code: bool = False, notes: list[str] | None = None) -> Any:
    """The processor. Where torchvision is missing, one that does without its video half."""
    from transformers import AutoProcessor

    with quiet():
        try:
            return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        except ImportError as error:
            processor = _without_video(name, config, trust_remote_code)
            if processor is None:
                raise VlpruneError(f"the processor of {name!r} needs a package that is missing: {_first_line(error)}") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise VlpruneError(f"cannot load the processor of {name!r}: {_first_line(error)}") from error
    if notes is not None:
        notes.append("the processor's video half needs torchvision, which is not installed; pictures work without it")
    return processor


def _without_video(name: str, config: Any, trust_remote_code: bool) -> Any:
    """The model's processor class without a video processor, which transformers 5 refuses to leave out."""
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        known = PROCESSOR_MAPPING[type(config)]
        images = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        lenient = type(known.__name__, (known,), {"check_argument_for_proper_class": lambda self, part, given: type(given)})
        return lenient(image_processor=images, tokenizer=tokenizer, video_processor=None, chat_template=getattr(tokenizer, "chat_template", None))
    except (KeyError, TypeError, AttributeError, OSError, ValueError, ImportError):
        return None


def empty_model(name: str, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights, on the meta device: it takes no memory whatever its size."""
    from transformers import AutoModel, AutoModelForImageTextToText

    config = load_config(name, trust_remote_code)
    factory = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else AutoModel
    with quiet(), torch.device("meta"):
        try:
            model: nn.Module = factory.from_config(config, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedModelError(f"cannot build {name!r} ({getattr(config, 'model_type', '?')}): {_first_line(error)}") from error
    return model


class quiet:
    """Keeps transformers' warnings and progress bars off the screen for a while."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *details: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:240]
