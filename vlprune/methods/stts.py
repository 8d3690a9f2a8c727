"""STTS: inside the vision tower, a small trained net scores the visual tokens of a video; the worst of the whole video leave tower and LLM.

Reference: "Unified Spatio-Temporal Token Scoring", arXiv:2603.18004.
Official code: https://github.com/allenai/molmo2 (`olmo/nn/temporal_image_vit.py`, `olmo/nn/temporal_vision_backbone.py`)

Convention: the paper's ``prune_at`` 3 is our ``layer``, the block whose output is scored, counted from 0 and scaled to a tower of 27. Block
``layer + 1`` still runs on everything, with the scores as a bias on its keys; tokens leave at ``VisionLayer(layer + 2)``. The paper's share
``topk`` is what leaves: its 0.5 is ``keep=0.5``, its 0.3 ``keep=0.7``. A visual token leaves with all the patches that it is pooled from, so
it is gone from the LLM as well, and no second scorer is needed. The first frame stays whole.

Training: pruning is the same in training mode, the bias carries the gradient of the task's loss to the net, and ``net.temporal_loss`` is to be
added to it. ``examples/train_stts.py`` does it with the Trainer of transformers; the model itself may be trained along or stay frozen.

Differences:
- ``variant="paper"`` (default): the bias is stretched within a frame, and a frame alone in its row sees only what it kept, so that nothing
  depends on which frames happen to share a row or a batch. ``variant="code"``: as released, within each row of patches, and such a frame goes
  on seeing what it lost.
- The number kept is the rounded share (released: all but the floor of the share that leaves). A share below one frame's worth keeps one
  frame's worth; a number is taken at its word.
- Where pooled tokens overlap in their patches (bilinear pooling), a patch belongs to the nearest token, and a token that stays looks at the
  state its dropped neighbours had when they left (released: zeros; but there, tokens do not overlap).
- Only the block before the drop gets the bias. The paper's abstract speaks of one scorer for tower and LLM; the released code has no other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage, VideoDrop
from vlprune.points import Depth, VisionLayer
from vlprune.reducers import Drop
from vlprune.scorers.soft_key_bias import SoftKeyBias
from vlprune.scorers.spatio_temporal import SpatioTemporal, SpatioTemporalNet
from vlprune.selectors import TopK

LAYER = Depth(3, of=27)
VARIANTS = ("paper", "code")


def stts(
    facts: ModelFacts, keep: Keep = 0.5, *, weights: str | Path | nn.Module | None = None, layer: int | None = None, variant: str = "paper"
) -> PruningMethod:
    """Score a video's tokens inside the tower and drop the worst there and in the LLM.

    Args:
        facts: of the model.
        keep: share of the visual tokens of a whole video, at least one frame's worth; or their number.
        weights: of the scorer, trained on this tower: a ``.safetensors`` file of ``SpatioTemporalNet.save``, or the module itself (for training).
        layer: vision block, counted from 0, whose output is scored; by default the one the weights were trained on, if they say so, else a ninth
            of the way up.
        variant: ``"paper"``, or ``"code"`` with the released program's quirks.
    """
    if variant not in VARIANTS:
        raise OptionError(f"variant={variant!r}: 'paper' or 'code'")
    last = facts.feature_layer - 2
    if last < 0:
        raise OptionError(f"scores, bias and drop take three vision blocks up to the one with the features, but here that is block {facts.feature_layer}")
    net = given_net(weights)
    trained_on = getattr(net, "layer", None)
    if layer is None:
        layer = trained_on if isinstance(trained_on, int) else min(LAYER.resolve(facts.vision_layers), last)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
        raise OptionError(f"layer={layer!r}: a vision block from 0 to {last}; the two after it get the bias and the drop, the features come from {last + 2}")
    if isinstance(trained_on, int) and trained_on != layer:
        raise OptionError(f"layer={layer}, but these weights were trained on the output of vision block {trained_on}; leave `layer` out")
    video = VideoDrop(SoftKeyBias("frame" if variant == "paper" else "row"), refill=variant == "code")
    budget = Budget(keep, at_least_one_frame=True)
    return PruningMethod("stts", (Stage(VisionLayer(layer + 2), SpatioTemporal(net, layer), TopK(stable=True), Drop(), budget, video=video),))


def given_net(weights: str | Path | nn.Module | None) -> nn.Module:
    """The scorer from what the user gave."""
    if weights is None:
        raise OptionError(
            "stts needs a trained scorer: weights=FILE.safetensors. Train one for your model as examples/train_stts.py does, or give a module "
            "(vlprune.scorers.spatio_temporal.SpatioTemporalNet) to train it yourself."
        )
    if isinstance(weights, nn.Module):
        return weights
    if not isinstance(weights, (str, Path)):
        raise OptionError(f"weights={type(weights).__name__}: the path of a .safetensors file, or a module")
    return SpatioTemporalNet.load(weights)


class Untrained(nn.Module):
    """Random weights of whatever width the tower has: for tests, worth nothing else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, patches: Tensor, previous: Tensor, found: Tensor) -> Tensor:
        """(B, N)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = SpatioTemporalNet(patches.shape[-1], 1, 32).to(patches.device)
        return net.eval()(patches, previous, found)  # type: ignore[no-any-return]


CARD = MethodCard(
    "stts",
    stts,
    "what a trained scorer of change and content wants of a video, inside tower and LLM (weights needed)",
    paper="arXiv:2603.18004",
    code="https://github.com/allenai/molmo2",
    points=("vision:K",),
    needs=("patch_states",),
    modality="video",
    default_keep=0.5,
    golden=("stts",),
    test_options={"weights": Untrained()},
)
