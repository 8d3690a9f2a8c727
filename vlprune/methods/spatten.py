"""SpAtten: from layer to layer fewer tokens and fewer heads, by the attention that tokens received and by what heads put out in all layers so far.

Reference: "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", arXiv:2012.09852 (HPCA 2021), for hardware made for it;
no official program of this algorithm for PyTorch. The schedule is that of the class 'topk' in https://github.com/kssteven418/LTP
(`src/transformers/models/ltp/prune_modules.py`).

Convention: score s[j] of a token is the attention that it received, summed over heads and queries and over all layers before the one where tokens leave
(the paper's cascade; the program named above looks at one layer only). What left in a layer is gone in all later ones, attention, MLP and cache alike.
Before layer i, counted from 0, from ``start`` = max(3, 0.15 L rounded up) on, the share max(0.01, 1 + (keep - 1) (i - start + 1) / (L - start)) of the prompt
stays, rounded; ``keep`` is so the share, or number, behind the last step. Score e[h] of a head is the sum of the sizes of its outputs over tokens and over
the layers so far; heads become fewer along the same line down to ``heads``, floor(H share) of them, and those that left never answer again.

Left to the user by the paper, and chosen here: ``heads`` not given is 1 - (1 - keep) / 8, which gives the paper's averages on GPT-2 (tokens 3.8 times fewer,
heads 1.1 times), and all heads where ``keep`` is a number.

Differences:
- Heads are chosen in a prompt and stay so while decoding and in later turns; nothing more of the prompt leaves while decoding.
- Pruning of values by each query's probabilities (local V pruning) and the quantisation are for hardware and not here.
- In the paper heads leave before their queries are projected; here projections run for all heads, attention for those that stay.
- ``protect``: the last token always stays, as its logits are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import Attend, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._rows import given_layer, given_protect, given_tokens
from vlprune.methods.random_drop import RandomScore
from vlprune.points import LLMLayer
from vlprune.protocols import HeadChoice, HeadInputs, Scorer, Tap
from vlprune.reducers import Drop
from vlprune.scorers.signal_sum import SignalSum
from vlprune.selectors import TopK

FIRST, SHARE_BEFORE, LOWEST = 3, 0.15, 0.01
SLOWER = 8      # so many times fewer heads leave than tokens


@dataclass(frozen=True)
class OnTheWay(Budget):
    """What is left after a part ``way`` of the line from all tokens to ``keep``."""

    way: float = 1.0

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay; a number above is all of them."""
        end = self.keep if isinstance(self.keep, float) else min(self.keep, num_tokens) / num_tokens
        return max(1, round(num_tokens * max(LOWEST, 1 + (end - 1) * self.way)))


@dataclass(frozen=True)
class HeadCascade:
    """Heads of one layer: the share with the largest outputs so far answers; in prompts it adds up what they put out. ``seed``: drawn instead."""

    layer: int
    share: float
    seed: int | None = None

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """Which heads answer; all while the share is 1."""
        heads, state = inputs.queries.shape[1], inputs.state
        assert state is not None
        number, name = max(1, math.floor(heads * self.share + 1e-9)), f"spatten heads of layer {self.layer}"
        if number == heads:
            return None
        if name not in state.values:
            if inputs.phase == "decode":
                return None
            if self.seed is None:
                score = state.scratch["spatten"]
            else:
                drawn = torch.rand(heads, generator=torch.Generator().manual_seed(self.seed)).to(inputs.queries.device, non_blocking=True)
                score = drawn.expand(inputs.queries.shape[0], -1)
            state.values[name] = score.topk(number, dim=-1).indices.sort(dim=-1).values
        return HeadChoice(heads=state.values[name])

    def see(self, inputs: HeadInputs, out: Tensor) -> None:
        """Add the sizes of outputs (B, Q, H, d), padding left out."""
        assert inputs.state is not None
        sizes = out.detach().float().abs().sum(dim=-1)                                   # (B, Q, H)
        sizes = (sizes if inputs.real is None else torch.where(inputs.real[..., None], sizes, 0.0)).sum(dim=1)
        scratch = inputs.state.scratch
        scratch["spatten"] = sizes + scratch["spatten"] if "spatten" in scratch else sizes


def spatten(
    facts: ModelFacts,
    keep: Keep = 0.25,
    *,
    heads: float | None = None,
    start: int | None = None,
    ranking: str = "attention",
    tokens: str = "text",
    protect: tuple[int, int] = (0, 1),
    seed: int = 0,
) -> PruningMethod:
    """Let tokens and heads leave from layer to layer.

    Args:
        facts: of the model.
        keep: share or number of the prompt's tokens that is left in the last layer.
        heads: share of the heads that is left there; 1.0: all.
        start: first layer, counted from 0 and at least 1, that gets fewer.
        ranking: ``"attention"``, or ``"random"`` for the baseline (tokens and heads alike).
        tokens: ``"text"`` or ``"all"``.
        protect: how many of the first and last text tokens always stay.
        seed: of the random ranking.
    """
    depth = facts.decoder_layers
    if ranking not in ("attention", "random"):
        raise OptionError(f"ranking={ranking!r}: 'attention' or 'random'")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, (int, float)) or not 0 < heads <= 1):
        raise OptionError(f"heads={heads!r}: the share of the heads that is left, above 0 and at most 1.0 (all of them)")
    Budget(keep)
    row, sets, drawn = given_protect(protect), given_tokens(tokens), ranking == "random"
    first = max(1, min(max(FIRST, math.ceil(SHARE_BEFORE * depth)), depth - 1)) if start is None else given_layer("start", start, 1, depth)
    least = (1 - (1 - keep) / SLOWER if isinstance(keep, float) else 1.0) if heads is None else float(heads)
    stages, attends = [], []
    for layer in range(depth):
        way = max(0, layer - first + 1) / max(1, depth - first)
        if way and not Budget(keep).is_everything:
            seen: Scorer = RandomScore(seed) if drawn else SignalSum(tuple(Tap("received", below) for below in range(layer)))
            stages.append(Stage(LLMLayer(layer), seen, TopK(), Drop(), OnTheWay(keep, way=way), tokens=sets, protect=row))
        if least < 1 and (way or not drawn):
            cascade = HeadCascade(layer, 1 + (least - 1) * way, seed if drawn else None)
            see = None if drawn or layer == depth - 1 else cascade.see
            attends.append(Attend(layer, choose=cascade, see=see, phase="both", tokens=sets))
    return PruningMethod("spatten", tuple(stages), attends=tuple(attends))


CARD = MethodCard(
    "spatten",
    spatten,
    "fewer tokens by the attention received, and fewer heads by what they put out, from layer to layer",
    paper="arXiv:2012.09852",
    points=("llm:K",),
    needs=("received",),
    text_aware=True,
    tokens="text",
    default_keep=0.25,
)
