"""WithClusters: the best-scored tokens stay, and the centres of clusters among the best of the others.

Reference: SparseVLM, arXiv:2410.04417. `vlprune.reducers.cluster_recycle.ClusterRecycle` makes the centres the means of their clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.kernels.recycling import cluster_places, recycle
from vlprune.protocols import ScoreInputs, Selection, Tap


@dataclass(frozen=True)
class WithClusters:
    """Keep K places: tokens that stay as they are, and clusters' centres (role ``"merged"``)."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices, in raster order."""
        plan = recycle(scores, inputs.tokens, inputs.num_keep)
        keep, order = cluster_places(plan).sort(dim=1)
        return Selection(keep, (order >= plan.kept.shape[1]).to(torch.int64), ("kept", "merged"))
