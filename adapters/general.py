"""Any other Hugging Face vision-language model, found by structure: a placeholder id, features that fill it, a decoder with layers.

An item is one entry of what the model's ``get_image_features`` returns, cut where text stands between its tokens: the whole picture
for most models, one tile for models that show tiles as pictures of their own (Idefics3, SmolVLM). Vision signals are not offered; decoder signals are.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters._experts import expert_layers
from vlprune.adapters._structure import decoder_in, has_multimodal_rope, missing_in, require
from vlprune.adapters._vlm import Features, VisionLanguageAdapter
from vlprune.method import ModelFacts
from vlprune.protocols import Tap
from vlprune.tokens import VisualItem, raster_grid, square_grid


class GeneralAdapter(VisionLanguageAdapter):
    """Found by structure, not by a list of names."""

    name = "general"
    priority = 100

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        require(model, self._missing())

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Anything with a config that mentions pictures."""
        config = getattr(model, "config", None)
        return any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index", "vision_config"))

    def _missing(self) -> list[str]:
        missing = []
        if not self.placeholders:
            missing.append("an image placeholder id (config.image_token_id)")
        if not hasattr(self.core, "get_image_features"):
            missing.append("get_image_features on the model or model.model")
        return [*missing, *missing_in(self._decoder)]

    @cached_property
    def _decoder(self) -> Any:
        return decoder_in((self.core, self.model))

    @property
    def decoder(self) -> nn.Module:
        """The stack of decoder layers."""
        return self._decoder  # type: ignore[no-any-return]

    @property
    def multimodal_rope(self) -> bool:
        """Whether the rotary ids have sections for time, height and width."""
        return has_multimodal_rope(self.decoder)

    @property
    def facts(self) -> ModelFacts:
        """The decoder; the tower is not looked into."""
        return ModelFacts(decoder_layers=self.decoder_depth, signals=self.offers_in_decoder, expert_layers=expert_layers(self.decoder))

    def default_method(self) -> tuple[str, float]:
        """A method that needs no vision signals."""
        return "todre", 1 / 3

    def features_of(self, modality: str, output: Any, arguments: dict[str, Any], signals: dict[Tap, Tensor]) -> Features:
        """Grids from ``*_grid_thw`` where the model is called with one, else squares."""
        found = super().features_of(modality, output, arguments, signals)
        shapes = arguments.get(f"{modality}_grid_thw")
        if isinstance(shapes, Tensor) and shapes.shape == (len(found.lengths), 3):
            merge = int(getattr(self.model.config.vision_config, "spatial_merge_size", 1))
            grids = [raster_grid(t, h // merge, w // merge) for t, h, w in shapes.tolist()]
            found.grids = [grid if grid.shape[0] == length else None for grid, length in zip(grids, found.lengths, strict=True)]
        return found

    def _items(self, modality: str, mask: Tensor, output: Any, found: Features) -> list[tuple[VisualItem, Features, int]]:
        """Pictures that text stands between are items of their own, also where the model encodes a row's pictures together."""
        items = super()._items(modality, mask, output, found)
        if modality != "image":
            return items
        split: list[tuple[VisualItem, Features, int]] = []
        for item, features, source in items:
            breaks = (torch.nonzero(item.positions.diff() > 1).flatten() + 1).tolist()
            runs = item.positions.tensor_split(breaks) if breaks else (item.positions,)
            for run in runs:
                grid = item.grid if len(runs) == 1 else square_grid(run.numel())
                split.append((VisualItem(item.row, run, modality, len(split), grid), features, source))
        return split


ADAPTERS = (GeneralAdapter,)

