"""What becomes of the tokens that are not kept."""

from vlprune.reducers.drop import Drop

__all__ = ["Drop"]
