"""IMA skip: perceptual tokens pass by every second block (or its MLP, or its attention), since they change slowly.

Reference: "Skipping Computations in Multimodal LLMs", arXiv:2410.09454, after "Implicit Multimodal Alignment", arXiv:2405.16700. Program (no licence, read
for facts): https://github.com/mshukor/ima-lmms

Convention: a layer l is skipped when ``start < l < end`` and ``l % interval == 0``, both ends exclusive; the program's defaults are 0, 31 of 32 layers,
and 2. ``keep`` is the share of layers that run: ``interval = round(1 / (1 - keep))``, at least 1. Phases: ``"prefill"`` (its ``onlycontext``),
``"decode"`` (its default: generated tokens), ``"both"`` (``context``). What a skipped block leaves in the cache are the layer below's keys and values
(``kv="copy_prev_layer"``, as in the program); a skipped attention projects its own.

Differences:
- The program's phases skip for all tokens of a call; here prompts are skipped for ``tokens`` alone: visual ones where the model sees (its ``_prompt``
  variants), else text without the last token.
- A skipped MLP leaves the residual as it is; the program's ``skip_ffn_prompt`` adds the normed residual, and its ``skip_attn`` feeds the MLP the input of
  the attention and stores unprojected states as keys, which fits neither grouped heads nor other head widths. These quirks are not carried over, nor are
  its parallel blocks, its unimodal attention mask and its pruned weights.
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import PARTS, PHASES, Bypass, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._schedules import given_count, num_layers
from vlprune.points import Depth

END = Depth(31, of=32)


def eligible_layers(depth: int, start: int = 0, end: int | None = None, interval: int = 2) -> tuple[int, ...]:
    """Layers between ``start`` and ``end``, both exclusive, whose number is a multiple of ``interval``."""
    stop = END.resolve(depth) if end is None else end
    return tuple(layer for layer in range(max(start + 1, 1), min(stop, depth)) if layer % interval == 0)


def ima_skip(
    facts: ModelFacts,
    keep: Keep = 1 / 2,
    *,
    part: str = "block",
    phase: str = "prefill",
    start: int = 0,
    end: int | None = None,
    interval: int | None = None,
    tokens: str | None = None,
    kv: str | None = None,
) -> PruningMethod:
    """Let some tokens pass by a part of every ``interval``-th layer.

    Args:
        facts: of the model.
        keep: share or number of layers that these tokens run; sets ``interval``.
        part: ``"block"``, ``"mlp"`` or ``"attn"``.
        phase: ``"prefill"``, ``"decode"`` or ``"both"``.
        start: layer, exclusive, behind which layers are skipped.
        end: layer, exclusive, up to which they are; 31 of 32 if not given.
        interval: every how many layers one is skipped.
        tokens: ``"visual"``, ``"text"`` or ``"all"``; visual ones where the model sees, else text.
        kv: what they leave in a skipped layer's cache; ``"copy_prev_layer"`` for blocks, ``"project_only"`` for attention.
    """
    depth = facts.decoder_layers
    for name, given, known in (("part", part, PARTS), ("phase", phase, PHASES)):
        if given not in known:
            raise OptionError(f"{name}={given!r}: one of {', '.join(map(repr, known))}")
    given_count("start", start, 0, "the layer behind which skipping starts")
    runs = num_layers(keep, depth)
    if interval is None:
        interval = 0 if runs == depth else max(1, round(depth / (depth - runs)))
    elif given_count("interval", interval, 1, "every how many layers one is skipped") and runs == depth:
        interval = 0                                                     # keep=1.0 changes nothing
    kv = kv or ("copy_prev_layer" if part == "block" else "project_only" if part == "attn" else "full")
    layers = eligible_layers(depth, start, end, interval) if interval else ()
    chosen = tokens or facts.own_set
    bypasses = tuple(Bypass(layer, part, budget=Budget(0, allow_zero=True), kv=kv, tokens=chosen, phase=phase) for layer in layers)
    return PruningMethod("ima_skip", bypasses=bypasses)


CARD = MethodCard(
    "ima_skip",
    ima_skip,
    "visual (or text) tokens pass by every second block, MLP or attention",
    paper="arXiv:2410.09454",
    code="https://github.com/mshukor/ima-lmms",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=0.5,
    test_options={"kv": "project_only"},
)
