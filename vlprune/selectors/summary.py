"""Summary: the best tokens, perhaps evenly spaced ones beside them, and one place for a summary of what leaves (PruMerge).

Of K tokens one is the summary: it has the place of the best token that leaves. The other K - 1 are the best ones, or, with ``spread``, partly the
best ones and partly evenly spaced over the rest in reading order (separators last).

``auto`` lets the data say how many: the tokens whose score is an outlier, above the third quartile by more than 1.5 times the distance between the
quartiles. With ``spread`` every n-th token joins them, n a third of how many tokens come on one outlier, and at least 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.selectors.places import real_tokens, rest_in_order, separators_last
from vlprune.selectors.portion import Portion, check_portion, portion_of

ROLES = ("kept", "spread", "summary")
WHISKER = 1.5


@dataclass(frozen=True)
class Summary:
    """Keep tokens and a place for the summary of the others.

    Attributes:
        spread: share or number of the kept tokens, the summary not counted, that are evenly spaced.
        auto: as many as stand out, whatever the budget. Reads one count back to the host.
    """

    spread: Portion = 0.0
    auto: bool = False

    def __post_init__(self) -> None:
        check_portion("spread", self.spread)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """No signals of its own."""
        return ()

    @property
    def one_by_one(self) -> bool:
        """Whether items have to come alone, because each keeps a number of its own."""
        return self.auto

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """(B, K) indices with the role of each."""
        scores = separators_last(scores, inputs)
        kind, num_keep = self._outstanding(scores, inputs) if self.auto else self._exactly(scores, inputs)
        leaves = scores.masked_fill(kind < len(ROLES), -torch.inf)
        kind = kind.scatter(1, leaves.argmax(dim=-1, keepdim=True), 2)
        keep = kind.argsort(dim=-1, stable=True)[:, :num_keep].sort(dim=-1).values
        return Selection(keep, kind.gather(1, keep), ROLES)

    def _exactly(self, scores: Tensor, inputs: ScoreInputs) -> tuple[Tensor, int]:
        """(B, N) number of the role, the last for those that leave, without the summary; and K."""
        others = inputs.num_keep - 1
        spread = portion_of("spread", self.spread, others)
        best = scores.topk(others - spread, dim=-1).indices
        kind = torch.full_like(scores, len(ROLES), dtype=torch.int64).scatter(1, best, 0)
        if spread:
            rest, count = rest_in_order(kind == 0, inputs)
            places = torch.arange(spread, device=rest.device) * count.clamp(min=spread) // spread
            kind = kind.scatter(1, rest.gather(1, places), 1)
        return kind, inputs.num_keep

    def _outstanding(self, scores: Tensor, inputs: ScoreInputs) -> tuple[Tensor, int]:
        """The same where the scores say how many."""
        real = real_tokens(inputs)
        low, high = scores.masked_fill(~real, torch.nan).nanquantile(torch.tensor([0.25, 0.75], device=scores.device), dim=-1, keepdim=True)
        best = real & (scores > high + WHISKER * (high - low))
        kind = torch.where(best, 0, len(ROLES))
        if self.spread:
            total = real.sum(dim=-1, keepdim=True)
            step = (total // best.sum(dim=-1, keepdim=True).clamp(min=1) // 3).clamp(min=2)
            place = real.cumsum(dim=-1) - 1
            kind = torch.where(real & ~best & (place % step == 0) & (place < total - 1), 1, kind)
        counts = (kind < len(ROLES)).sum(dim=-1).tolist()
        if len(set(counts)) > 1:
            raise OptionError(f"keep='auto': the items of this call keep {counts} tokens; choose for one item at a time")
        return kind, counts[0] + 1
