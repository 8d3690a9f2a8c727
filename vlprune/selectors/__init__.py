"""Which tokens stay, given scores."""

from vlprune.selectors.diversity import Diversity
from vlprune.selectors.hierarchy import Hierarchy
from vlprune.selectors.topk import TopK

__all__ = ["Diversity", "Hierarchy", "TopK"]
