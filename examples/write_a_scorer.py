"""Write a scorer of your own, make a method of it, register it, use it. This is all it takes.

The idea here: keep tokens that differ most from the mean of their image ("contrast").
"""

from dataclasses import dataclass

from torch import Tensor

import vlprune
from vlprune.evals import digits
from vlprune.loading import load_embedded
from vlprune.reducers import Drop
from vlprune.selectors import TopK


@dataclass(frozen=True)
class Contrast:
    """Distance of each token to the mean token of its image."""

    needs = ()                                          # signals to collect, e.g. (vlprune.Tap("last_row", 1),)

    def __call__(self, inputs: vlprune.ScoreInputs) -> Tensor:
        """(B, N) float32; the higher, the more worth keeping."""
        tokens = inputs.tokens.float()                  # (B, N, D)
        return (tokens - tokens.mean(dim=1, keepdim=True)).norm(dim=-1)


def contrast(facts: vlprune.ModelFacts, keep: float | int = 0.25, *, layer: int = 0) -> vlprune.PruningMethod:
    """Scorer, selector and reducer at a point; keyword-only arguments are the user's options."""
    point = vlprune.LLMLayer(layer) if layer else vlprune.BeforeLLM()
    return vlprune.PruningMethod("contrast", (vlprune.Stage(point, Contrast(), TopK(), Drop(), vlprune.Budget(keep)),))


vlprune.register(vlprune.MethodCard("contrast", contrast, "tokens far from the mean of their image", default_keep=0.25))

loaded = load_embedded()
inputs = loaded.inputs("which digit is the largest ?", [digits.scene("heldout", 3).pil()])
with vlprune.apply(loaded.model, "contrast", keep=64, layer=2) as handle:
    print("answer:", loaded.answers(inputs, max_new_tokens=4)[0])
    print(handle.report())
vlprune.unregister("contrast")
