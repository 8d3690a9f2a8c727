"""The classes that lmms-eval builds for the ids of vlprune: its own classes, with the model pruned and the tokens counted.

They are made when they are asked for (``lmms_models.VlpruneLlavaHf``), because their bases are lmms-eval's and importing those takes a while and packages
of their own.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from torch import nn

from vlprune.adapter import find_adapter
from vlprune.errors import UnsupportedCallError
from vlprune.integrations.lmms_arguments import split_arguments
from vlprune.integrations.lmms_counts import Counts, write_report
from vlprune.integrations.lmms_eval import IDS, use_plain_prompts
from vlprune.integrations.lmms_huggingface import ImageTextToText
from vlprune.integrations.lmms_watched import Watched

#: Class -> where lmms-eval's is, what repairs it.
CLASSES: dict[str, tuple[str, str, tuple[type, ...]]] = {
    "VlpruneHf": ("lmms_eval.models.chat.huggingface", "Huggingface", (ImageTextToText,)),
    "VlpruneQwen25VL": ("lmms_eval.models.chat.qwen2_5_vl", "Qwen2_5_VL", ()),
    "VlpruneQwen25VLSimple": ("lmms_eval.models.simple.qwen2_5_vl", "Qwen2_5_VL", ()),
    "VlpruneLlavaHf": ("lmms_eval.models.chat.llava_hf", "LlavaHf", ()),
    "VlpruneLlavaHfSimple": ("lmms_eval.models.simple.llava_hf", "LlavaHf", ()),
}


class Pruned:
    """Mixed in front of a class of lmms-eval: takes vlprune's arguments out, prunes the model behind its loading, reports what it did.

    The wrapped class loads the model, makes the prompts and reads the answers; none of it is changed.
    """

    model_id: ClassVar[str] = ""
    wraps: ClassVar[str] = ""
    accepts: ClassVar[frozenset[str]] = frozenset()
    _rank: int = 0                                                       # lmms-eval's classes set them
    _world_size: int = 1
    _watched: Watched | None = None

    def __init__(self, **arguments: Any) -> None:
        self.pruning, passed_on = split_arguments(arguments, self.accepts, self.model_id)
        super().__init__(**passed_on)
        model: nn.Module = super().model  # type: ignore[misc]
        placeholders = getattr(find_adapter(model), "placeholders", {})
        self.handle = self.pruning.apply(model)
        self.counts = Counts(tuple(placeholders.values()))
        self._pretrained = str(passed_on.get("pretrained", getattr(model.config, "name_or_path", "")))
        self._watched = Watched(model, self.handle, self.counts)

    @property
    def model(self) -> Any:
        """The model, watched. After vlprune has refused a call it refuses to go on: an empty answer would count as a wrong one."""
        if self._watched is None:
            return super().model  # type: ignore[misc]
        if self._watched.refusal is not None:
            raise self._watched.refusal
        return self._watched

    def generate_until(self, requests: Any) -> Any:
        """As the wrapped class's; then the report is written."""
        return self._reported(super().generate_until(requests))  # type: ignore[misc]

    def generate_until_multi_round(self, requests: Any) -> Any:
        """As the wrapped class's; then the report is written."""
        return self._reported(super().generate_until_multi_round(requests))  # type: ignore[misc]

    def loglikelihood(self, requests: Any) -> Any:
        """Of the dense model only.

        Raises:
            UnsupportedCallError: the model is pruned. lmms-eval's classes look for the answer's logits at its places in the whole prompt.
        """
        if self.handle is not None:
            raise UnsupportedCallError(
                f"{self.wraps} reads log-likelihoods at places of the unpruned prompt, so they would be wrong at keep={self.pruning.keep}. Choose a task "
                "whose answers are generated (output_type: generate_until), or keep=1."
            )
        return self._reported(super().loglikelihood(requests))  # type: ignore[misc]

    def clean(self) -> None:
        """The run is over: say what stayed, let the model go."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore[import-not-found,unused-ignore]

        tokens = self.counts.summary()["visual_tokens"]
        if tokens["prompt"] is not None:                                 # these become entries of "throughput" in lmms-eval's results
            means = {f"visual_tokens_{name}": float(tokens[name]["mean"]) for name in ("prompt", "kept")}
            log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=means)
        whose = f" (process {self._rank} of {self._world_size})" if self._world_size > 1 else ""
        print(f"vlprune: {self._label()}: {self.counts.line()}{whose}", flush=True)
        if self.handle is not None:
            self.handle.remove()
        self.handle = self._watched = None
        super().clean()  # type: ignore[misc]

    def _label(self) -> str:
        if self.handle is None:
            return "dense"
        keep = self.handle.keep
        return f"{self.handle.method.name} keep={f'{keep:.4g}' if isinstance(keep, float) else keep}"

    def _reported(self, answers: Any) -> Any:
        if self._watched is not None and self._watched.refusal is not None:
            raise self._watched.refusal
        if self.pruning.report is not None:
            write_report(self.pruning.report, self._report(), self._rank)
        return answers

    def _report(self) -> dict[str, Any]:
        handle, options = self.handle, {name: str(value) if callable(value) else value for name, value in self.pruning.options.items()}
        return {
            "model": self._pretrained, "model_id": self.model_id, "wraps": self.wraps, "vlprune": _version("vlprune"), "lmms_eval": _version("lmms_eval"),
            "method": "dense" if handle is None else handle.method.name, "keep": 1.0 if handle is None else handle.keep,
            "asked": {"methods": self.pruning.methods, "keep": self.pruning.keep, "options": options, "plan": self.pruning.plan}, **self.counts.summary(),
        }  # fmt: skip


@cache
def make_class(name: str) -> type:
    """The class of this name, made from lmms-eval's; its tasks then ask as they would ask lmms-eval's."""
    module, base_name, repairs = CLASSES[name]
    base = getattr(importlib.import_module(module), base_name)
    use_plain_prompts()
    own = [parameter for part in (*repairs, base) for parameter in inspect.signature(part.__init__).parameters.values()]
    accepts = frozenset(parameter.name for parameter in own if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)) - {"self"}
    about = f"lmms-eval's `{base_name}` with visual token pruning; see `vlprune.integrations.lmms_eval`."
    model_id = next(key for key, one in IDS.items() if name in (one.chat, one.simple))
    body = {"__module__": __name__, "__doc__": about, "model_id": model_id, "wraps": f"{module}.{base_name}", "accepts": accepts}
    return type(name, (Pruned, *repairs, base), body)


def __getattr__(name: str) -> type:
    if name in CLASSES:
        return make_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its classes are {', '.join(CLASSES)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
