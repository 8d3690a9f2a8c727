"""vlprune: vision-language models made faster by processing fewer tokens. One call, exact, and it can be undone."""

from vlprune.api import PruneHandle, apply
from vlprune.budget import Budget
from vlprune.errors import VlpruneError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM, Depth, LLMLayer, VisionLayer, VisionMiddle
from vlprune.protocols import Reducer, ScoreInputs, Scorer, Selection, Selector, Tap
from vlprune.registry import get_method, list_methods, register, unregister

__version__ = "0.1.0"

__all__ = [
    "BeforeLLM", "Budget", "Depth", "LLMLayer", "MethodCard", "ModelFacts", "PruneHandle", "PruningMethod", "Reducer", "ScoreInputs",
    "Scorer", "Selection", "Selector", "Stage", "Tap", "VisionLayer", "VisionMiddle", "VlpruneError", "apply", "get_method", "list_methods",
    "register", "unregister",
]  # fmt: skip
