"""The parts of a vision block that matter inside it: the norm in front of the MLP, and the last module before the MLP's output is added.

What the norm gets is the state between attention and MLP; what the last module returns is added to it. Nobody's forward has to be replaced to get
between the two: hooks on these modules are enough.
"""

from __future__ import annotations

from torch import nn

NORMS, SCALES = ("norm2", "layernorm_after", "layer_norm2", "ln_2"), ("ls2", "ls_2")
BEHIND = ("drop_path2", "dropout")                                       # of timm, and of ViT in transformers, which has one module for both branches
NORM_BEHIND = ("ResPostBlock",)                                          # of timm: the second norm follows the MLP


def mlp_parts(block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norm in front of a block's MLP, and the last module that works token by token: the MLP, or a scale behind it."""
    norm = _first(block, NORMS)
    mlp = getattr(block, "mlp", None)
    if norm is None or not isinstance(mlp, nn.Module) or type(block).__name__ in NORM_BEHIND:
        return None
    return norm, _first(block, SCALES) or mlp


def mlp_bounds(block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norm, and the very last module before the sum. A last module that the attention's branch runs through, too, does so before the norm."""
    parts = mlp_parts(block)
    return None if parts is None else (parts[0], _first(block, BEHIND) or parts[1])


def _first(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((module for name in names if isinstance(module := getattr(block, name, None), nn.Module)), None)
