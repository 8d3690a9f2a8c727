"""How much each token is worth. One idea a file."""

from vlprune.scorers.blend import Blend
from vlprune.scorers.centrality import Centrality
from vlprune.scorers.constant import Constant
from vlprune.scorers.signal import SignalScore
from vlprune.scorers.temporal_dissimilarity import TemporalDissimilarity
from vlprune.scorers.transition import TransitionVariation, transition_statistics

__all__ = [
    "Blend",
    "Centrality",
    "Constant",
    "SignalScore",
    "TemporalDissimilarity",
    "TransitionVariation",
    "transition_statistics",
]
