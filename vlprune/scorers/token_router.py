"""TokenRouter: a small trainable net that scores tokens by place, attention, rank of that attention, and the budget (FTP's router)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.protocols import ScoreInputs, Tap

FEATURES = 4


class TokenRouter(nn.Module):
    """Two layers on four numbers a token, shared by all decoder layers. Its output is the logit of keeping the token.

    Args:
        hidden: width of the layer between.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.net = nn.Sequential(nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, N) logits for (B, N, 4) features, see `router_features`."""
        return self.net(features).squeeze(-1)  # type: ignore[no-any-return]


def router_features(inputs: ScoreInputs, attention: Tensor) -> Tensor:
    """(B, N, 4) float32: place in the row, attention of the last token times N, rank of it (1 is the most), and the share that has to leave."""
    batch, number = attention.shape
    places = torch.arange(number, device=attention.device) if inputs.original is None else inputs.original
    place = places.float().expand(batch, -1) / max(inputs.num_original - 1, 1)
    rank = attention.argsort(dim=1, stable=True).argsort(dim=1).float() / max(number - 1, 1)
    sparsity = torch.full_like(place, 1.0 - inputs.num_keep / max(number, 1))
    return torch.stack([place, attention * number, rank, sparsity], dim=-1)


class RouterScore:
    """Scores of a router for the tokens of one layer, from the last token's attention in that layer."""

    def __init__(self, router: nn.Module, layer: int) -> None:
        self.router, self.layer = router, layer

    @property
    def needs(self) -> tuple[Tap, ...]:
        """The last token's attention row."""
        return (Tap("last_row", self.layer),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) logits of keeping."""
        features = router_features(inputs, inputs.signal(self.needs[0]))
        weight = next(self.router.parameters())
        if weight.device != features.device:
            self.router.to(features.device)
        return self.router(features.to(weight.dtype)).float()  # type: ignore[no-any-return]


def save_router(router: TokenRouter, path: str | os.PathLike[str], **notes: Any) -> Path:
    """Write a router to a safetensors file; ``notes`` (plain numbers and words) go into its header."""
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in router.state_dict().items()}
    save_file(tensors, target, metadata={"kind": "vlprune.token_router", "hidden": str(router.hidden), "notes": json.dumps(notes)})
    return target


def load_router(path: str | os.PathLike[str]) -> TokenRouter:
    """Read a router, or say what is wrong with the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with _opened(safe_open(str(path), framework="pt")) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise OptionError(f"router={str(path)!r} cannot be read: {error}") from error
    if header.get("kind") != "vlprune.token_router":
        raise OptionError(f"router={str(path)!r} is no router of vlprune: save one with vlprune.scorers.token_router.save_router")
    router = TokenRouter(int(header["hidden"]))
    router.load_state_dict(tensors)
    return router.eval()


@contextmanager
def _opened(file: Any) -> Iterator[Any]:
    with file as handle:
        yield handle
