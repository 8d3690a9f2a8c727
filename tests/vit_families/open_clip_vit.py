"""Tiny models of open_clip: its own vision transformer in all its poolings, and a timm tower inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.tiny_vit import DEPTH, HEADS, PATCH, SIDE, WIDTH, TinyVit
from tests.torchvision_stub import why_not

VISION: dict[str, Any] = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "mlp_ratio": 2.0, "patch_size": PATCH, "image_size": SIDE}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}


def mask(args: Any, kwargs: Any, bias: Tensor) -> tuple[Any, Any]:
    """(B * H, L, L), by name."""
    return args, {**kwargs, "attn_mask": bias.expand(-1, HEADS, -1, -1).flatten(0, 1)}


def timm_mask(args: Any, kwargs: Any, bias: Tensor) -> tuple[Any, Any]:
    """Blocks of timm."""
    return args, {**kwargs, "attn_mask": bias}


def run(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Image features and maps of all blocks."""
    out = model.forward_intermediates(pixels, image_output_fmt="NCHW", normalize=False)
    some = model.visual.forward_intermediates(pixels, indices=[1], stop_early=True, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True)
    found = {"features": model.encode_image(pixels), "again": out["image_features"], "tokens.list.1": some["image_intermediates"][0]}
    found.update({f"tokens.map.{number}": part.flatten(2).mT for number, part in enumerate(out["image_intermediates"])})
    if "image_intermediates_prefix" in some:
        found["cls.1"] = some["image_intermediates_prefix"][0]
    return found


def run_tokens(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """A tower alone that returns its patch tokens besides."""
    pooled, tokens = model(pixels)
    return {"features": pooled, "tokens.last": tokens}


def run_queries(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """A tower alone that returns what its queries pooled besides."""
    pooled, queries = model(pixels)
    return {"features": pooled, "queries": queries}


def families() -> tuple[TinyVit, ...]:
    """Models of open_clip."""
    missing = why_not("open_clip")

    def clip(name: str = "CLIP", **options: Any) -> Any:
        def make() -> nn.Module:
            import open_clip

            return getattr(open_clip, name)(16, {**VISION, **options}, TEXT)

        return make

    def tower(**options: Any) -> Any:
        def make() -> nn.Module:
            from open_clip.transformer import VisionTransformer

            return VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, 2.0, output_dim=WIDTH, output_tokens=True, **options)

        return make

    def sequence_first() -> nn.Module:
        from open_clip.transformer import Transformer

        model = clip()()
        model.visual.transformer = Transformer(WIDTH, DEPTH, HEADS, 2.0, batch_first=False)  # type: ignore[union-attr]
        return model

    def blocks(model: Any) -> list[nn.Module]:
        return list(getattr(model, "visual", model).transformer.resblocks)

    def avg_pool(model: Any, tokens: Tensor) -> dict[str, Tensor]:
        visual = getattr(model, "visual", model)
        pooled, queries = visual._pool(tokens)
        return {"features": pooled @ visual.proj, "again": pooled @ visual.proj, "queries": queries}

    def family(name: str, make: Any, **more: Any) -> TinyVit:
        parts = {"run": run, "blocks": blocks, "mask": mask, "prefix": 1, **more}
        return TinyVit(f"open_clip_{name}", make, missing=missing, **parts)

    def siglip() -> nn.Module:
        import open_clip
        from timm.models.vision_transformer import VisionTransformer

        model = clip("CustomTextCLIP")()
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0, "num_classes": 0}
        trunk = VisionTransformer(SIDE, PATCH, global_pool="map", class_token=False, **sizes)
        wrapper = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
        nn.Module.__init__(wrapper)
        wrapper.trunk, wrapper.head, wrapper.image_size = trunk, nn.Linear(WIDTH, 16), (SIDE, SIDE)
        model.visual = wrapper
        return model

    def trunk_pool(model: Any, tokens: Tensor) -> dict[str, Tensor]:
        pooled = model.visual.head(model.visual.trunk.forward_head(model.visual.trunk.norm(tokens)))
        return {"features": pooled, "again": pooled}

    return (
        family("clip", clip()),
        family("custom_text", clip("CustomTextCLIP", ls_init_value=0.5)),
        family("sequence_first", sequence_first, sequence_first=True),
        family("qk_norm", clip(qk_norm=True, scale_attn=True)),
        family("avg", clip(pool_type="avg"), pool=avg_pool),
        family("avg_ln_after", clip(pool_type="avg", final_ln_after_pool=True), pool=avg_pool),
        family("attn_pool", clip(attentional_pool=True, attn_pooler_queries=36, attn_pooler_heads=4), pool=avg_pool),
        family("parallel_pool", tower(attentional_pool="parallel", attn_pooler_queries=37, attn_pooler_heads=4), run=run_queries, pool=avg_pool),
        family("cascade_pool", tower(attentional_pool="cascade", attn_pooler_queries=37, attn_pooler_heads=4), run=run_queries, pool=avg_pool),
        family("tokens", tower(pool_type="avg"), run=run_tokens, pool=avg_pool),
        family("timm", siglip, mask=timm_mask, blocks=lambda model: list(model.visual.trunk.blocks), prefix=0, pool=trunk_pool),
    )
