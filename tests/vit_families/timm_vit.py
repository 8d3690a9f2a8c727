"""Tiny vision transformers of timm, one for each way they are built and pooled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.tiny_vit import DEPTH, HEADS, PATCH, SIDE, WIDTH, TinyVit
from tests.torchvision_stub import why_not

TOWER: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5, "mlp_ratio": 2.0}


def mask(args: Any, kwargs: Any, bias: Tensor) -> tuple[Any, Any]:
    """Blocks take the mask by name."""
    return args, {**kwargs, "attn_mask": bias}


def run(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Logits, features, and maps of all blocks in both formats."""
    logits = model(pixels)
    features = model.forward_features(pixels)
    final, maps = model.forward_intermediates(pixels)
    listed = model.forward_intermediates(pixels, indices=[1, 2], output_fmt="NLC", intermediates_only=True, stop_early=True)
    again = model.forward_head(model.forward_features(pixels))
    found = {"logits": logits, "again": again, "from_final": model.forward_head(final)}
    if not model.global_pool:
        found = {f"tokens.{name}": value for name, value in found.items()}
    found.update({"tokens.last": features, "tokens.final": final})
    found.update({f"tokens.map.{number}": part.flatten(2).mT for number, part in enumerate(maps)})
    return {**found, "tokens.list.1": listed[0], "tokens.list.2": listed[1]}


def pool(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The head on the last tokens."""
    logits = model.forward_head(model.norm(tokens))
    return {"logits": logits, "again": logits, "from_final": logits}


def eager(model: nn.Module) -> None:
    """Attention without the fused kernel."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def families() -> tuple[TinyVit, ...]:
    """Towers of timm."""
    missing = why_not("timm")

    def vit(**options: Any) -> Any:
        def make() -> nn.Module:
            from timm.models.vision_transformer import VisionTransformer

            return VisionTransformer(**{**TOWER, **options})

        return make

    def distilled() -> nn.Module:
        from timm.models.deit import VisionTransformerDistilled

        return VisionTransformerDistilled(**TOWER)

    def parallel() -> nn.Module:
        from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

        return VisionTransformer(**TOWER, block_fn=ParallelScalingBlock)

    def family(name: str, make: Any, prefix: int, *, pooled: bool = False, **more: Any) -> TinyVit:
        return TinyVit(
            f"timm_{name}", make, run, lambda model: list(model.blocks), mask, prefix,  # type: ignore[arg-type]
            pool=pool if pooled else None, missing=missing, eager=eager, **more,
        )  # fmt: skip

    return (
        family("token", vit(), 1),
        family("avg", vit(global_pool="avg"), 1, pooled=True),
        family("avgmax", vit(global_pool="avgmax", class_token=False), 0, pooled=True),
        family("map", vit(global_pool="map", class_token=False), 0, pooled=True),
        family("registers", vit(global_pool="avg", reg_tokens=3, qk_norm=True, init_values=0.5, pre_norm=True, no_embed_class=True), 4, pooled=True),
        family("unpooled", vit(global_pool="", num_classes=0), 1),
        family("wide", vit(dynamic_img_size=True), 1, size=(SIDE, 32)),
        family("distilled", distilled, 2),
        family("parallel", parallel, 1, taps=False),
    )
