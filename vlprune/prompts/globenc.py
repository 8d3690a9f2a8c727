"""GlobEnc: how much each token of a sentence reaches CLS through a BERT-like encoder, by norms of decomposed vectors and a rollout over layers.

Reference: GlobEnc, NAACL 2022, https://aclanthology.org/2022.naacl-main.19. Official code: https://github.com/mohsenfayyaz/GlobEnc (not read)

In a layer, what token j adds to token i is ``sum over heads of attention[i, j] * value_j * W_O``, and the residual ``x_i`` where i is j. Both layer norms are
linear once their statistics are those of the undivided vector, so the parts go through the first, skip the feed-forward net, and go through the second; their
lengths are the matrix of the layer (N x N). The matrices are multiplied from the first layer to the last; the row of CLS over its largest entry is the score.

Not settled by what is written here, each an option or a plain choice:
- Each matrix has its rows scaled to sum 1 before the product, as in attention rollout (``normalise=False``: as they are).
- The feed-forward net cannot be divided; it enters only through the statistics of the second norm. The bias of the values goes with the attention
  (its weights sum to 1), the bias of the output projection with nobody.
- The largest entry is taken over all tokens, CLS and SEP too.

Attention is computed anew from the query and key projections, so the model keeps its attention kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError, UnsupportedModelError
from vlprune.hooks import HookSet
from vlprune.prompts.words import TokenScores

ROWS = 32                                                                # rows of a matrix at a time, so that memory is linear in the sentence


class Seen(NamedTuple):
    """What a layer was given and made on the way, each (N, D)."""

    inputs: Tensor
    before_first_norm: Tensor
    before_second_norm: Tensor


@dataclass(frozen=True)
class GlobEnc:
    """An attribution for `vlprune.prompts.FrugalPrompt`: ``text -> TokenScores``.

    Attributes:
        model: BERT, RoBERTa, XLM-R, ELECTRA or another encoder built from the same layers, with or without a head, in evaluation mode.
        tokenizer: its own, a fast one.
        normalise: whether rows sum to 1 before matrices are multiplied.
    """

    model: nn.Module
    tokenizer: Any
    normalise: bool = True

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise OptionError(f"GlobEnc needs the encoder's fast tokenizer, which gives offsets; {type(self.tokenizer).__name__} does not")
        encoder_layers(self.model)

    def __call__(self, text: str) -> TokenScores:
        """Scores of all sub-words; a sentence longer than the model takes is scored in pieces."""
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        roomy = limit - (padding + 1 if "roberta" in str(getattr(self.model.config, "model_type", "")) else 0)  # RoBERTa counts places from there
        given = self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=roomy, return_overflowing_tokens=True, stride=0)
        offsets: list[tuple[int, int]] = []
        scores: list[float] = []
        for row, places in enumerate(given["offset_mapping"]):
            names = [name for name in self.tokenizer.model_input_names if name in given]
            offsets += [(int(start), int(end)) for start, end in places]
            scores += self.scores({name: torch.tensor([given[name][row]]) for name in names}).tolist()
        return TokenScores(offsets, scores)

    @torch.inference_mode()
    def scores(self, inputs: dict[str, Tensor]) -> Tensor:
        """(N,) of one sentence without padding, the largest being 1."""
        device = next(self.model.parameters()).device
        rolled: Tensor | None = None
        for layer, seen in watched(self.model, {name: value.to(device) for name, value in inputs.items()}):
            matrix = norms(layer, seen)                                                  # (N, N)
            if self.normalise:
                matrix = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
            rolled = matrix if rolled is None else matrix @ rolled
        assert rolled is not None
        return rolled[0] / rolled[0].max()


def encoder_layers(model: nn.Module) -> list[Any]:
    """The encoder's layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_is_bert_layer(layer) for layer in module):
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no layers like BERT's (attention.self.query, attention.output.LayerNorm, output.LayerNorm). GlobEnc takes BERT, RoBERTa, "
        "XLM-R, ELECTRA and the like; for other encoders give FrugalPrompt an attribution of your own."
    )


def _is_bert_layer(layer: nn.Module) -> bool:
    try:
        norms_there = all(isinstance(layer.get_submodule(name), nn.LayerNorm) for name in ("attention.output.LayerNorm", "output.LayerNorm"))
        return norms_there and all(isinstance(layer.get_submodule(f"attention.{name}"), nn.Linear) for name in ("self.query", "self.value", "output.dense"))
    except AttributeError:
        return False


def watched(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[Any, Seen]]:
    """Run the model once and go through its layers with what they saw."""
    layers = encoder_layers(model)
    found: dict[tuple[int, str], Tensor] = {}

    def keep(place: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[place, name] = (args[0] if args else next(iter(kwargs.values())))[0].float()

        return hook

    hooks = HookSet()
    try:
        for place, layer in enumerate(layers):
            for name, module in (("in", layer), ("first", layer.attention.output.LayerNorm), ("second", layer.output.LayerNorm)):
                hooks.before(module, keep(place, name))
        model(**inputs)
    finally:
        hooks.remove()
    for place, layer in enumerate(layers):
        yield layer, Seen(*(found[place, name] for name in ("in", "first", "second")))


def parts_of(layer: Any, seen: Seen, rows: slice) -> Tensor:
    """(R, N, D) what each of N tokens adds to ``rows`` in front of the layer's first norm."""
    own, x = layer.attention.self, seen.inputs
    heads = own.num_attention_heads

    def split(linear: Any, states: Tensor) -> Tensor:
        made = nn.functional.linear(states, linear.weight.float(), linear.bias.float())
        return made.reshape(made.shape[0], heads, -1).transpose(0, 1)

    query, key, value = split(own.query, x[rows]), split(own.key, x), split(own.value, x)     # (H, R or N, d)
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)               # (H, R, N)
    out = layer.attention.output.dense.weight.float().unflatten(1, (heads, -1)).permute(1, 2, 0)      # (H, d, D)
    parts = torch.einsum("hrn,hnd->rnd", attention, value @ out)
    places = torch.arange(x.shape[0], device=x.device)[rows]
    parts[torch.arange(len(places), device=x.device), places] += x[rows]
    return parts


def through_norm(parts: Tensor, norm: Any, whole: Tensor) -> Tensor:
    """Parts (R, N, D) of ``whole`` (R, D) behind a layer norm, its bias left out."""
    deviation = (whole.var(dim=-1, unbiased=False) + norm.eps).sqrt()[:, None, None]
    normed: Tensor = (parts - parts.mean(dim=-1, keepdim=True)) / deviation * norm.weight.float()
    return normed


def norms(layer: Any, seen: Seen) -> Tensor:
    """(N, N) lengths of what each token adds to each behind the layer's second norm."""
    out = []
    for start in range(0, seen.inputs.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        parts = through_norm(parts_of(layer, seen, rows), layer.attention.output.LayerNorm, seen.before_first_norm[rows])
        out.append(through_norm(parts, layer.output.LayerNorm, seen.before_second_norm[rows]).norm(dim=-1))
    return torch.cat(out)
