"""FLOPs and key-value bytes, counted from shapes.

Conventions, stated once: a multiply-add is 2 FLOPs; only matrix products count (no norms, softmax, rotations, embeddings);
attention is counted over the query-key pairs that may see each other, so a causal decoder's own tokens count half, which is what
fused kernels compute (papers count all pairs: `paper_flops`); the language head is counted for one position a row, as ``generate``
computes it. ``layer_flops`` is the count of one row through one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TowerShape:
    """Widths of a stack of equal transformer blocks.

    Attributes:
        layers: number of blocks. width: D. heads, kv_heads, head_dim: of attention.
        hidden: MLP width M. gated: whether the MLP has a gate (three matrices) or not (two).
        vocabulary: outputs of the language head, 0 if there is none.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = True
    vocabulary: int = 0

    def layer_flops(self, tokens: int, *, causal: bool = False, past: int = 0) -> float:
        """FLOPs of one block for one row of ``tokens``; ``causal``: each sees itself, those before it, and ``past`` keys."""
        pairs = tokens * (tokens + 1) / 2 + tokens * past if causal else float(tokens**2)
        inner = self.heads * self.head_dim
        projections = 2 * self.width * inner + 2 * self.width * self.kv_heads * self.head_dim
        return 2.0 * tokens * projections + self.mlp_flops(tokens) + 4.0 * pairs * inner

    def partial_flops(self, queries: int, keys: int, mlp: int, past: int = 0) -> float:
        """FLOPs of one causal block where ``queries`` of the tokens ask, spread evenly among ``keys`` that have keys, and ``mlp`` run through the MLP."""
        inner = self.heads * self.head_dim
        pairs = queries * ((keys + 1) / 2 + past)
        projections = 2.0 * self.width * (queries * 2 * inner + keys * 2 * self.kv_heads * self.head_dim)
        return projections + self.mlp_flops(mlp) + 4.0 * pairs * inner

    def mlp_flops(self, tokens: int) -> float:
        """FLOPs of one block's MLP for ``tokens``."""
        return 2.0 * tokens * (3 if self.gated else 2) * self.width * self.hidden

    def kv_bytes(self, entries: int, element_bytes: int) -> int:
        """Bytes of keys and values of one row in one layer."""
        return 2 * entries * self.kv_heads * self.head_dim * element_bytes


def stack_flops(shape: TowerShape, lengths: Sequence[Sequence[int]], past: int = 0) -> float:
    """FLOPs of a causal stack whose layer ``l`` runs on ``lengths[l]`` tokens (one number a row)."""
    return sum(shape.layer_flops(tokens, causal=True, past=past) for row_lengths in lengths for tokens in row_lengths)


def stack_kv_bytes(shape: TowerShape, lengths: Sequence[Sequence[int]], element_bytes: int, past: int = 0) -> int:
    """Bytes of the cache after prefill."""
    return sum(shape.kv_bytes(tokens + past, element_bytes) for row_lengths in lengths for tokens in row_lengths)


def paper_flops(tokens: int, layers: int, width: int, hidden: int, *, gated: bool = True) -> float:
    """The count most of the papers print: ``L (4 n D^2 + 2 n^2 D + 3 n D M)``, multiply-adds, visual tokens only.

    With ``gated=False`` the last factor is 2, as in DivPrune and ToDRE. LLaVA-1.5-7B at 576 tokens: 3.817e12.
    """
    return float(layers) * (4 * tokens * width**2 + 2 * tokens**2 * width + (3 if gated else 2) * tokens * width * hidden)
