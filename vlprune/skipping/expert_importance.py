"""How much each layer's experts matter, and how likely the chosen ones are, for text and for visual tokens: what `modes` is set by.

    calibrate("modes", model, inputs, "experts", keeps=[0.5, 0.25])
    vlprune.apply(model, "modes", keep=0.5, importance="experts")

The importance of a layer is the KL divergence of the next token's distribution, behind the last token of an input, between the model and the model without
that layer's routed experts, averaged over the inputs and divided by its sum over the layers. An expert's score for a token is that importance times what
the router gives it. From histograms of the router's probabilities, thresholds follow for any share of experts that is to run: one threshold for both kinds
of tokens, or, for shares in ``keeps``, the pair with the least divergence among ``points`` pairs that let as many run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError, UnsupportedModelError
from vlprune.method import PruningMethod, RouteMask
from vlprune.protocols import RouteInputs
from vlprune.skipping.running_sums import Progress, RunningSums

KIND = "vlprune.expert_importance"
OPTION = "importance"
FILE = "experts.safetensors"
BINS, LOWEST = 600, -6.0                                                  # of the histograms: even in log10, from 1e-6 to 1
MODALITIES = ("text", "visual")


@dataclass(frozen=True)
class ExpertImportance:
    """What was measured.

    Attributes:
        layers: decoder layers with experts.
        alpha: importance of each, 1 in all.
        counts: (2, layers, BINS): how many chosen experts of text and of visual tokens the router gave a probability in a bin.
        pairs: thresholds for text and visual tokens that were searched, by the share that is to run.
    """

    layers: tuple[int, ...]
    alpha: tuple[float, ...]
    counts: Tensor
    pairs: Mapping[float, tuple[float, float]] = field(default_factory=dict)

    def thresholds(self, keep: float) -> tuple[float, float]:
        """For text and for visual tokens: the pair that was searched for this share, else one number for both."""
        if keep in self.pairs:
            return self.pairs[keep]
        found = self.at_share(1.0 - keep, (0, 1))
        return found, found

    def at_share(self, skipped: float, modalities: Sequence[int]) -> float:
        """The threshold below which a share of the scores of some modalities lies."""
        scores = (torch.tensor(self.alpha, dtype=torch.float64)[:, None] * _centres()).expand(len(modalities), -1, -1).reshape(-1)
        weights = self.counts[list(modalities)].double().reshape(-1)
        order = scores.argsort()
        sums = weights[order].cumsum(0)
        if skipped <= 0 or not float(sums[-1]):
            return 0.0
        place = int(torch.searchsorted(sums, skipped * sums[-1]).clamp(max=len(order) - 1))
        return float(scores[order][place])

    def frontier(self, keep: float, points: int) -> list[tuple[float, float]]:
        """Pairs of thresholds with which this share runs, from "skip visual tokens' experts first" to "skip text's first"."""
        text, visual = (float(part) for part in self.counts.double().sum(dim=(1, 2)))
        skip = (1.0 - keep) * (text + visual)
        if not text or not visual:
            return [self.thresholds(keep)]
        found = []
        for place in range(points):
            least, most = max(0.0, (skip - visual) / text), min(1.0, skip / text)
            share = least + (most - least) * place / max(points - 1, 1)
            found.append((self.at_share(share, (0,)), self.at_share((skip - share * text) / visual, (1,))))
        return found


@torch.no_grad()
def calibrate(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    resume: bool = True,
    keeps: Sequence[float] = (),
    points: int = 10,
) -> Path:
    """Measure importance and, for some shares, search thresholds; a stopped run goes on.

    Args:
        model: dense, in evaluation mode, with experts in some decoder layers.
        inputs: calls of the model, pictures and all; a list or something else that can be gone through twice where ``keeps`` are given.
        out: folder to write to.
        progress: told ``(done, total, what)``.
        resume: go on from what a stopped run left there.
        keeps: shares of experts to run for which thresholds are searched, each in (0, 1).
        points: pairs of thresholds that are tried for each.

    Returns:
        The folder, for the option ``importance`` of `modes`.
    """
    from vlprune.adapter import find_adapter

    folder, layers = Path(out), find_adapter(model).facts.expert_layers
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layer with a router (mlp.gate) and experts (mlp.experts) to measure")
    if any(isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1 for keep in keeps) or points < 1:
        raise OptionError(f"keeps={keeps!r}, points={points!r}: shares between 0 and 1, and one pair of thresholds or more")
    sums = RunningSums(folder / "sums.safetensors", {"layers": list(layers), "bins": BINS}, resume=resume)
    for call in sums.over(inputs, progress, "inputs, layer by layer"):
        seen: dict[int, Tensor] = {}
        dense = _last(model, call, [RouteMask(layer, _Count(seen)) for layer in layers])
        sums.add("counts", torch.stack([seen[layer] for layer in layers], dim=1))
        without = [_divergence(dense, _last(model, call, [RouteMask(layer, _none)])) for layer in layers]
        sums.add("divergence", torch.stack(without))
    alpha = sums.tensors["divergence"] / sums.tensors["divergence"].sum()
    made = ExpertImportance(layers, tuple(alpha.tolist()), sums.tensors["counts"])
    pairs = {}
    for keep in map(float, keeps):
        pairs[keep] = _searched(model, inputs, made, keep, points, folder, progress, resume)
    _write(ExpertImportance(layers, made.alpha, made.counts, pairs), folder / FILE)
    return folder


def _searched(
    model: nn.Module, inputs: Iterable[Mapping[str, Any]], made: ExpertImportance, keep: float, points: int, folder: Path, progress: Progress | None,
    resume: bool,
) -> tuple[float, float]:  # fmt: skip
    """The pair of thresholds on the frontier with the least divergence."""
    tried = made.frontier(keep, points)
    sums = RunningSums(folder / f"search_{keep:g}.safetensors", {"keep": keep, "tried": tried}, resume=resume)
    for call in sums.over(inputs, progress, f"inputs, thresholds for keep={keep:g}"):
        dense = _last(model, call, [])
        found = []
        for text, visual in tried:
            masks = [RouteMask(layer, Thresholds(alpha, text, visual)) for layer, alpha in zip(made.layers, made.alpha, strict=True)]
            found.append(_divergence(dense, _last(model, call, masks)))
        sums.add("divergence", torch.stack(found))
    return tried[int(sums.tensors["divergence"].argmin())]


@dataclass(frozen=True)
class Thresholds:
    """Experts run whose score, importance of the layer times what the router gives them, reaches the threshold for the kind of token.

    Attributes:
        alpha: importance of the layer.
        text, visual: thresholds.
        most: at most so many experts of a token run, the likeliest; ``None``: all.
        at_least: so many of a token always run, the likeliest.
    """

    alpha: float
    text: float
    visual: float
    most: int | None = None
    at_least: int = 0

    def __call__(self, inputs: RouteInputs) -> Tensor | None:
        """(T, k)."""
        routed = inputs.experts.shape[1]
        capped = self.most is not None and self.most < routed
        if not capped and (max(self.text, self.visual) <= 0 or self.at_least >= routed):
            return None
        limit: Tensor | float = self.text
        if inputs.visual is not None and self.visual != self.text:
            limit = torch.where(inputs.visual, self.visual, self.text)[:, None]
        runs = ~(self.alpha * inputs.probabilities < limit)                              # what is not a number stays, and shows
        if capped or self.at_least:
            rank = inputs.probabilities.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            runs = runs | (rank < self.at_least)
            runs = runs if self.most is None else runs & (rank < self.most)
        return runs


def load_importance(folder: str | os.PathLike[str]) -> ExpertImportance:
    """Read what `calibrate` wrote, or say what is wrong."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            counts = file.get_tensor("counts") if header.get("kind") == KIND else None
    except (OSError, SafetensorError) as error:
        raise OptionError(f"importance={str(folder)!r} cannot be read ({error}): make it with vlprune calibrate --method modes") from error
    if counts is None:
        raise OptionError(f"importance={str(folder)!r} is no importance of experts: make it with vlprune calibrate --method modes")
    about = json.loads(header["about"])
    pairs = {float(keep): (text, visual) for keep, (text, visual) in about["pairs"].items()}
    return ExpertImportance(tuple(about["layers"]), tuple(about["alpha"]), counts, pairs)


class _Count:
    """Notes which probabilities the chosen experts have, and lets all of them run."""

    def __init__(self, seen: dict[int, Tensor]) -> None:
        self.seen = seen

    def __call__(self, inputs: RouteInputs) -> None:
        places = ((inputs.probabilities.double().clamp(min=1e-300).log10() - LOWEST) / -LOWEST * BINS).long().clamp(0, BINS - 1).cpu()
        visual = torch.zeros(len(places), dtype=torch.bool) if inputs.visual is None else inputs.visual.cpu()
        self.seen[inputs.layer] = torch.stack([torch.bincount(places[chosen].flatten(), minlength=BINS) for chosen in (~visual, visual)])


def _none(inputs: RouteInputs) -> Tensor:
    return torch.zeros_like(inputs.experts, dtype=torch.bool)


def _centres() -> Tensor:
    return 10.0 ** (LOWEST * (1.0 - (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS))


def _last(model: nn.Module, call: Mapping[str, Any], masks: list[RouteMask]) -> Tensor:
    """(B, V) log probabilities of the token behind each row, with some experts left out."""
    from vlprune.api import apply

    forward: Callable[..., Any] = model
    with apply(model, PruningMethod("experts", route_masks=tuple(masks))):
        logits = forward(**{**call, "use_cache": False}).logits
    mask = call.get("attention_mask")
    if mask is None:
        return logits[:, -1].float().log_softmax(-1)  # type: ignore[no-any-return]
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1).to(logits.device)
    return logits[torch.arange(len(last), device=logits.device), last].float().log_softmax(-1)  # type: ignore[no-any-return]


def _divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL divergence of the untouched model's distribution from another, summed over rows."""
    return (dense.exp() * (dense - other)).sum(-1).clamp(min=0).sum()


def _write(made: ExpertImportance, path: Path) -> None:
    from safetensors.torch import save_file

    about = {"layers": made.layers, "alpha": made.alpha, "pairs": {repr(keep): pair for keep, pair in made.pairs.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"counts": made.counts.contiguous()}, beside, metadata={"kind": KIND, "about": json.dumps(about)})
    os.replace(beside, path)
