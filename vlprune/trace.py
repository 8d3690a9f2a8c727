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
        visual_before: tokens of the set (visual ones, see ``tokens``) of the whole batch that reached the point.
        items, kept, roles: per visual item: the item, which of its tokens stay, and their roles.
        role_names: what the roles are called.
        columns: inside a tower that sees a video: (frames, S) what each frame sees from this point on. key_bias: (frames, S) what was added to the
            logits onto them in the block before; ``None`` where nothing was.
        tokens: which set was chosen from: ``"visual"``, ``"text"`` or ``"all"``. Of the last two, an item is a row, and tokens that always stay
            (`VisualItem.protected`) count in ``visual_before`` and ``visual_kept`` but are not among ``kept``.
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
    tokens: str = "visual"

    def add(self, item: VisualItem, kept: Tensor, roles: Tensor | None, role_names: tuple[str, ...]) -> None:
        """Note what stayed of one item."""
        self.items.append(item)
        self.kept.append(kept)
        self.roles.append(roles)
        if len(role_names) > len(self.role_names):
            self.role_names = role_names

    @property
    def visual_kept(self) -> int:
        """Tokens of the set, in the whole batch, that stay."""
        return sum(int(kept.numel()) for kept in self.kept) + sum(item.protected for item in self.items)

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


@dataclass(frozen=True)
class HeadRecord:
    """What the heads of one layer asked with in a prompt.

    Attributes:
        point: ``"llm:3.heads"``. method: name of the method. tokens: the set that was chosen from.
        before, kept: real tokens of the whole batch that were there, and that each head kept (tokens outside the set count in both).
    """

    point: str
    method: str
    tokens: str
    before: int
    kept: int


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
        bypasses: a record for each choice of rows that run through a part of a layer (`vlprune.method.Bypass`), point ``"llm:3.attn"`` or so.
        queries, mlp_rows, keys: by decoder layer, for each row of the batch, tokens that asked in attention, that ran through the MLP, and that left keys,
            where these are fewer than ``decoder_lengths`` says.
        decode_steps: decoding steps that followed, as far as they were counted. decode_skipped: by layer and part, how often its row of the batch was
            skipped in them, as a share summed over the steps.
        shared_kv: decoder layers whose cache is that of a lower one.
        experts: by decoder layer in which experts were chosen among: pairs of token and expert that ran, that the router chose, and the FLOPs of one.
            decode_experts: the first two in the decoding steps that followed, all layers together.
        pairs: by decoder layer whose heads chose, for each row of the batch, query-key pairs of a head (mean over heads).
        heads: a record for each such layer, point ``"llm:3.heads"``: how many tokens each head asked with.
        decode_keys: keys that heads looked at in decoding steps, and keys that were there; summed over the layers that chose, heads and steps.
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
    bypasses: list[PointRecord] = field(default_factory=list)
    queries: dict[int, list[int]] = field(default_factory=dict)
    mlp_rows: dict[int, list[int]] = field(default_factory=dict)
    keys: dict[int, list[int]] = field(default_factory=dict)
    ran: dict[tuple[int, str], Tensor] = field(default_factory=dict)      # (layer, "attn" or "mlp") -> (B, L) bool by original position
    decode_steps: int = 0
    decode_skipped: dict[tuple[int, str], float] = field(default_factory=dict)
    shared_kv: set[int] = field(default_factory=set)
    experts: dict[int, tuple[int, int, float]] = field(default_factory=dict)
    decode_experts: tuple[int, int] = (0, 0)
    pairs: dict[int, list[float]] = field(default_factory=dict)
    heads: list[HeadRecord] = field(default_factory=list)
    decode_keys: list[float] = field(default_factory=lambda: [0.0, 0.0])
