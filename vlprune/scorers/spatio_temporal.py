"""SpatioTemporal: a small trained net that scores the visual tokens of a video from their patches and from the same place one frame earlier.

Reference: STTS, arXiv:2603.18004. Official code: https://github.com/allenai/molmo2 (`olmo/nn/temporal_image_vit.py`, `TemporalTokenScorer`)

The patches that make one token are pooled by attention, the query being their mean (a missing patch is a zero that still counts, as in the
official code); the vector of the token and that of its predecessor go through three layers with SiLU to a score between 0 and 1. Parameters
are named as in the official code.

Difference: a token's predecessor is found by its grid within its own video, so that videos of one call never mix (in the official code the
first frame of a video follows the last one of the video before).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap, gather_tokens
from vlprune.scorers.temporal_dissimilarity import same_cell_before

FIRST_FRAME = 1.0  # added to the first frame's scores: above all others, in their own order
FORMAT = "vlprune.stts"


class PatchPooler(nn.Module):
    """One query a token, the mean of its patches, attends to these patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, patches: Tensor) -> Tensor:
        """(R, M, D) to (R, D)."""

        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:-1], self.heads, -1).transpose(-2, -3)            # (R, H, M, d)

        query = split(self.wq(patches.mean(dim=-2, keepdim=True)))
        pooled = F.scaled_dot_product_attention(query, split(self.wk(patches)), split(self.wv(patches)))
        return self.wo(pooled.flatten(-3))  # type: ignore[no-any-return]


class ScoreMLP(nn.Module):
    """Three layers to one number."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (...)."""
        return self.w3(F.silu(self.w2(F.silu(self.w1(x)))))[..., 0]  # type: ignore[no-any-return]


class SpatioTemporalNet(nn.Module):
    """The trainable part.

    Args:
        width: of the vision tower.
        heads: of the pooling attention; the tower's, unless there is a reason.
        hidden: of the MLP; the official code takes the width of the tower's MLP.
        layer: vision block, counted from 0, whose output it is trained on; ``None``: not said.

    Attributes:
        temporal_loss: in training, the loss of the latest forward that pulls scores towards change (see `temporal_loss`); add it to the task's.
    """

    def __init__(self, width: int, heads: int, hidden: int, layer: int | None = None) -> None:
        super().__init__()
        if min(width, heads, hidden) < 1 or width % heads:
            raise OptionError(f"width={width}, heads={heads}, hidden={hidden}: numbers from 1, and heads must divide the width")
        self.width, self.heads, self.hidden, self.layer = width, heads, hidden, layer
        self.patch_token_pooler = PatchPooler(width, heads)
        self.mlp = ScoreMLP(2 * width, hidden)
        self.temporal_loss: Tensor | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor, previous: Tensor, found: Tensor) -> Tensor:
        """Scores (B, N) between 0 and 1 of tokens made of ``patches`` (B, N, M, D); ``previous`` is each one's predecessor where ``found``."""
        if patches.shape[-1] != self.width:
            raise OptionError(f"these weights are for a vision tower of width {self.width}, but the tower here has {patches.shape[-1]}; train them on it")
        pooled = self.patch_token_pooler(patches.flatten(0, 1)).reshape(*patches.shape[:2], -1)
        before = gather_tokens(pooled, previous) * found[..., None]
        scores = torch.sigmoid(self.mlp(torch.cat([before, pooled], dim=-1)))
        if self.training and torch.is_grad_enabled():
            self.temporal_loss = temporal_loss(scores, patches, previous, found)
        return scores

    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file that `load` and ``weights=`` read."""
        from safetensors.torch import save_file

        target = _checked(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "heads": str(self.heads)} | ({} if self.layer is None else {"layer": str(self.layer)})
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, target, metadata=about)
        return target

    @classmethod
    def load(cls, path: str | Path) -> SpatioTemporalNet:
        """Read such a file, in evaluation mode on the CPU.

        Raises:
            OptionError: no such file, or not one that `save` wrote.
        """
        from safetensors import SafetensorError, safe_open

        source = _checked(path)
        if not source.is_file():
            raise OptionError(f"weights={str(path)!r}: no such file")
        try:
            with safe_open(str(source), framework="pt") as file:
                about = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise OptionError(f"weights={str(path)!r} cannot be read: {error}") from error
        first = weights.get("mlp.w1.weight")
        if about.get("format") != FORMAT or first is None or first.dim() != 2:
            raise OptionError(
                f"weights={str(path)!r} does not hold a spatio-temporal scorer as SpatioTemporalNet.save writes it. For weights from elsewhere, build "
                "vlprune.scorers.spatio_temporal.SpatioTemporalNet(width, heads, hidden), load their state dict into it, and give it as weights."
            )
        layer = about.get("layer")
        net = cls(first.shape[1] // 2, int(about["heads"]), first.shape[0], None if layer is None else int(layer))
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise OptionError(f"weights={str(path)!r}: {error}") from error
        return net.eval()


def _checked(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise OptionError(f"weights={str(path)!r}: only .safetensors files are read and written")
    return Path(path)


def temporal_loss(scores: Tensor, patches: Tensor, previous: Tensor, found: Tensor, coefficient: float = 0.5) -> Tensor:
    """Mean square difference of scores (B, N) and change (1 - cosine of all the token's patches with its predecessor's), times ``coefficient``.

    Over tokens that have a predecessor. The change is a target: no gradient flows through it.
    """
    features = patches.detach().flatten(2)
    change = 1 - F.cosine_similarity(features, gather_tokens(features, previous), dim=-1)
    return coefficient * ((scores - change) ** 2 * found).sum() / found.sum().clamp(min=1)


@dataclass(frozen=True)
class SpatioTemporal:
    """Scores by a trained net; every token of the first frame comes before all others.

    Attributes:
        net: called as `SpatioTemporalNet` is.
        layer: vision block whose output it looks at.
    """

    net: nn.Module
    layer: int

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The patches of each token."""
        return (Tap("patch_states", self.layer),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N); with gradients if there are any."""
        if inputs.grid is None:
            raise OptionError("comparing frames needs the frame, row and column of every token, but this model gives no grid")
        patches = inputs.signal(self.needs[0])
        self.net.to(patches.device)
        like: Any = next(self.net.parameters(), patches.float())
        previous, found = same_cell_before(inputs.grid)
        scores = self.net(patches.to(like.dtype), previous, found).float()
        return torch.where(inputs.grid[..., 0] <= 0, scores + FIRST_FRAME, scores)

    def flops(self, inputs: ScoreInputs) -> float:
        """Matrix products of one call."""
        patches = inputs.signal(self.needs[0])
        members, width = patches.shape[2:]
        hidden = getattr(self.net, "hidden", 0)
        pooling = 2 * width**2 + 2 * members * width**2 + 2 * members * width
        return 2.0 * patches.shape[0] * patches.shape[1] * (pooling + 2 * width * hidden + hidden**2 + hidden)
