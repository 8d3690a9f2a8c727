"""Rows that skip a part of a decoder layer: attention, MLP or both run on the others alone, and their results go back to their places.

In a prompt, the rows are chosen at the layer's input (at the MLP's for the MLP alone). Attention is given gathered hidden states with arguments cut to
the same rows (`DecoderEngine`), and what stands for the bypassed rows in the cache is said by the policy (`_kv_fill`). While decoding, the choice is the
host's: the new token of a row runs or does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._cache import PrunedLayer
from vlprune.adapters._decoder_taps import attention_of
from vlprune.adapters._keys_from import EarlierKeys
from vlprune.adapters._kv_fill import Filled, KeysValues, last_keys_values, mixed, project_keys_values
from vlprune.errors import OptionError, UnsupportedCallError, UnsupportedPointError
from vlprune.hooks import HookSet
from vlprune.method import Bypass, Observe
from vlprune.protocols import GenerationState, Step, gather_tokens
from vlprune.pruner import Collect, Pruner, Session, compact


@dataclass
class Rows:
    """Entries of the current sequence that run through a part of one layer.

    Attributes:
        mask: (B, Lc) bool. counts: of each row, known on the host; ``None``: only the mask is known, so everything is computed and some thrown away.
        index: (B, R) places, short rows repeat their last. valid: (B, R) which count, ``None``: all.
        kv: what the others leave in the cache.
        rotary: of all rows, for their keys.
    """

    mask: Tensor
    kv: str
    counts: list[int] | None = None
    index: Tensor | None = None
    valid: Tensor | None = None
    rotary: Any = None

    @classmethod
    def of(cls, mask: Tensor, counts: list[int], kv: str) -> Rows:
        """With the places worked out."""
        index, valid, _ = compact(mask, counts)
        return cls(mask, kv, counts, index, valid)

    def take(self, states: Tensor) -> Tensor:
        """(B, R, D) of (B, Lc, D)."""
        assert self.index is not None
        return gather_tokens(states, self.index)

    def put(self, results: Tensor, length: int) -> Tensor:
        """(B, Lc, D) with the results (B, R, D) in their places, zeros elsewhere."""
        assert self.index is not None
        if self.valid is not None:                                       # filler adds nothing, forward and backward
            results = torch.where(self.valid[..., None], results, torch.zeros((), dtype=results.dtype, device=results.device))
        zeros = results.new_zeros(results.shape[0], length, results.shape[2])
        return zeros.scatter_add(1, self.index[..., None].expand_as(results), results)


class Bypasses:
    """The `Bypass` and `Observe` parts of a method on one decoder."""

    def __init__(self, layers: list[nn.Module], pruner: Pruner, backend: Callable[[], str]) -> None:
        self.layers, self.pruner, self.backend = layers, pruner, backend
        self.earlier = EarlierKeys(layers, pruner)
        self.prompt: dict[int, list[Bypass]] = {}
        self.decoding: dict[int, list[Bypass]] = {}
        for bypass in pruner.method.bypasses:
            if not 0 <= bypass.layer < len(layers):
                raise UnsupportedPointError(f"{pruner.method.name} bypasses layer {bypass.layer}; this decoder has layers 0 to {len(layers) - 1}")
            if bypass.in_prompts:
                self.prompt.setdefault(bypass.layer, []).append(bypass)
            if bypass.phase != "prefill":
                self.decoding.setdefault(bypass.layer, []).append(bypass)
        for layer, together in self.prompt.items():
            self._check(layer, [bypass for bypass in together if bypass.budget is not None])

        check_copies(layers, pruner)

    @property
    def acts(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.prompt or self.decoding or self.pruner.method.observes or self.earlier.parts)

    def _check(self, layer: int, chosen: list[Bypass]) -> None:
        """Several choices in one part of a layer go together if they choose among different tokens and leave the same keys."""
        for part in ("attn", "mlp"):
            same = [bypass for bypass in chosen if bypass.part in (part, "block")]
            sets = [bypass.tokens for bypass in same]
            if len(same) > 1 and ("all" in sets or len(set(sets)) < len(sets) or len({bypass.kv for bypass in same}) > 1):
                raise OptionError(
                    f"{self.pruner.method.name} chooses twice which rows run through the {part} of layer {layer}: among {' and '.join(sets)} tokens, with kv "
                    f"{' and '.join(bypass.kv for bypass in same)}. Two choices go together for visual and text tokens with the same kv."
                )

    def attach(self, hooks: HookSet) -> None:
        """Wrap the parts of the layers that are bypassed."""
        for number in sorted({*self.prompt, *self.decoding}):
            parts = {bypass.part for bypass in (*self.prompt.get(number, []), *self.decoding.get(number, []))}
            layer: Any = self.layers[number]
            if parts & {"attn", "block"}:
                hooks.wrap(attention_of(layer), "forward", self._around_attention(number, attention_of(layer)))
            if parts & {"mlp", "block"}:
                hooks.wrap(layer.mlp, "forward", self._around_mlp(number))
            for bypass in self.prompt.get(number, []):
                if bypass.weigh is not None:
                    hooks.wrap(layer, "forward", self._weighing(bypass))
        self.earlier.attach(hooks)
        for observe in self.pruner.method.observes:
            self._attach_observe(hooks, observe)

    # prompts

    def _weighing(self, bypass: Bypass) -> Callable[..., Any]:
        """What a block adds to the rows that a budget chose, scaled."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden, session = args[0] if args else kwargs["hidden_states"], self.pruner.session
            output = original(*args, **kwargs)
            picked = None if session is None else session.memo.get(("picked", id(bypass)))
            if session is None or picked is None:
                return output
            assert bypass.weigh is not None
            chosen, weights = (picked[0] & session.mask_of(bypass.tokens))[..., None], bypass.weigh(hidden)[..., None]
            return _first(output, lambda out: torch.where(chosen, hidden + weights.to(out.dtype) * (out - hidden), out))

        return forward

    def choose(self, session: Session, number: int, hidden: Tensor, collect: Collect) -> Rows | None:
        """Which rows run through the attention (and MLP, of a whole block) of a layer, by budgets; noted for the MLP."""
        return self._picked(session, number, [b for b in self.prompt.get(number, []) if b.budget is not None and b.part != "mlp"], hidden, collect)

    def chooses_attention(self, number: int) -> bool:
        """Whether the attention of a layer may run on some rows alone."""
        return any(bypass.budget is not None and bypass.part != "mlp" for bypass in self.prompt.get(number, []))

    def _picked(self, session: Session, number: int, bypasses: list[Bypass], states: Tensor, collect: Collect) -> Rows | None:
        found: dict[str, Rows | None] = {"attn": None, "mlp": None}
        for part in found:
            mask, lost = None, [0] * session.layout.num_rows
            for bypass in bypasses:
                if bypass.part not in (part, "block"):
                    continue
                key = ("picked", id(bypass))
                if key not in session.memo:
                    session.memo[key] = session.pick(bypass, states, collect)
                picked = session.memo[key]
                if picked is not None:
                    mask = picked[0] if mask is None else mask & picked[0]
                    lost = [before + length - now for before, length, now in zip(lost, session.lengths, picked[1], strict=True)]
            if mask is not None:
                kv = next(bypass.kv for bypass in bypasses if bypass.part in (part, "block"))
                counts = [length - gone for length, gone in zip(session.lengths, lost, strict=True)]
                # nothing runs in no row: one row of filler keeps the shapes usual
                found[part] = Rows.of(mask, counts, kv) if max(counts) else Rows(mask, kv)
            if any(bypass.part in (part, "block") for bypass in bypasses):
                session.memo["rows", number, part] = found[part]
                self._note(session, number, part, found[part])
        return found["attn"]

    @staticmethod
    def _note(session: Session, number: int, part: str, rows: Rows | None) -> None:
        """For the report."""
        if rows is None or rows.counts is None:
            return
        trace = session.trace
        (trace.queries if part == "attn" else trace.mlp_rows)[number] = [max(rows.counts)] * len(rows.counts)
        if part == "attn" and rows.kv == "active_only":
            trace.keys[number] = [max(rows.counts)] * len(rows.counts)
        trace.ran[number, part] = on_original_places(session, rows.mask)

    def masks(self, session: Session, number: int) -> list[tuple[Bypass, Tensor]]:
        """Bypasses of a layer that are given as masks, with the rows that run; noted for the parts."""
        found = []
        for bypass in self.prompt.get(number, []):
            if bypass.rows is not None:
                found.append((bypass, bypass.rows(session.mask_of(bypass.tokens))))
        for part in ("attn", "mlp"):
            masks = [mask for bypass, mask in found if bypass.part in (part, "block")]
            if masks:
                session.memo["masked", number, part] = torch.stack(masks).all(dim=0)
                session.trace.ran[number, part] = on_original_places(session, session.memo["masked", number, part])
        return found

    def _around_attention(self, number: int, attn: nn.Module) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            args, session = args[1:], self.pruner.session
            if session is None:
                return self._decode_attention(number, attn, original, hidden, args, kwargs)
            rows: Rows | None = session.memo.get(("rows", number, "attn"))
            mask = session.memo.get(("masked", number, "attn"))
            copies = any(bypass.kv == "copy_prev_layer" for bypass in self.prompt.get(number, []) if bypass.rows is not None and bypass.part != "mlp")
            if rows is None or rows.index is None:
                runs = mask if rows is None else rows.mask if mask is None else rows.mask & mask
                if runs is not None and (copies or (rows is not None and rows.kv == "copy_prev_layer")):
                    kwargs["past_key_values"] = self._copying(number, kwargs.get("past_key_values"), runs)
                output = original(hidden, *args, **kwargs)
                return output if runs is None else _first(output, lambda out: _only(out, runs))
            if rows.kv != "active_only":
                kwargs["past_key_values"] = self._filling(number, attn, hidden, rows, kwargs.get("past_key_values"))
            output = original(rows.take(hidden), *args, **kwargs)
            output = _first(output, lambda out: rows.put(out, hidden.shape[1]))
            return output if mask is None else _first(output, lambda out: _only(out, mask))

        return forward

    def _filling(self, number: int, attn: nn.Module, hidden: Tensor, rows: Rows, cache: Any) -> Filled:
        if number in self.earlier.parts:
            return self.earlier.given(number, cache, rows.rotary)  # type: ignore[no-any-return]

        def fill(keys: Tensor, values: Tensor) -> KeysValues:
            own = project_keys_values(attn, hidden, rows.rotary)
            if rows.kv != "copy_prev_layer":
                return own
            return mixed(rows.mask, own, last_keys_values(_layer_of(cache, number - 1), hidden.shape[1], number - 1))

        return Filled(cache, fill)

    @staticmethod
    def _copying(number: int, cache: Any, runs: Tensor) -> Filled:
        return Filled(cache, lambda keys, values: mixed(runs, (keys, values), last_keys_values(_layer_of(cache, number - 1), keys.shape[2], number - 1)))

    def _around_mlp(self, number: int) -> Callable[..., Any]:
        alone = [bypass for bypass in self.prompt.get(number, []) if bypass.budget is not None and bypass.part == "mlp"]

        def forward(original: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> Any:
            session = self.pruner.session
            if session is None:
                return self._decode_mlp(number, original, states, args, kwargs)
            if alone:
                self._picked(session, number, [*alone, *self._blocks(number)], states, session.memo["collect", number])
            rows: Rows | None = session.memo.get(("rows", number, "mlp"))
            mask = session.memo.get(("masked", number, "mlp"))
            if rows is not None and rows.index is not None:
                output = _first(original(rows.take(states), *args, **kwargs), lambda out: rows.put(out, states.shape[1]))
            elif rows is not None and mask is None:                      # nobody runs
                return torch.zeros_like(states)
            else:
                output = original(states, *args, **kwargs)
                output = output if rows is None else _first(output, lambda out: _only(out, rows.mask))
            return output if mask is None else _first(output, lambda out: _only(out, mask))

        return forward

    def _blocks(self, number: int) -> list[Bypass]:
        return [bypass for bypass in self.prompt.get(number, []) if bypass.budget is not None and bypass.part == "block"]

    # decoding

    def before_step(self, number: int, hidden: Tensor) -> None:
        """A decoding step reaches a layer: decide about its attention, or the whole of it."""
        state = self.pruner.generation
        if state is None or state.phase != "decode":
            return
        for bypass in self.decoding.get(number, []):
            if bypass.part != "mlp":
                self._decide(bypass, hidden, state)

    def _decide(self, bypass: Bypass, states: Tensor, state: GenerationState) -> None:
        batch = states.shape[0]
        said = False if bypass.decode is None else bypass.decode(Step(bypass.layer, bypass.part, states, state))
        runs = [said] * batch if isinstance(said, bool) else [bool(part) for part in said]
        if len(runs) != batch:
            raise OptionError(f"{self.pruner.method.name} says of {len(runs)} rows whether they run in layer {bypass.layer}; the batch has {batch}")
        for part in ("attn", "mlp") if bypass.part == "block" else (bypass.part,):
            before = state.scratch.get((part, bypass.layer), [True] * batch)
            now = [a and b for a, b in zip(before, runs, strict=True)]
            state.scratch[part, bypass.layer] = now
            if state.trace is not None:
                skipped = state.trace.decode_skipped
                skipped[bypass.layer, part] = skipped.get((bypass.layer, part), 0.0) + (sum(before) - sum(now)) / batch

    def _running(self, number: int, part: str) -> list[bool] | None:
        """Rows whose new token runs; ``None``: all."""
        state = self.pruner.generation
        runs = None if state is None or state.phase != "decode" else state.scratch.get((part, number))
        return None if runs is None or all(runs) else runs

    def _decode_attention(self, number: int, attn: nn.Module, original: Callable[..., Any], hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        runs = self._running(number, "attn")
        if runs is None:
            return original(hidden, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        entry = _layer_of(cache, number)
        kv = next(bypass.kv for bypass in self.decoding[number] if bypass.part != "mlp")
        if any(runs):
            if kv == "active_only":
                raise UnsupportedCallError(
                    f"{self.pruner.method.name} lets some rows of a batch skip the attention of layer {number} and leave no keys, so the rows would differ in "
                    "length. Let all rows skip or none, or choose kv='project_only'."
                )
            mask = torch.tensor(runs).to(hidden.device)[:, None].expand(-1, hidden.shape[1])
            if kv == "copy_prev_layer":
                kwargs["past_key_values"] = self._copying(number, cache, mask)
            return _first(original(hidden, *args, **kwargs), lambda out: _only(out, mask))
        if kv == "active_only":
            if isinstance(entry, PrunedLayer):
                entry.skip(hidden)
        elif cache is not None:
            fill_layer(cache, self.layers, number, hidden, kwargs.get("position_embeddings"), kv)
        return torch.zeros_like(hidden), None

    def _decode_mlp(self, number: int, original: Callable[..., Any], states: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        state = self.pruner.generation
        if state is not None and state.phase == "decode":
            for bypass in self.decoding.get(number, []):
                if bypass.part == "mlp":
                    self._decide(bypass, states, state)
        runs = self._running(number, "mlp")
        if runs is None:
            return original(states, *args, **kwargs)
        if not any(runs):
            return torch.zeros_like(states)
        index = torch.tensor([row for row, run in enumerate(runs) if run]).to(states.device)
        return _first(original(states[index], *args, **kwargs), lambda out: states.new_zeros(states.shape).index_copy(0, index, out))

    def _attach_observe(self, hooks: HookSet, observe: Observe) -> None:
        layer: Any = self.layers[observe.layer]
        norm = getattr(layer, "pre_feedforward_layernorm", None) or getattr(layer, "post_attention_layernorm", None)
        if norm is None:
            raise UnsupportedPointError(
                f"{self.pruner.method.name} looks at the MLP of layer {observe.layer}; looked for post_attention_layernorm in {type(layer).__name__}"
            )

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            state = self.pruner.generation
            if state is not None and state.phase == "decode":
                state.scratch["residual", observe.layer] = args[0] if args else kwargs["hidden_states"]

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            state = self.pruner.generation
            residual = None if state is None else state.scratch.pop(("residual", observe.layer), None)
            if state is None or residual is None:
                return
            runs = self._running(observe.layer, "mlp")
            if runs is None or any(runs):
                states = output[0] if isinstance(output, tuple) else output
                with torch.no_grad(), self.pruner.timed():
                    observe.see(Step(observe.layer, "mlp", residual, state, states, None if runs is None else tuple(runs)))

        hooks.before(norm, before)
        hooks.after(layer, after)


def check_copies(layers: list[nn.Module], pruner: Pruner) -> None:
    """Keys can be copied from the layer below where both rotate them alike."""
    method = pruner.method
    skips: tuple[Any, ...] = (*method.bypasses, *method.layer_skips)
    for part in skips:
        if part.kv != "copy_prev_layer":
            continue
        below = [other for other in skips if other.layer == part.layer - 1 and other.kv == "active_only"]
        moves = [stage for stage in method.stages if stage.point.tower == "decoder" and part.layer in (stage.point.layer, stage.restore)]
        if any(getattr(other, "part", "block") != "mlp" for other in below) or moves:
            raise UnsupportedPointError(
                f"{method.name} copies keys from layer {part.layer - 1} to layer {part.layer}, but the two do not hold the same tokens: the lower one leaves "
                "some out, or tokens leave or return between them. Choose kv='project_only'."
            )
        config: Any = getattr(attention_of(layers[part.layer]), "config", None)
        types, rope = getattr(config, "layer_types", None) or [], getattr(config, "rope_parameters", None) or {}
        if any(kind in rope for kind in types) and types[part.layer] != types[part.layer - 1]:
            raise UnsupportedPointError(
                f"{pruner.method.name} copies keys from layer {part.layer - 1} to layer {part.layer}, and this decoder rotates them differently "
                f"({types[part.layer - 1]}, {types[part.layer]}). Choose kv='project_only'."
            )


def fill_layer(cache: Any, layers: list[nn.Module], number: int, states: Tensor, rotary: Any, kv: str) -> None:
    """Give a cache layer keys and values for tokens that do not run; ``states`` (B, L, D) are what its attention would have been given."""
    if kv == "copy_prev_layer":
        keys, values = last_keys_values(_layer_of(cache, number - 1), states.shape[1], number - 1)
    else:
        keys, values = project_keys_values(attention_of(layers[number]), states, rotary)
    cache.update(keys, values, number)


def on_original_places(session: Session, mask: Tensor) -> Tensor:
    """(B, L) bool by original position of a mask over the current entries; false where a token has left."""
    if session.index is None:
        return mask
    counts = mask if session.valid is None else mask & session.valid
    found = torch.zeros(session.layout.num_rows, session.layout.length, dtype=torch.uint8, device=mask.device)
    return found.scatter_add(1, session.index, counts.to(torch.uint8)) > 0


def _layer_of(cache: Any, number: int) -> Any:
    layers = getattr(cache, "layers", None)
    return layers[number] if layers and 0 <= number < len(layers) else None


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _only(out: Tensor, runs: Tensor) -> Tensor:
    return torch.where(runs.to(out.device)[..., None], out, torch.zeros((), dtype=out.dtype, device=out.device))  # residual + 0 is the residual
