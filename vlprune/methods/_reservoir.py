"""What TCA remembers of the pictures it has seen: for each class the surest ones, the CLS states of all their blocks.

An entry's class is the one predicted for it. A class that is full loses the entry with the largest sum of entropy and mean cosine to the others: an
unsure one, or one that says nothing new. Kept on the device of the states; adding reads the predicted class back, once a picture, between forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlprune.errors import OptionError

#: Settings of the released program by data set.
PRESETS: dict[str, dict[str, float]] = {
    name: dict(zip(("size", "scale", "strength", "sharpness"), values, strict=True))
    for name, values in {
        "caltech101": (3, 1, 7, 6), "dtd": (3, 1, 2, 6), "eurosat": (2, 5, 8, 7), "fgvc": (3, 0.02, 2, 2), "food101": (3, 0.01, 2, 5),
        "imagenet": (3, 0.1, 3, 5), "imagenet-a": (3, 0.01, 3, 5), "imagenet-r": (3, 0.1, 3, 8), "imagenet-s": (3, 0.1, 4, 8),
        "imagenet-v2": (3, 0.1, 4, 9), "flowers": (3, 0.01, 7, 7), "pets": (3, 5.5, 2, 6), "cars": (3, 0.1, 1.5, 8), "sun397": (3, 0.01, 4, 3),
        "ucf101": (3, 0.01, 6, 8),
    }.items()
}  # fmt: skip


def cls_states(states: Sequence[Tensor]) -> Tensor:
    """(B, blocks, D) CLS of what each block returned: ``hidden_states[1:]`` of transformers, or any list of (B, L, D)."""
    return torch.stack([state[:, 0] for state in states], dim=1)


def logit_correction(cls: Tensor, entries: Tensor, classes: Tensor, num_classes: int, *, scale: float, strength: float, sharpness: float) -> Tensor:
    """What pictures like this one add to the logits.

    Args:
        cls: (B, blocks, D) CLS states.
        entries: (E, blocks, D) those of remembered pictures.
        classes: (E,) their classes.
        num_classes: C.
        scale: the smaller, the more the last blocks count: their weights are the exponentials of 0 to 1, divided by it, and sum to one.
        strength: lambda, factor on the whole.
        sharpness: beta, how fast an entry's part falls with its distance.

    Returns:
        (B, C).
    """
    ramp = torch.linspace(0, 1, cls.shape[1], device=cls.device).div(scale).softmax(dim=0)
    one, other = F.normalize(cls.float(), dim=-1), F.normalize(entries.float(), dim=-1)
    affinity = torch.einsum("bld,eld,l->be", one, other, ramp)
    return strength * (sharpness * (affinity - 1)).exp() @ F.one_hot(classes, num_classes).to(affinity.dtype)


class Reservoir:
    """The memory.

    Args:
        num_classes: C, columns of the logits.
        size: entries a class.
        scale, strength, sharpness: of `logit_correction`; `PRESETS` has those of the released program.
    """

    def __init__(self, num_classes: int, *, size: float = 3, scale: float = 0.1, strength: float = 3.0, sharpness: float = 5.0) -> None:
        if num_classes < 1 or int(size) < 1 or not scale > 0:
            raise OptionError(f"num_classes={num_classes!r}, size={size!r}, scale={scale!r}: at least one class, one entry a class, and a scale above 0")
        self.num_classes, self.size = num_classes, int(size)
        self.scale, self.strength, self.sharpness = scale, strength, sharpness
        self.entries: dict[int, list[tuple[Tensor, Tensor]]] = {}        # by class: entropy () and CLS states (blocks, D), the surest first

    @torch.no_grad()
    def add(self, logits: Tensor, cls: Tensor) -> None:
        """Remember pictures (B, C), (B, blocks, D), one after the other."""
        if logits.shape[-1] != self.num_classes or cls.dim() != 3 or cls.shape[0] != logits.shape[0]:
            raise OptionError(f"logits {tuple(logits.shape)}, CLS states {tuple(cls.shape)}: (B, {self.num_classes}) and (B, blocks, D) are needed")
        logs = logits.float().log_softmax(dim=-1)
        entropies = -(logs.exp() * logs).sum(dim=-1)
        for entropy, states, label in zip(entropies, cls.float(), logits.argmax(dim=-1).tolist(), strict=True):
            held = self.entries.setdefault(label, [])
            held.append((entropy, states.clone()))
            if len(held) > self.size:
                stacked = F.normalize(torch.stack([entry for _, entry in held]), dim=-1)
                alike = torch.einsum("eld,fld->ef", stacked, stacked) / stacked.shape[1]
                others = (alike.sum(dim=1) - alike.diagonal()) / (len(held) - 1)
                del held[int((torch.stack([entropy for entropy, _ in held]) + others).argmax())]
            held.sort(key=lambda entry: float(entry[0]))

    def correct(self, logits: Tensor, cls: Tensor) -> Tensor:
        """Remember these pictures, then correct their logits by all that is remembered; (B, C)."""
        self.add(logits, cls)
        pairs = [(label, states) for label, held in self.entries.items() for _, states in held]
        labels = torch.tensor([label for label, _ in pairs], device=cls.device)
        options = {"scale": self.scale, "strength": self.strength, "sharpness": self.sharpness}
        return logits + logit_correction(cls, torch.stack([states for _, states in pairs]), labels, self.num_classes, **options).to(logits.dtype)

    def anchors(self, block: int) -> Tensor | None:
        """(C, D) mean CLS of each class behind a block, counted from 0; ``None`` until each class has two entries."""
        if sum(len(held) > 1 for held in self.entries.values()) < self.num_classes:
            return None
        return torch.stack([torch.stack([states[block] for _, states in self.entries[label]]).mean(dim=0) for label in range(self.num_classes)])

    def guest(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        """For `vlprune.method.Guests` at a block: the class mean most like each picture's CLS there, (B, 1, D)."""

        def nearest(states: Tensor) -> Tensor | None:
            bank = self.anchors(layer - 1)
            if bank is None:
                return None
            with torch.no_grad():
                likeness = F.normalize(states[:, 0].float(), dim=-1) @ F.normalize(bank.to(states.device), dim=-1).mT
                return bank.to(states)[likeness.argmax(dim=1)][:, None]

        return nearest
