"""What all Hugging Face vision-language models share: placeholders in the prompt, features that fill them, a decoder behind.

The family classes say where things are; this file finds the visual items of a call and hands them to the decoder engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlprune.adapter import Adapter
from vlprune.adapters._decoder import DecoderEngine
from vlprune.adapters._decoder_taps import COLUMN_KINDS, KEY_KINDS, ROW_KINDS, STATE_KINDS
from vlprune.adapters._experts import routed_width
from vlprune.adapters._text_calls import is_prompt, refuse_pieces
from vlprune.errors import UnsupportedCallError, UnsupportedPointError
from vlprune.flops import TowerShape
from vlprune.hooks import HookSet
from vlprune.points import Point
from vlprune.protocols import Tap
from vlprune.pruner import SURVIVES, Pruner, Session
from vlprune.tokens import TOKEN_SETS, TokenLayout, VisualItem, square_grid
from vlprune.trace import Trace

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass
class Features:
    """What is known about the visual items that one ``get_*_features`` call encoded.

    Attributes:
        lengths: tokens of each item.
        grids: (N, 3) frame, row, column of each item's tokens, on the CPU, or ``None``.
        signals: for each tap a list with one (N,) or (N, C) tensor for each item.
        patches: tokens that every vision block ran on; 0 if not known.
        segments: sequences among them, each attending to itself only.
        scorer_flops: spent on the signals.
        project: see `vlprune.protocols.ScoreInputs`.
        tower: record of the tower's own stages, if it has some.
    """

    lengths: list[int]
    grids: list[Tensor | None]
    signals: dict[Tap, list[Tensor]] = field(default_factory=dict)
    patches: int = 0
    segments: int = 0
    scorer_flops: float = 0.0
    project: Callable[[Tensor], Tensor] | None = None
    tower: Trace | None = None


@dataclass
class Call:
    """One call of the model with visual input, before its items are known."""

    placeholders: dict[str, Tensor]                 # modality -> (B, L) bool on the CPU
    valid: Tensor                                   # (B, L) bool on the CPU
    features: dict[str, Any] = field(default_factory=dict)


class VisionLanguageAdapter(Adapter):
    """Base of the families. Subclasses fill in `decoder`, `features_of` and the vision signals."""

    vision_signals: ClassVar[frozenset[str]] = frozenset()
    token_sets = TOKEN_SETS

    @property
    def core(self) -> Any:
        """The module that owns ``get_image_features`` and the decoder."""
        inner = getattr(self.model, "model", None)
        return inner if isinstance(inner, nn.Module) and hasattr(inner, "get_image_features") else self.model

    @property
    def decoder(self) -> nn.Module:
        """The stack of decoder layers."""
        return self.core.language_model  # type: ignore[return-value]

    @property
    def placeholders(self) -> dict[str, int]:
        """Placeholder id in the prompt for each modality."""
        config = self.model.config
        ids = {
            "image": getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None),
            "video": getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None),
        }
        return {modality: int(number) for modality, number in ids.items() if number is not None}  # type: ignore[arg-type]

    @property
    def decoder_depth(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)  # type: ignore[arg-type]

    @property
    def multimodal_rope(self) -> bool:
        """Whether position ids have time, height and width."""
        return False

    def points(self) -> list[str]:
        """Every point of the decoder; towers that can be cut inside add theirs."""
        return ["before_llm", *(f"llm:{layer}" for layer in range(self.decoder_depth))]

    def offers(self, point: Point) -> frozenset[str]:
        """Vision signals everywhere in the decoder; decoder signals at its layers."""
        if point.tower == "vision":
            return frozenset()
        return self.vision_signals | (self.offers_in_decoder if point.layer > 0 else self.offers_in_decoder - {"transition"})

    @property
    def offers_in_decoder(self) -> frozenset[str]:
        """Kinds of decoder signals."""
        return frozenset((*ROW_KINDS, *COLUMN_KINDS, *KEY_KINDS, *STATE_KINDS, "transition"))

    # hooks

    def attach(self, hooks: HookSet, pruner: Pruner) -> None:
        """Put everything on."""
        engine = DecoderEngine(self.decoder, pruner, can_renumber=not self.multimodal_rope)
        if not engine.acts:
            return
        self.pruner, self.engine = pruner, engine
        if pruner.stages("vision"):
            self.attach_tower(hooks, pruner)
        else:
            self.attach_vision(hooks, pruner)
        signature = inspect.signature(self.core.forward)
        for modality in PIXELS:
            name = f"get_{modality}_features"
            if hasattr(self.core, name):
                hooks.wrap(self.core, name, self._around_features(modality))
        hooks.before(self.core, lambda m, a, k: self._before_core(signature, a, k))
        hooks.after(self.core, self._after_core, always=True)
        hooks.before(self.decoder, self._before_decoder)
        if any(tap.kind in ROW_KINDS for tap in pruner.taps("decoder")) and hasattr(self.model, "_get_candidate_generator"):
            hooks.wrap(self.model, "_get_candidate_generator", self._refuse_assistance)
        if pruner.on_text:
            refuse_pieces(hooks, self.model, pruner)
        engine.attach(hooks)

    def dimensions(self) -> dict[str, Any]:
        """The decoder's widths; families that know their tower add it."""
        return {"decoder": decoder_shape(self.decoder)}

    def attach_vision(self, hooks: HookSet, pruner: Pruner) -> None:
        """Hook the vision tower for the signals that are needed."""

    def attach_tower(self, hooks: HookSet, pruner: Pruner) -> None:
        """Hook the vision tower for stages inside it; it then collects the signals, too."""
        raise UnsupportedPointError(
            f"{self.name} towers cannot be cut inside; points of this model: before_llm, llm:0 ... llm:{self.decoder_depth - 1}"
        )

    def features_of(self, modality: str, output: Any, arguments: dict[str, Any], signals: dict[Tap, Tensor]) -> Features:
        """Describe the items that ``get_image_features`` (or video) just encoded. One item per entry of ``pooler_output``."""
        lengths = item_lengths(output)
        found = Features(lengths, [square_grid(length) for length in lengths])
        for tap, values in signals.items():
            if values.shape[:1] == (len(lengths),) and all(values.shape[1] == length for length in lengths):
                found.signals[tap] = list(values)
        return found

    def _refuse_assistance(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Assisted decoding sends candidates along with the prompt, so "the last prompt token" would be a guess."""
        raise UnsupportedCallError(
            f"{self.pruner.method.name} looks at the last prompt tokens, and assisted (or prompt-lookup) generation appends candidate tokens to the prompt: "
            "the choice would depend on guesses. Generate without assistance, or use a method that does not look at the text (see `vlprune methods`)."
        )

    def _around_features(self, modality: str) -> Any:
        def around(original: Any, *args: Any, **kwargs: Any) -> Any:
            self.pruner.vision = {}
            output = original(*args, **kwargs)
            arguments = inspect.signature(original).bind(*args, **kwargs).arguments
            found = self.features_of(modality, output, dict(arguments), self.pruner.vision)
            found.scorer_flops = float(self.pruner.vision.get("flops", 0.0))
            survives = self.pruner.vision.get("survives")            # (items, n), separators behind them left out
            if survives is not None:
                found.signals[SURVIVES] = [pad(row, (0, length - row.numel())) for row, length in zip(survives, found.lengths, strict=True)]
            session = self.pruner.vision.get("session")
            if session is not None:
                found.tower = session.trace
                found.scorer_flops += session.trace.scorer_flops
            self.pruner.vision = {}
            if hasattr(output, "pooler_output"):
                output.vlprune_features = found                  # rides on the output object: generate may encode ahead of the forward
            self.pruner.encoded[modality] = (output, found)
            if self.pruner.call is not None:
                self.pruner.call.features[modality] = (output, found)
            return output

        return around

    def _before_core(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pruner = self.pruner
        pruner.session, pruner.call = None, None
        given = {**signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
        encoded = {k: v for k, v in (given.get("mm_encoder_outputs") or {}).items() if v is not None}
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        if not encoded and all(given.get(name) is None for name in PIXELS.values()):
            if ids is None and embeds is not None and (cache is None or int(cache.get_seq_length()) == 0):
                raise UnsupportedCallError(
                    "a prompt given as inputs_embeds alone does not tell where its visual tokens are. Pass input_ids, or inputs_embeds with "
                    "placeholder embeddings together with pixel_values; or remove the pruning for this call."
                )
            if ids is not None and ids.shape[1] > 1 and any(bool((ids == number).any()) for number in self.placeholders.values()):
                raise UnsupportedCallError(
                    "the prompt holds image or video placeholders, but no pixels and no encoded features came with it. Pass them in the same call; "
                    "chunked prefill does not (set generation_config.prefill_chunk_size=None)."
                )
            tokens = ids if ids is not None else embeds
            counted = pruner.on_text or bool(pruner.method.route_masks)                  # choices among experts are reported for text-only prompts, too
            if not counted or tokens is None or not is_prompt(tokens.shape[1], cache):
                return
        if given.get("output_attentions") or getattr(self.decoder.config, "output_attentions", False):
            raise UnsupportedCallError("output_attentions=True would return maps of different sizes by layer; remove the pruning to look at attention maps")
        call = Call({m: self._placeholder_mask(ids, embeds, number) for m, number in self.placeholders.items()}, torch.empty(0))
        first = next(iter(call.placeholders.values()))
        call.valid = valid_tokens(given.get("attention_mask"), *first.shape)
        for modality, output in encoded.items():
            found = getattr(output, "vlprune_features", None) or self._encoded_before(modality, output)
            if found is None:
                raise UnsupportedCallError(
                    "these visual features were encoded without the pruning, or cut into chunks by chunked prefill. Set "
                    "generation_config.prefill_chunk_size=None, and encode with the model that vlprune.apply was called on."
                )
            call.features[modality] = (output, found)
        pruner.call = call

    def _encoded_before(self, modality: str, output: Any) -> Features | None:
        """What is known of features whose output object was rebuilt on the way (accelerate does, to move it), if they are the same."""
        known, found = self.pruner.encoded.get(modality, (None, None))
        if known is None or item_lengths(known) != item_lengths(output):
            return None
        same = all(torch.equal(a.to(b.device), b) for a, b in zip(known.pooler_output, output.pooler_output, strict=True))
        return found if same else None

    def _placeholder_mask(self, ids: Tensor | None, embeds: Tensor | None, number: int) -> Tensor:
        """(B, L) bool on the CPU: the one device read of a prefill, before any heavy kernel is queued."""
        if ids is not None:
            return (ids == number).cpu()
        assert embeds is not None
        embedding = self.model.get_input_embeddings()(torch.tensor(number, device=embeds.device))  # type: ignore[operator]
        return (embeds == embedding.to(embeds.dtype)).all(dim=-1).cpu()

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pruner = self.pruner
        call = pruner.call
        if call is None or pruner.session is not None:
            return
        embeds = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() == 3 else kwargs["inputs_embeds"]
        layout = TokenLayout(embeds.shape[0], embeds.shape[1], valid=call.valid)
        collected: list[tuple[VisualItem, Features, int]] = []
        for modality, (output, found) in call.features.items():
            collected.extend(self._items(modality, call.placeholders[modality], output, found))
        collected.sort(key=lambda entry: (entry[0].row, int(entry[0].positions[0])))
        layout.items = [item for item, _, _ in collected]
        session = Session(pruner, layout, embeds.device)
        for item, found, number in collected:
            for tap, values in found.signals.items():
                session.signals[tap, id(item)] = values[number].to(embeds.device)
            if found.project is not None:
                session.projectors[id(item)] = found.project
        session.trace.layout = layout
        session.trace.shapes = self.dimensions()
        towers = [found for _, found in call.features.values()]
        session.trace.vision_tokens = [sum(found.patches for found in towers)] * self.facts.vision_layers
        cut = [found.tower for found in towers if found.tower is not None]
        if cut:
            session.trace.vision_dense = sum(found.patches for found in towers)
            session.trace.vision_tokens = [sum(tokens) for tokens in zip(*(trace.vision_tokens for trace in cut), strict=True)]
            session.trace.points = [record for trace in cut for record in trace.points]
        session.trace.vision_sequences = sum(found.segments for found in towers)
        session.trace.scorer_flops = sum(found.scorer_flops for found in towers)
        pruner.session = session

    def _items(self, modality: str, mask: Tensor, output: Any, found: Features) -> list[tuple[VisualItem, Features, int]]:
        """Split a modality's placeholders, in reading order, into the items that fill them."""
        lengths = item_lengths(output)
        places = torch.nonzero(mask)                                                     # (tokens, 2): row, position
        if sum(lengths) != places.shape[0]:
            raise UnsupportedCallError(f"the prompt holds {places.shape[0]} {modality} placeholders, but {sum(lengths)} {modality} features were computed")
        sources = self._sources(lengths, found, mask)
        result = []
        for index, part in enumerate(places.split(lengths)):
            if not part.numel():                                                         # a row without pictures in a model that encodes by row
                continue
            row = int(part[0, 0])
            if int(part[-1, 0]) != row:
                raise UnsupportedCallError(f"{modality} {index} has placeholders in two rows of the batch; give each row the tokens of its own {modality}s")
            source = sources[index]
            result.append((VisualItem(row, part[:, 1].clone(), modality, index, found.grids[source]), found, source))
        return result

    @staticmethod
    def _sources(lengths: list[int], found: Features, mask: Tensor) -> list[int]:
        """Which encoded item each item of the prompt is. They differ when ``generate`` repeated rows after encoding (beams)."""
        if lengths == found.lengths:
            return list(range(len(lengths)))
        copies = len(lengths) // max(len(found.lengths), 1)
        per_row, ends = mask.sum(dim=1).tolist(), []
        number = 0
        for count in per_row:                                                            # items of each row
            start, total = number, 0
            while total < count:
                total += lengths[number]
                number += 1
            ends.append(number - start)
        sources: list[int] = []
        first = 0
        for row in range(0, len(ends), copies):
            for _ in range(copies):
                sources.extend(range(first, first + ends[row]))
            first += ends[row]
        return sources

    def _after_core(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pruner = self.pruner
        session, pruner.session, pruner.call = pruner.session, None, None
        pruner.encoded.clear()
        if session is not None and output is not None:
            session.finish()
            pruner.last_trace = session.trace


def decoder_shape(decoder: nn.Module) -> TowerShape:
    """Widths of a Llama-like decoder, from its config and its first layer."""
    config: Any = decoder.config
    routed, mlp = routed_width(decoder), decoder.layers[0].mlp  # type: ignore[index, union-attr]
    heads = int(config.num_attention_heads)
    width = int(config.hidden_size)
    return TowerShape(
        layers=len(decoder.layers),  # type: ignore[arg-type]
        width=width,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or width // heads),
        hidden=routed or int(config.intermediate_size),
        gated=routed is not None or isinstance(getattr(mlp, "gate_proj", None), nn.Module) or hasattr(mlp, "gate_up_proj"),
        vocabulary=int(getattr(config, "vocab_size", 0)),
    )


def item_lengths(output: Any) -> list[int]:
    """Tokens of each item in what ``get_image_features`` returned."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor):
        return [int(features.shape[-2])] * (features.shape[0] if features.dim() == 3 else 1)
    return [int(part.reshape(-1, part.shape[-1]).shape[0]) for part in features]


def valid_tokens(mask: Any, rows: int, length: int) -> Tensor:
    """(B, L) bool on the CPU: which of the last L positions are not padding, from whatever mask the model was given."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return torch.ones(rows, length, dtype=torch.bool)
    if mask.dim() == 4:                                                                  # the last query sees every real token before it
        last = mask[:, 0, -1].cpu()
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        if seen.shape[1] > length:                                                       # past keys, then static slots
            ends = seen.long().cumsum(1).argmax(1).max()
            seen = seen[:, : int(ends) + 1]
        return seen[:, -length:].expand(rows, -1)
    return mask[:, -length:].cpu().bool().expand(rows, -1)


def modules_named(parent: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The first of the named submodules that exists."""
    for name in names:
        module: Any = parent
        for part in name.split("."):
            module = getattr(module, part, None)
        if isinstance(module, nn.Module):
            return module
    return None
