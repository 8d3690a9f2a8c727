"""Layers that run at a position must have run at every earlier one, where skipped layers leave no keys: checked before a method is put on."""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.errors import OptionError
from vlprune.method import LayerSkip

#: Prompt lengths for which a schedule by position is looked at.
PROMPTS = (1, 16, 512)


def check_nesting(name: str, skips: Sequence[LayerSkip]) -> None:
    """Raise an error if a layer that keeps no keys of what skips it runs again after it was skipped.

    Args:
        name: of the method.
        skips: of the method. Each is looked at for a prompt and ``horizon`` decoding steps, after prompts of several lengths.
    """
    for skip in skips:
        if skip.kv != "active_only":
            continue
        for prompt in PROMPTS:
            skipped = None if skip.run("prefill", 0, 0) else "the prompt"
            for step in range(skip.horizon):
                runs = skip.run("decode", step, prompt + step)
                if runs and skipped is not None:
                    raise OptionError(
                        f"{name}: layer {skip.layer} runs at decoding step {step} after {skipped} skipped it (prompt of {prompt} tokens) and left no keys. "
                        "Let the layers that run at a position be among those that ran at earlier ones, or choose kv='project_only' or 'copy_prev_layer'."
                    )
                if not runs and skipped is None:
                    skipped = f"step {step}"
