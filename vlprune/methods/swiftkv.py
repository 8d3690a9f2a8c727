"""SwiftKV: the prompt stops halfway up; the upper layers' keys and values are made of what the last layer it ran gives, and only its last token goes on.

Reference: "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation", arXiv:2410.03960. Official code:
https://github.com/snowflakedb/ArcticTraining (projects/swiftkv), https://github.com/snowflakedb/ArcticInference

Convention: ``keep`` is the share of layers that the prompt runs (the paper's 50 % setting: 0.5), so layers from ``start = keep * depth`` on run for the
last token of each row and for decoded tokens alone. With ``weights`` (the paper's method), keys and values of all those layers are projections of one
norm of the state at the input of layer ``start``, for every token, decoded ones too, and queries have projections of their own. The weights are
distilled: ``examples/train_swiftkv.py``, which starts from the model's own (`vlprune.skipping.early_keys.EarlyKeys.of`). ``group`` consecutive layers may
share keys and values (AcrossKV); it comes with the weights, and the cache of such a group is one layer's.

- Without ``weights``: the layers' own norms and projections of the same state for the prompt, and everything as ever for tokens that run (the policy
  ``project_only``). Needs no training. On a small language model (``evals/results/swiftkv``) it costs less than weights distilled for a few minutes.
- ``everywhere=True``: with ``weights``, every token runs all layers, with those keys. It is what training looks at: each token as if it were the last of
  the prompt.

Differences:
- The released code trains in transformers without skipping, and skips in vLLM; here both are in transformers.
- Visual tokens are tokens of the prompt like others.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import Bypass, KeysFrom, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._schedules import num_layers
from vlprune.skipping.early_keys import EarlyKeys


def swiftkv(
    facts: ModelFacts, keep: Keep = 1 / 2, *, weights: str | os.PathLike[str] | nn.Module | None = None, everywhere: bool = False
) -> PruningMethod:
    """Stop the prompt at some layer and make the upper layers' keys of its state there.

    Args:
        facts: of the model.
        keep: share or number of layers that the prompt runs; with weights, what they were trained for.
        weights: a file of `EarlyKeys.save`, or such a module; ``None``: the model's own projections.
        everywhere: with weights, let every token run all layers, as training needs it.
    """
    depth = facts.decoder_layers
    net = given_weights(weights)
    if net is not None and net.depth != depth:
        raise OptionError(f"weights were made for {net.depth} layers, and this decoder has {depth}")
    start = num_layers(keep, depth)
    if everywhere and net is None:
        raise OptionError("everywhere=True trains the projections of weights; give some, such as EarlyKeys.of(decoder_layers(model), start)")
    if start == depth:
        return PruningMethod("swiftkv")
    if net is not None and net.start != start:
        raise OptionError(f"keep={keep!r} stops the prompt at layer {start} of {depth}, but the weights were made for layer {net.start}; give keep={net.start}")
    later = range(start, depth)
    rows = () if everywhere else tuple(Bypass(layer, "block", budget=Budget(0, allow_zero=True), kv="project_only", tokens="all") for layer in later)
    if net is None:
        return PruningMethod("swiftkv", bypasses=rows)
    keys: list[KeysFrom] = []
    for layer in later:
        project, query = net.calls(layer)
        keys.append(KeysFrom(layer, start, project, query, None if net.leader(layer) == layer else net.leader(layer)))
    return PruningMethod("swiftkv", bypasses=rows, keys_from=tuple(keys))


def given_weights(weights: Any) -> EarlyKeys | None:
    """From what the user gave."""
    if weights is None or isinstance(weights, EarlyKeys):
        return weights
    if not isinstance(weights, (str, os.PathLike)):
        raise OptionError(f"weights={type(weights).__name__}: the path of a .safetensors file, or vlprune.skipping.early_keys.EarlyKeys")
    return EarlyKeys.load(weights)


CARD = MethodCard(
    "swiftkv",
    swiftkv,
    "the prompt stops halfway; upper layers' keys come from its state there",
    paper="arXiv:2410.03960",
    code="https://github.com/snowflakedb/ArcticTraining",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=0.5,
)
