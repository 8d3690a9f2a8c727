"""What calls of a model mean to a method that reduces text: which are prompts, and which ways of generating would cut a prompt at the wrong place."""

from __future__ import annotations

from typing import Any

from vlprune.errors import UnsupportedCallError
from vlprune.hooks import HookSet
from vlprune.pruner import Pruner


def cached_length(cache: Any) -> int:
    """Tokens in a cache, 0 where there is none."""
    return 0 if cache is None else int(cache.get_seq_length())


def is_prompt(length: int, cache: Any) -> bool:
    """Whether a call with ``length`` new tokens is a prompt (or a later turn's) rather than a decoding step."""
    return length > 1 or cached_length(cache) == 0


def refuse_pieces(hooks: HookSet, model: Any, pruner: Pruner) -> None:
    """Generation that sends candidates along, or prompts piece by piece, is an error while the method reduces text."""
    name = pruner.method.name

    def assistance(original: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedCallError(
            f"{name} reduces the text of prompts, and assisted (or prompt-lookup) generation sends candidate tokens in calls that look like prompts. "
            "Generate without assistance, or remove the pruning."
        )

    def prefill(original: Any, *args: Any, **kwargs: Any) -> Any:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        if getattr(config, "prefill_chunk_size", None) is not None:
            raise UnsupportedCallError(
                f"{name} chooses among all the text of a prompt, and chunked prefill shows it in pieces. Set generation_config.prefill_chunk_size=None."
            )
        return original(*args, **kwargs)

    for method, around in (("_get_candidate_generator", assistance), ("_prefill", prefill)):
        if hasattr(model, method):
            hooks.wrap(model, method, around)
