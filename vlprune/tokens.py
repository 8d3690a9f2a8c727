"""Which positions of a prompt are visual tokens, and to which image or video they belong. Host side, no device reads.

Three sets of tokens can be reduced: ``"visual"``, item by item; ``"text"``, what is neither visual nor padding, row by row; ``"all"``, both together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TOKEN_SETS = ("visual", "text", "all")


@dataclass(frozen=True)
class VisualItem:
    """One image or one whole video in one row of the batch; or the text (or everything) of one row.

    Attributes:
        row: row of the batch.
        positions: (N,) int64 on the CPU, ascending: places of its tokens in that row.
        modality: ``"image"`` or ``"video"``; ``"text"`` or ``"all"`` for a row.
        index: how many items of the same modality precede it in the call (reading order over rows).
        grid: (N, 3) int64 on the CPU or ``None``: frame (or tile), row and column of each token. Separator tokens
            (newlines) have row and column -1.
        protected: text only: tokens of the row that count with these but always stay, and are not among ``positions`` (`TokenLayout.token_rows`).
    """

    row: int
    positions: Tensor
    modality: str = "image"
    index: int = 0
    grid: Tensor | None = None
    protected: int = 0

    @property
    def num_tokens(self) -> int:
        """N, before any reduction."""
        return int(self.positions.numel())

    @property
    def is_visual(self) -> bool:
        """Whether it is an image or a video, not the text (or everything) of a row."""
        return self.modality in ("image", "video")

    @property
    def num_frames(self) -> int:
        """Frames of a video; 1 for an image or where no grid is known."""
        return 1 if self.grid is None or self.modality != "video" else int(self.grid[:, 0].max()) + 1


@dataclass
class TokenLayout:
    """Where everything is in one prefill call: B rows of L positions.

    Attributes:
        num_rows, length: B and L.
        items: visual items in reading order, row by row.
        valid: (B, L) bool on the CPU; ``False`` on padding.
    """

    num_rows: int
    length: int
    items: list[VisualItem] = field(default_factory=list)
    valid: Tensor | None = None

    def visual_mask(self) -> Tensor:
        """(B, L) bool: positions that hold a visual token."""
        mask = torch.zeros(self.num_rows, self.length, dtype=torch.bool)
        for item in self.items:
            mask[item.row, item.positions] = True
        return mask

    def valid_mask(self) -> Tensor:
        """(B, L) bool: positions that are not padding."""
        if self.valid is None:
            return torch.ones(self.num_rows, self.length, dtype=torch.bool)
        return self.valid

    def set_mask(self, tokens: str) -> Tensor:
        """(B, L) bool: positions of a set of tokens, protected ones included, padding never."""
        if tokens == "visual":
            return self.visual_mask()
        return self.valid_mask() & ~self.visual_mask() if tokens == "text" else self.valid_mask().clone()

    def token_rows(self, tokens: str, protect: tuple[int, int] = (1, 1)) -> list[VisualItem]:
        """One item a row of its ``"text"`` or ``"all"`` tokens, without the first and last text tokens, which always stay (``protect``: how many)."""
        text, mask, found = self.set_mask("text"), self.set_mask(tokens), []
        for row in range(self.num_rows):
            places = torch.nonzero(text[row]).flatten()
            first, last = min(protect[0], places.numel()), max(min(protect[0], places.numel()), places.numel() - protect[1])
            stays = torch.cat([places[:first], places[last:]])
            mask[row, stays] = False
            positions = torch.nonzero(mask[row]).flatten()
            if positions.numel():
                found.append(VisualItem(row, positions, tokens, row, protected=int(stays.numel())))
        return found

    def text_after(self, item: VisualItem) -> Tensor:
        """Positions (T,) of the text tokens after this item in its row; all text of the row if none follows; without text its last token."""
        text = self.valid_mask()[item.row] & ~self.visual_mask()[item.row]
        after = text.clone()
        after[: int(item.positions[-1]) + 1] = False
        found = torch.nonzero(after if bool(after.any()) else text).flatten()
        return found if found.numel() else torch.tensor([self.last_token(item.row)])

    def last_token(self, row: int) -> int:
        """Position of the last token of a row that is not padding."""
        return int(torch.nonzero(self.valid_mask()[row]).flatten()[-1])

    def last_tokens(self, row: int, most: int) -> Tensor:
        """Positions (T,) of the last ``most`` text tokens of a row, fewer where it is shorter; of one, or of a row without text, the last token."""
        if most > 1 and (text := torch.nonzero(self.valid_mask()[row] & ~self.visual_mask()[row]).flatten()).numel():
            return text[-most:]
        return torch.tensor([self.last_token(row)])


def square_grid(num_tokens: int, frames: int = 1) -> Tensor | None:
    """(N, 3) grid of ``frames`` square maps in raster order, or ``None`` if N does not split into squares."""
    per_frame, rest = divmod(num_tokens, max(frames, 1))
    side = round(per_frame**0.5)
    if rest or side * side != per_frame or per_frame == 0:
        return None
    return raster_grid(frames, side, side)


def raster_grid(frames: int, rows: int, columns: int) -> Tensor:
    """(frames * rows * columns, 3) frame, row and column of every cell in raster order."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)
