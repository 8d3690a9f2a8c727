"""Tiny Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 2 and Gemma 3 text models; the last four with sliding windows where they have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import TinyFamily, tiny_llama

ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@dataclass
class TinyText(TinyFamily):
    """A causal language model by its type."""

    modalities: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """From its config."""
        config = tiny_llama(**{"model_type": self.name, **self.changes})
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


FAMILIES = (
    TinyText("llama"),
    TinyText("qwen2"),
    TinyText("qwen3", changes={"head_dim": 8}),
    TinyText("mistral", changes={"sliding_window": 9, "head_dim": 8}),
    TinyText("gemma", changes={"head_dim": 8}),
    TinyText("gemma2", changes={"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}),
    TinyText("gemma3_text", changes={"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING}),
)
