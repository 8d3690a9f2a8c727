"""Stages in the middle of vision blocks: where they act, and how many patches each leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlprune.budget import Budget, Keep
from vlprune.method import ModelFacts
from vlprune.methods._stages import given_budgets, given_layers, scaled_layers
from vlprune.points import Depth

#: Behind the attention of the blocks 3, 6 and 9 of 12, counted from 0: EViT's places.
LAYERS = (Depth(3, of=12), Depth(6, of=12), Depth(9, of=12))


@dataclass(frozen=True)
class OnTheWay(Budget):
    """What is left at ``part`` of the way to ``keep``: in equal ratios, or in equal numbers."""

    part: float = 1.0
    equal_numbers: bool = False

    def num_keep(self, num_tokens: int, num_frames: int = 1) -> int:
        """Return how many of ``num_tokens`` stay."""
        last = super().num_keep(num_tokens, num_frames)
        if self.part == 1.0:
            return last
        if self.equal_numbers:
            return num_tokens - round((num_tokens - last) * self.part)
        share = self.keep if isinstance(self.keep, float) else last / num_tokens
        return max(last, round(num_tokens * float(share**self.part)))


def tower_depth(facts: ModelFacts) -> int:
    """Blocks that have a say in the visual tokens."""
    return facts.feature_layer + 1 if facts.vision_layers else 0


def chosen_layers(layers: Sequence[int] | None, facts: ModelFacts, *, every: bool = False) -> tuple[int, ...]:
    """Blocks in whose middle the stages act: the user's; else every one, or EViT's places."""
    depth = tower_depth(facts)
    if layers is not None:
        return given_layers("layers", layers, 0, depth)
    return tuple(range(depth)) if every and depth else scaled_layers(LAYERS, depth)


def budgets(keep: Keep | Sequence[Keep], num_stages: int, *, equal_numbers: bool = False) -> tuple[Budget, ...]:
    """One budget a stage: what the user gave for each, or ``keep`` at the end, reached step by step."""
    if isinstance(keep, (int, float)):
        return tuple(OnTheWay(keep, part=step / num_stages, equal_numbers=equal_numbers) for step in range(1, num_stages + 1))
    return given_budgets(keep, num_stages, "round")
