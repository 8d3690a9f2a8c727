"""Text-only decoders of Hugging Face transformers, found by structure: Llama, Qwen2, Qwen3, Mistral, Gemma and others with ``get_decoder().layers``.

What is reduced is the text of each prompt: one item a row, made of its tokens that are not padding. Every call with more than one new token, or on an
empty cache, is a prompt; a later turn on the same cache is reduced by itself.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from vlprune.adapter import Adapter
from vlprune.adapters._cache import wrap_cache
from vlprune.adapters._decoder import DecoderEngine
from vlprune.adapters._experts import expert_layers
from vlprune.adapters._structure import decoder_in, has_multimodal_rope, missing_in, require
from vlprune.adapters._text_calls import is_prompt, refuse_pieces
from vlprune.adapters._vlm import decoder_shape, valid_tokens
from vlprune.errors import UnsupportedCallError
from vlprune.hooks import HookSet
from vlprune.method import ModelFacts
from vlprune.points import Point
from vlprune.protocols import ROW_SET_KINDS
from vlprune.pruner import Pruner, Session
from vlprune.tokens import TokenLayout


class TextDecoderAdapter(Adapter):
    """A causal language model without pictures."""

    name = "text_decoder"
    priority = 200
    token_sets = ("text", "all")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        require(model, missing_in(self.decoder))

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """A model that generates, or a bare stack of decoder layers; no encoder, no pictures."""
        config: Any = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "vision_config", None) is not None:
            return False
        generates = getattr(model, "can_generate", None)
        return bool(callable(generates) and generates()) or (hasattr(model, "get_decoder") and decoder_in((model,)) is not None)

    @cached_property
    def decoder(self) -> Any:
        """The stack of decoder layers."""
        return decoder_in((self.model,))

    @property
    def decoder_depth(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    @property
    def multimodal_rope(self) -> bool:
        """Whether the rotary ids have sections for time, height and width."""
        return has_multimodal_rope(self.decoder)

    @property
    def facts(self) -> ModelFacts:
        """The decoder is all there is."""
        return ModelFacts(
            decoder_layers=self.decoder_depth, signals=ROW_SET_KINDS, token_sets=self.token_sets, expert_layers=expert_layers(self.decoder)
        )  # fmt: skip

    def points(self) -> list[str]:
        """Every layer's input; what is the point behind the features elsewhere is the first one here."""
        return ["before_llm", *(f"llm:{layer}" for layer in range(self.decoder_depth))]

    def offers(self, point: Point) -> frozenset[str]:
        """What can be known of the tokens of a row."""
        if point.tower == "vision":
            return frozenset()
        return ROW_SET_KINDS if point.layer > 0 else ROW_SET_KINDS - {"transition"}

    def default_method(self) -> tuple[str, float]:
        """Skip what the last tokens do not attend to."""
        return "spts", 1 / 2

    def dimensions(self) -> dict[str, Any]:
        """The decoder's widths."""
        return {"decoder": decoder_shape(self.decoder)}

    def attach(self, hooks: HookSet, pruner: Pruner) -> None:
        """Put everything on."""
        engine = DecoderEngine(self.decoder, pruner, can_renumber=not self.multimodal_rope)
        if not engine.acts:
            return
        self.pruner, self.engine = pruner, engine
        signature = inspect.signature(self.decoder.forward)
        hooks.before(self.decoder, lambda module, args, kwargs: self._before(signature, args, kwargs))
        hooks.after(self.decoder, self._after, always=True)
        if pruner.on_text:
            refuse_pieces(hooks, self.model, pruner)
        engine.attach(hooks)

    def _before(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pruner = self.pruner
        pruner.session = None
        given = {**signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or not is_prompt(tokens.shape[1], given.get("past_key_values")):
            return
        if given.get("output_attentions") or getattr(self.decoder.config, "output_attentions", False):
            raise UnsupportedCallError("output_attentions=True would return maps of different sizes by layer; remove the pruning to look at attention maps")
        rows, length = int(tokens.shape[0]), int(tokens.shape[1])
        layout = TokenLayout(rows, length, valid=valid_tokens(given.get("attention_mask"), rows, length))
        session = Session(pruner, layout, tokens.device)
        session.trace.layout = layout
        session.trace.shapes = self.dimensions()
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        plain = mask.dim() == 2 if isinstance(mask, Tensor) else mask is None and given.get("position_ids") is None
        session.plain = plain and not getattr(self.decoder.config, "attention_chunk_size", None)
        if session.idle:
            session.memo["idle"] = True                                  # the cache stays as it is: bit for bit the untouched model
        elif cache is not None:
            wrap_cache(cache, self.decoder_depth)                        # before the model makes masks for it
        pruner.session = session

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pruner = self.pruner
        session, pruner.session = pruner.session, None
        if session is not None and output is not None:
            session.finish()
            pruner.last_trace = session.trace


ADAPTERS = (TextDecoderAdapter,)
