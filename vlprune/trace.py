"""What stayed, where: recorded on the device during the forward pass, read only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlprune.tokens import TokenLayout, VisualItem


@dataclass
class PointRecord:
    """One pruning point of one forward pass.

    Attributes:
        point: ``"vision:3"``, ``"before_llm"`` or ``"llm:2"``.
        method: name of the method.
        visual_before: visual tokens of the whole batch that reached the point.
        items, kept, roles: per visual item: the item, which of its tokens stay, and their roles.
        role_names: what the roles are called.
        columns: inside a tower that sees a video: (frames, S) what each frame sees from this point on. key_bias: (frames, S) what was added to the
            logits onto them in the block before; ``None`` where nothing was.
    """

    point: str
    method: str
    visual_before: int
    items: list[VisualItem] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    roles: list[Tensor | None] = field(default_factory=list)
    role_names: tuple[str, ...] = ("kept",)
    num_rows: int = 0
    columns: Tensor | None = None
    key_bias: Tensor | None = None

    def add(self, item: VisualItem, kept: Tensor, roles: Tensor | None, role_names: tuple[str, ...]) -> None:
        """Note what stayed of one item."""
        self.items.append(item)
        self.kept.append(kept)
        self.roles.append(roles)
        if len(role_names) > len(self.role_names):
            self.role_names = role_names

    @property
    def visual_kept(self) -> int:
        """Visual tokens of the whole batch that stay."""
        return sum(int(kept.numel()) for kept in self.kept)

    @property
    def keep_indices(self) -> list[Tensor]:
        """For each row of the batch one int64 tensor that numbers that row's visual tokens 0..N-1 in reading order."""
        rows: list[list[tuple[VisualItem, Tensor]]] = [[] for _ in range(self.num_rows)]
        for item, kept in zip(self.items, self.kept, strict=True):
            rows[item.row].append((item, kept.cpu()))
        result = []
        for entries in rows:
            if not entries:
                result.append(torch.empty(0, dtype=torch.int64))
                continue
            places = torch.cat([item.positions for item, _ in entries]).sort().values
            stay = torch.cat([item.positions[kept] for item, kept in entries]).sort().values
            result.append(torch.searchsorted(places, stay))
        return result


@dataclass
class Trace:
    """Everything one prefill call did.

    Attributes:
        points: a record for each pruning point, in the order passed.
        layout: where the visual tokens were.
        decoder_lengths: (layers, rows) tokens that each decoder layer ran on, as nested lists; past tokens not counted.
        past_length: keys that were in the cache before this call.
        vision_tokens: (layers) tokens that each vision block ran on, summed over the batch.
        vision_sequences: how many pictures these were. vision_dense: tokens that a block runs on when nothing is dropped inside the tower
            (0: the same as in ``vision_tokens``), summed over the batch.
        mlp_skipped: by vision block, tokens that did not run through its MLP, summed over the batch.
        shapes: widths and depths of the model, for the FLOPs count.
        scorer_flops: matrix-product FLOPs spent on scoring.
    """

    points: list[PointRecord] = field(default_factory=list)
    layout: TokenLayout | None = None
    decoder_lengths: list[list[int]] = field(default_factory=list)
    past_length: int = 0
    vision_tokens: list[int] = field(default_factory=list)
    vision_sequences: int = 0
    vision_dense: int = 0
    mlp_skipped: dict[int, int] = field(default_factory=dict)
    shapes: dict[str, object] = field(default_factory=dict)
    scorer_flops: float = 0.0
    kv_element_bytes: int = 2
