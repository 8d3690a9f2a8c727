"""kNN attention: every query attends to the keys with its highest logits, head by head; exact, not by an index.

Reference for the idea: "Memory-efficient Transformers via Top-k Attention", arXiv:2106.06899. No code is followed; it is written out from the definition.

Convention: ``keep`` is k, or the share of the keys that a query may see. The softmax is over these keys alone. The cache keeps every key.

While decoding (``phase="decode"``, the default) this reads every key and the values of the chosen ones. In prompts (``"prefill"``, ``"both"``) every pair's
logit is computed and the k-th highest of each row found, a few rows at a time so that memory stays linear; that takes longer than dense attention, on
every device, and is there for the quality of such attention, not for its speed. Hence the default.

Of keys that are equally good at the k-th place, prompts (and budgets above a third of the keys while decoding) see all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.kernels.top_attention import most_of, top_attention
from vlprune.method import PHASES, Attend, MethodCard, ModelFacts, PruningMethod
from vlprune.methods._rows import given_layer
from vlprune.protocols import HeadChoice, HeadInputs


@dataclass(frozen=True)
class NearestKeys:
    """Attention over the best keys of each query."""

    budget: Budget

    def __call__(self, inputs: HeadInputs) -> HeadChoice | None:
        """The answer; ``None`` where the budget is every key there is."""
        batch, heads, length, width = inputs.queries.shape
        total = inputs.keys.shape[2]
        most = most_of(self.budget, total)
        if most >= total:
            return None
        if length == 1:
            return HeadChoice(out=top_attention(inputs, self.budget), pairs=float(most), flops=2.0 * batch * heads * width * (total - most))
        dense = length * (total - length) + length * (length + 1) / 2
        pairs = sum(min(most_of(self.budget, seen), seen) for seen in range(total - length + 1, total + 1))
        flops = 2.0 * batch * heads * width * (dense - pairs)                # logits of the pairs that nothing comes of
        return HeadChoice(out=top_attention(inputs, self.budget), pairs=float(pairs), flops=flops)


def knn_attention(facts: ModelFacts, keep: Keep = 256, *, phase: str = "decode", layers: Sequence[int] | None = None) -> PruningMethod:
    """Attend to the most relevant keys.

    Args:
        facts: of the model.
        keep: number of keys that each query sees, or share of those it may see.
        phase: ``"decode"``, ``"prefill"`` or ``"both"``.
        layers: where, counted from 0; all of them if not given.
    """
    if phase not in PHASES:
        raise OptionError(f"phase={phase!r}: one of {', '.join(map(repr, PHASES))}")
    budget = Budget(keep)
    if budget.is_everything:
        return PruningMethod("knn_attention")
    depth = facts.decoder_layers
    chosen = range(depth) if layers is None else sorted({given_layer("layers", layer, 0, depth) for layer in layers})
    rule = NearestKeys(budget)
    return PruningMethod("knn_attention", attends=tuple(Attend(layer, choose=rule, phase=phase, tokens="all", stateless=True) for layer in chosen))


CARD = MethodCard(
    "knn_attention",
    knn_attention,
    "while decoding (or in prompts too) each head attends to the keys with the highest logits",
    paper="arXiv:2106.06899",
    points=("llm:K",),
    reduction="skip",
    tokens="all",
    equivariant=False,
    default_keep=256,
)
