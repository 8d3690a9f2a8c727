"""ClusterRecycle: clusters of the best-scored tokens that leave each become one token, their mean.

Reference: SparseVLM, arXiv:2410.04417. The plan is the one of `vlprune.selectors.with_clusters.WithClusters`, made again from the same scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlprune.kernels.recycling import cluster_places, recycle
from vlprune.protocols import Reduced, ScoreInputs, Scorer, Selection, gather_tokens


@dataclass(frozen=True)
class ClusterRecycle:
    """Means of clusters, at their centres.

    Attributes:
        scorer: the stage's own.
        appended: put the means behind the kept tokens, in the order of their centres, whatever places they take.
    """

    scorer: Scorer
    appended: bool = False

    @property
    def exact(self) -> bool:
        """Centres change."""
        return False

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """(B, K, D) tokens."""
        with torch.no_grad():
            plan = recycle(self.scorer(inputs).float(), inputs.tokens, selection.keep_indices.shape[1])
            order = cluster_places(plan).argsort(dim=1)
        tokens = inputs.tokens.float()
        pool = gather_tokens(tokens, plan.pool)                                          # (B, r, D)
        batch, clusters = plan.centres.shape
        count = torch.zeros(batch, clusters, device=pool.device).scatter_add(1, plan.owner, torch.ones_like(pool[..., 0]))
        means = pool.new_zeros(batch, clusters, pool.shape[-1]).scatter_add(1, plan.owner[..., None].expand_as(pool), pool) / count[..., None]
        joined = torch.cat([gather_tokens(tokens, plan.kept), means], dim=1)
        return Reduced(joined if self.appended else gather_tokens(joined, order))
