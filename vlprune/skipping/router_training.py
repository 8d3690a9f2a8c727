"""What a router of tokens (FTP's) is trained with: features from the pruned model, a relaxed forward that lets gradients through, and three losses.

The paper (arXiv:2412.11494) has a guide loss, an asymmetric sparsity loss and a distillation loss, and their formulas are not in what we could read. These
are ours; s is the router's logit of a token in a block, K of the N tokens of the prompt are to run there:

* guide: cross entropy of sigmoid(s) with "is among the K that a ranking puts first", the mean over the static order and the last token's attention;
* sparsity: max(0, mean of sigmoid(s) - K / N), which is 0 where fewer would run than may: only missing the target costs;
* distillation: KL of the next-token distribution from the untouched model's, behind the prompt, in a relaxed forward: a token runs by the share
  g = sigmoid((s + noise) / temperature), logistic noise, so that what the block adds to it is times g, and its weight as a key is times g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlprune
from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.skipping.layers import decoder_layers

PROTECTED = 1                   # the first and the last token of a prompt always run; the router does not see them


class Recorder(nn.Module):
    """A router that remembers the features it was asked with, one tensor (B, N, 4) for each block in turn."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.seen = router, list[Tensor]()

    def forward(self, features: Tensor) -> Tensor:
        """The router's logits."""
        self.seen.append(features.detach())
        return self.router(features)  # type: ignore[no-any-return]


@torch.no_grad()
def recorded(model: nn.Module, router: nn.Module, prompt: Tensor, keep: float, budgets: Sequence[Keep] | None) -> dict[int, Tensor]:
    """Features (B, N, 4) by layer, as the router meets them at work: the layers below have run what it chose there.

    Args:
        model: unpruned; left as it was.
        router: as it is now.
        prompt: (B, P) token ids without padding.
        keep: as `vlprune.methods.ftp.ftp` takes it.
        budgets: likewise.
    """
    recorder = Recorder(router)
    with vlprune.apply(model, "ftp", keep=keep, budgets=budgets, router=recorder) as handle:
        layers = [bypass.layer for bypass in handle.method.bypasses]
        model(input_ids=prompt, use_cache=False)
    return dict(zip(layers, recorder.seen, strict=True))


def relaxed_logits(model: nn.Module, ids: Tensor, logits: dict[int, Tensor], prompt: int, temperature: float, noise: torch.Generator | None = None) -> Tensor:
    """(B, L, V) of a forward in which the prompt's tokens run by shares; those behind it and its first and last run whole.

    Args:
        model: unpruned, frozen; left as it was.
        ids: (B, L) token ids without padding, the first ``prompt`` of which are the prompt.
        logits: (B, prompt - 2) router's, by layer.
        prompt: its length.
        temperature: of the shares; small ones are near 0 or 1.
        noise: source of the logistic noise; ``None``: none.

    Raises:
        OptionError: the model's attention takes no numbers in its mask.
    """
    length = ids.shape[1]
    if (used := model.config._attn_implementation) not in ("sdpa", "eager"):  # type: ignore[union-attr, operator]
        raise OptionError(f"attention {used!r} weighs no keys: load the model with attn_implementation='sdpa' or 'eager'")
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    hooks, layers = HookSet(), decoder_layers(model)
    entering: dict[int, Tensor] = {}

    def attach(number: int, logged: Tensor) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            entering[number] = args[0] if args else kwargs["hidden_states"]
            given = kwargs.get("attention_mask")
            floor = _as_added(causal if given is None else given, entering[number].dtype)
            return args, {**kwargs, "attention_mask": floor + logged[:, None, None, :].to(floor.dtype)}

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            out = entering[number] + logged.exp()[..., None].to(out.dtype) * (out - entering[number])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        hooks.before(layers[number], before)
        hooks.after(layers[number], after)

    try:
        for number, given in logits.items():
            shaken = given
            if noise is not None:
                drawn = torch.rand(given.shape, generator=noise).clamp(1e-6, 1 - 1e-6).to(given.device)
                shaken = given + drawn.log() - (1 - drawn).log()
            attach(number, F.pad(F.logsigmoid(shaken / temperature), (PROTECTED, length - prompt + PROTECTED)))
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        hooks.remove()


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the attention's logits; half of the lowest one, which more may be added to, where nothing is seen."""
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min / 2)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min / 2)


def wanted(features: Tensor, guide: str) -> Tensor:
    """(B, N) what the guide asks for: 1 where a ranking has the token among the K that run, 0 elsewhere.

    Args:
        features: see `vlprune.scorers.token_router.router_features`.
        guide: ``"static"`` (the last ones; the first token is no router's business), ``"attention"``, or ``"both"``, their mean.
    """
    number = features.shape[1]
    most = round(number * (1.0 - float(features[0, 0, 3])))
    masks = []
    for name, column in (("static", 0), ("attention", 1)):
        if guide in (name, "both"):
            best = features[..., column].topk(most, dim=1).indices
            masks.append(torch.zeros_like(features[..., 0]).scatter(1, best, 1.0))
    return torch.stack(masks).mean(0)


def guide_loss(logits: dict[int, Tensor], features: dict[int, Tensor], guide: str = "both") -> Tensor:
    """Cross entropy with what the guide asks for, mean over tokens and layers."""
    return torch.stack([F.binary_cross_entropy_with_logits(logits[layer], wanted(features[layer], guide)) for layer in logits]).mean()


def sparsity_loss(logits: dict[int, Tensor], features: dict[int, Tensor]) -> Tensor:
    """By how much the share that would run exceeds the one that may, 0 where it does not; mean over layers."""
    return torch.stack([F.relu(torch.sigmoid(logits[layer]).mean() - (1.0 - features[layer][0, 0, 3])) for layer in logits]).mean()


def distillation_loss(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL of (..., V) logits' distribution from the untouched model's, in nats, mean over places."""
    return F.kl_div(pruned.float().log_softmax(-1), dense.float().log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
