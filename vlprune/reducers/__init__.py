"""What becomes of the tokens that are not kept."""

from vlprune.reducers.drop import Drop
from vlprune.reducers.merge import Merge
from vlprune.reducers.recycle import Recycle

__all__ = ["Drop", "Merge", "Recycle"]
