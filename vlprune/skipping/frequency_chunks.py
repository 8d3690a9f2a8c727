"""Which frequencies of a rotary embedding rank keys as the whole logit does, layer by layer and head by head: what `fasa` goes by.

    vlprune calibrate --method fasa --model FOLDER --samples texts.jsonl --out chunks
    vlprune.apply(model, "fasa", chunks=0.25, calibration="chunks")

Reference: FASA, arXiv:2602.03152. A rotated query and key meet in a sum over *frequency chunks*, the pairs of numbers that turn
together. The agreement of a chunk is the share of the keys with the ``top`` highest logits that are also among those with the ``top`` highest scores of the
chunk alone; here the mean over the last ``queries`` tokens of each text and over the texts.

Which numbers make a pair is read off the model's own rotation (halves, neighbours, parts that do not turn), so multimodal rotations (Qwen-VL, whose pairs turn
by time, height or width) need nothing else; but their agreement has to be measured on such a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import OptionError
from vlprune.hooks import HookSet
from vlprune.method import Attend, PruningMethod
from vlprune.protocols import HeadInputs
from vlprune.skipping.layers import decoder_layers
from vlprune.skipping.running_sums import Progress, RunningSums

KIND = "vlprune.frequency_chunks"
OPTION = "calibration"
FILE = "frequency_chunks.safetensors"
TOP, QUERIES = 256, 16


def chunk_pairs(turned: Tensor) -> Tensor:
    """(C, 2) the numbers of a head that turn together, from ``turned`` (d, d), the unit vectors after a rotation; those that stay are paired in order."""
    width = turned.shape[0]
    others = (turned.abs() > 1e-9) & ~torch.eye(width, dtype=torch.bool, device=turned.device)
    pairs, alone = [], []
    for place in range(width):
        partner = others[place].nonzero().flatten().tolist()
        if not partner:
            alone.append(place)
        elif place < partner[0]:
            pairs.append((place, partner[0]))
    pairs += [(first, second) for first, second in zip(alone[::2], alone[1::2], strict=False)]
    return torch.tensor(pairs)


def rotation_pairs(attn: nn.Module, width: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(C, 2) pairs of a module's rotation, tried out on unit vectors with the cosines and sines (B, L, d) of a token that is turned."""
    from vlprune.adapters._attention import rotate

    cos, sin = (part[..., -1:, :].double() for part in rotary)
    units = torch.eye(width, dtype=torch.float64, device=cos.device)
    turned = [rotate(attn, unit[None, None, None], cos[..., :1, :, :], sin[..., :1, :, :])[0, 0, 0] for unit in units]
    return chunk_pairs(torch.stack(turned))


def chunk_scores(queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    """(C, ..., Q, S): what each chunk adds to the logits of ``queries`` (..., Q, d) on ``keys`` (..., S, d), scale aside. Their sum is the whole logit."""
    return torch.stack([queries[..., pair] @ keys[..., pair].transpose(-1, -2) for pair in pairs])


def agreement(queries: Tensor, keys: Tensor, places: Tensor, pairs: Tensor, top: int) -> Tensor:
    """(H, C) float64: mean over the queries of how many of the best keys each chunk finds.

    Args:
        queries: (H, Q, d) rotated.
        keys: (H, S, d) rotated.
        places: (Q,) where the queries stand; each sees the keys up to there.
        pairs: (C, 2).
        top: how many keys count as the best; less than what the first query sees.
    """
    later = torch.arange(keys.shape[1], device=keys.device) > places[:, None]                    # (Q, S)
    whole = (queries @ keys.transpose(-1, -2)).masked_fill(later, -torch.inf)
    best = torch.zeros_like(whole, dtype=torch.bool).scatter(-1, whole.topk(top, dim=-1).indices, True)
    shares = []
    for pair in pairs:
        score = (queries[..., pair] @ keys[..., pair].transpose(-1, -2)).masked_fill(later, -torch.inf)
        shares.append(torch.gather(best, -1, score.topk(top, dim=-1).indices).double().mean(dim=(-1, -2)))
    return torch.stack(shares, dim=-1)


@dataclass
class Looking:
    """Adds up the agreement of one layer whenever a prompt passes."""

    sums: RunningSums
    top: int
    queries: int
    pairs: dict[str, Tensor]

    def __call__(self, inputs: HeadInputs) -> None:
        """Look, and choose nothing."""
        if inputs.real is None or inputs.past:
            return
        groups = inputs.queries.shape[1] // inputs.keys.shape[1]
        for row, real in enumerate(inputs.real):
            queries, keys = (part[row][:, real].float() for part in (inputs.queries, inputs.keys))
            number = queries.shape[1]
            asked = min(self.queries, number // 2)
            first = number - asked
            top = min(self.top, (first + 1) // 2)                        # at most half of what the first of them sees
            if asked < 1 or top < 1:
                continue
            places = torch.arange(first, number, device=keys.device)
            found = agreement(queries[:, first:], keys.repeat_interleave(groups, dim=0), places, self.pairs["pairs"].to(keys.device), top)
            self.sums.add(f"agreement.{inputs.layer}", found * asked)
            self.sums.add(f"queries.{inputs.layer}", float(asked))


@torch.no_grad()
def calibrate(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    progress: Progress | None = None,
    resume: bool = True,
    top: int = TOP,
    queries: int = QUERIES,
) -> Path:
    """Measure and write ``frequency_chunks.safetensors`` in the folder ``out``. A finished file is left as it is.

    Args:
        model: dense, in evaluation mode.
        inputs: calls with texts (and pictures, of a model that sees); the paper's are from qasper.
        out: folder.
        progress: told ``(done, total, what)``.
        resume: go on from what a stopped run left there.
        top: how many keys count as the best, at most half of a text.
        queries: how many of the last tokens of a text ask.

    Raises:
        OptionError: no texts, numbers that do not fit, or a file of other numbers.
    """
    from safetensors.torch import save_file

    from vlprune.adapters._decoder_taps import attention_of
    from vlprune.api import apply

    for name, value in (("top", top), ("queries", queries)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}: a whole number from 1")
    target, layers = Path(out) / FILE, decoder_layers(model)
    setup = {"what": "frequency chunks", "layers": len(layers), "model": type(model).__name__, "top": top, "queries": queries}
    if resume and target.exists():
        if load_chunks(target, len(layers)).setup not in ("", str(setup)):
            raise OptionError(f"{target} was measured with other numbers: choose another folder, the same numbers, or start anew")
        return Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    sums = RunningSums(target.with_name("sums.safetensors"), setup, resume=resume)
    pairs: dict[str, Tensor] = {"pairs": sums.tensors["pairs"].long()} if "pairs" in sums.tensors else {}
    hooks, look = HookSet(), Looking(sums, top, queries, pairs)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        rotary = kwargs.get("position_embeddings")
        if not pairs and rotary is not None:
            pairs["pairs"] = rotation_pairs(module, int(getattr(module, "head_dim", 0) or rotary[0].shape[-1]), rotary)
            sums.add("pairs", pairs["pairs"])
        elif not pairs:
            raise OptionError(f"{type(module).__name__} rotates nothing by position, so it has no frequency chunks")

    try:
        hooks.before(attention_of(layers[0]), note)
        attends = tuple(Attend(number, choose=look, tokens="all", stateless=True) for number in range(len(layers)))
        with apply(model, PruningMethod("frequency_chunks", attends=attends)):
            for call in sums.over(inputs, progress):
                model(**call)
    finally:
        hooks.remove()
    if any(f"queries.{number}" not in sums.tensors for number in range(len(layers))):
        raise OptionError("no text was long enough: at least two tokens are needed")
    found = torch.stack([sums.tensors[f"agreement.{number}"] / sums.tensors[f"queries.{number}"] for number in range(len(layers))])
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    save_file({"agreement": found.float(), "pairs": pairs["pairs"].cpu()}, beside, metadata={"kind": KIND, "setup": str(setup), "texts": str(sums.done)})
    os.replace(beside, target)
    sums.forget()
    return Path(out)


@dataclass(frozen=True)
class Chunks:
    """What was measured.

    Attributes:
        agreement: (L, H, C) float32. pairs: (C, 2) numbers of a head that make each chunk. setup: numbers it was measured with.
    """

    agreement: Tensor
    pairs: Tensor
    setup: str = ""

    def dominant(self, layer: int, number: int) -> Tensor:
        """(H, d) ones at the numbers of each head's best ``number`` chunks in a layer, zeros elsewhere."""
        heads, width = self.agreement.shape[1], 2 * self.pairs.shape[0]
        best = self.agreement[layer].topk(number, dim=-1).indices        # (H, F)
        return torch.zeros(heads, width).scatter(1, self.pairs[best].flatten(1), 1.0)

    def above(self, layer: int, ratio: float, fewest: int, most: int) -> Tensor:
        """(H, d) ones at the numbers of the chunks that agree at least as well as the quantile ``ratio`` of all that the layer's heads have.

        So heads in which more chunks agree well rank by more of them: each by at least its ``fewest`` best and at most its ``most`` best.
        """
        found = self.agreement[layer]                                        # (H, C)
        number = (found >= found.flatten().quantile(ratio)).sum(dim=-1, keepdim=True).clamp(min=fewest, max=most)
        order = found.argsort(dim=-1, descending=True, stable=True)
        taken = (torch.arange(found.shape[1]) < number).float()[..., None].expand(-1, -1, 2)
        return torch.zeros(found.shape[0], 2 * self.pairs.shape[0]).scatter(1, self.pairs[order].flatten(1), taken.flatten(1))


def load_chunks(path: str | os.PathLike[str], depth: int) -> Chunks:
    """What was measured for all ``depth`` layers, from such a file or its folder; or say what is wrong."""
    from safetensors import SafetensorError, safe_open

    source = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(str(source), framework="pt") as file:
            header = file.metadata() or {}
            known = header.get("kind") == KIND
            found = Chunks(file.get_tensor("agreement"), file.get_tensor("pairs"), header.get("setup", "")) if known else None
    except (OSError, SafetensorError) as error:
        raise OptionError(f"calibration={str(path)!r} cannot be read: {error}. Measure it with vlprune calibrate --method fasa") from error
    if found is None:
        raise OptionError(f"{source} does not hold frequency chunks as vlprune calibrate --method fasa writes them")
    if found.agreement.shape[0] != depth:
        raise OptionError(f"calibration={str(path)!r} holds {found.agreement.shape[0]} layers, and this model has {depth}: measure it on this model")
    return found
