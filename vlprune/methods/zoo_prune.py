"""ZOO-Prune: keep visual tokens that the projector reacts to and that differ from each other.

Reference: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", arXiv:2509.24837 (CVPR 2026).
Official code: https://github.com/AIM-SKKU/ZOO-Prune

Convention: sensitivity is the mean size of the change of the projector's output for steps of h = 0.01 along m = 64 random unit directions, the same for all
tokens, of its input. Brought to [0, 1] it weighs the cosine distance, between projected tokens, to the nearest chosen one; the largest product is chosen
next, the largest sensitivity first. The program's ratio is ``keep``, ``int(N * keep)``.

``estimator="exact"`` is the default: for a projector of two linear layers the root of the mean square over all directions has a closed form
(`vlprune.kernels.sensitivity`). It needs no seed, is one matrix product, and ranks tokens as the estimate does, as closely as two draws of it agree
with each other. ``estimator="monte_carlo"`` is the paper's, for any projector.

``tiles="apart"`` is the default, as in the program for LLaVA-NeXT: each tile is scaled and picks by itself. In a model that lays the crops of an
image out as one mosaic, that mosaic is one tile beside the thumbnail. A video's frames are such tiles; the paper has no videos. ``"together"``: one list.

Differences:
- Tiles share the budget in proportion to their tokens, which for tiles of equal size is the program's equal number without the loss of rounding.
- Newlines come last and within the budget; the program for LLaVA-NeXT keeps them all, beyond it.
- A tile whose tokens are all equally sensitive picks by distance, as the program does for a single image; its version for tiles takes the first ones.
- Steps are taken in float32, where half precision distorts them, and through the projector itself; the program for LLaVA-NeXT steps through an
  approximation of rank 128.
- In a merger with a norm in front (Qwen-VL) the closed form is that of its two layers, at what the norm gives; the estimate steps through the norm too.
- Kept tokens keep their positions; the program renumbers them (``positions="renumber"``).
"""

from __future__ import annotations

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.kernels.greedy import Weighted
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers import SignalScore
from vlprune.scorers.scaled import Scaled
from vlprune.selectors.greedy import Greedy

ESTIMATORS = ("exact", "monte_carlo")
TILES = ("apart", "together")


def zoo_prune(
    facts: ModelFacts,
    keep: Keep = 1 / 3,
    *,
    estimator: str = "exact",
    directions: int = 64,
    step: float = 0.01,
    seed: int = 0,
    tiles: str = "apart",
) -> PruningMethod:
    """Keep sensitive and diverse tokens before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        estimator: ``"exact"`` (two-layer projectors) or ``"monte_carlo"`` (any projector).
        directions: drawn for ``"monte_carlo"``, the paper's m.
        step: length of its steps, the paper's h.
        seed: of its draw.
        tiles: ``"apart"`` or ``"together"``: whether each tile or frame picks by itself.
    """
    if estimator not in ESTIMATORS:
        raise OptionError(f"estimator={estimator!r}: one of {', '.join(map(repr, ESTIMATORS))}")
    if tiles not in TILES:
        raise OptionError(f"tiles={tiles!r}: one of {', '.join(map(repr, TILES))}")
    for name, number in (("directions", directions), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int) or number < (name == "directions"):
            raise OptionError(f"{name}={number!r}: a whole number from {int(name == 'directions')} is needed")
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < float("inf"):
        raise OptionError(f"step={step!r}: the length of a step along a direction, a number above 0")
    options = ("closed",) if estimator == "exact" else ("monte_carlo", directions, float(step), seed)
    apart = tiles == "apart"
    scorer = Scaled(SignalScore(Tap("sensitivity", 0, options)), apart)
    return PruningMethod("zoo_prune", (Stage(BeforeLLM(), scorer, Greedy(Weighted(), apart=apart), Drop(), Budget(keep, "floor")),))


CARD = MethodCard(
    "zoo_prune",
    zoo_prune,
    "sensitivity of the projector, times distance from what was chosen",
    paper="arXiv:2509.24837",
    code="https://github.com/AIM-SKKU/ZOO-Prune",
    needs=("sensitivity",),
    golden=("zoo_prune",),
)
