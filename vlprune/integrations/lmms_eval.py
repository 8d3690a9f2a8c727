"""lmms-eval, where many people evaluate already: its own model classes, pruned, under ids of their own.

    lmms-eval --model vlprune_llava_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=hiprune,keep=1/3,report=out/tokens.json \\
        --tasks gqa --batch_size 1 --output_path out --log_samples

| id | wraps lmms-eval's | for |
| --- | --- | --- |
| ``vlprune_llava_hf`` | ``llava_hf`` | LLaVA, LLaVA-NeXT, LLaVA-OneVision |
| ``vlprune_qwen2_5_vl`` | ``qwen2_5_vl`` | Qwen2.5-VL |
| ``vlprune_hf`` | ``huggingface``, made to work (`vlprune.integrations.lmms_huggingface`) | anything that `AutoModelForImageTextToText` loads |

Beside the arguments of the wrapped class: ``method`` (several with ``+`` between), ``keep`` (``1/3``, ``0.33``, ``64`` tokens an item, ``[0.9,0.5]`` by
stage), ``positions``, ``plan``, the method's options by name (``METHOD.OPTION`` where there are several methods), and ``report=FILE``.
``keep=1`` is the dense baseline: the wrapped class with its model untouched, and counted. Mean visual tokens of a prompt and how many stayed are printed at the
end, are entries of ``throughput`` in lmms-eval's results, and, with minima, maxima, pruning points, FLOPs and cache bytes, in the report.
Each process of a distributed run counts its own samples; those behind the first write ``FILE.rank1`` and so on.

lmms-eval finds this through the entry point ``lmms_eval.models``; nothing else has to be done but to install both. Log-likelihood tasks are refused where the
model is pruned, with the reason.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import wraps
from typing import Any

MODELS = "vlprune.integrations.lmms_models"


@dataclass(frozen=True)
class Id:
    """One id of vlprune.

    Attributes:
        plain: lmms-eval's id of what is wrapped.
        chat: name of the class for tasks with chat messages.
        simple: name of the class for tasks with plain texts (``--force_simple``), where lmms-eval has one.
    """

    plain: str
    chat: str
    simple: str | None = None


IDS = {
    "vlprune_hf": Id("huggingface", "VlpruneHf"),
    "vlprune_qwen2_5_vl": Id("qwen2_5_vl", "VlpruneQwen25VL", "VlpruneQwen25VLSimple"),
    "vlprune_llava_hf": Id("llava_hf", "VlpruneLlavaHf", "VlpruneLlavaHfSimple"),
}


def manifests() -> list[Any]:
    """One ``ModelManifest`` for each id. The classes they name are loaded when lmms-eval wants one."""
    manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
    return [
        manifest(model_id=name, chat_class_path=f"{MODELS}.{one.chat}", simple_class_path=f"{MODELS}.{one.simple}" if one.simple else None)
        for name, one in IDS.items()
    ]


def use_plain_prompts() -> None:
    """Let tasks with prompts of their own for, say, ``qwen2_5_vl`` give ``vlprune_qwen2_5_vl`` the same. They are looked up by the model's id."""
    task: Any = importlib.import_module("lmms_eval.api.task").ConfigurableTask
    original = task._prepare_model_specific_config
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def prepare(self: Any) -> None:
        if self.model_name in IDS:
            self.model_name = IDS[self.model_name].plain
        original(self)

    task._prepare_model_specific_config = prepare
