"""STTS: the scorer, the choice, the key bias and the packing of a video's frames."""

from __future__ import annotations

import torch
from golden_case import Case, apart, differ, grid_of, run_stage
from torch import Tensor

from vlprune.kernels.packing import pack_pictures
from vlprune.method import ModelFacts
from vlprune.methods.stts import stts
from vlprune.protocols import ScoreInputs
from vlprune.scorers.spatio_temporal import SpatioTemporalNet

FACTS = ModelFacts(vision_layers=27, feature_layer=26)


def check(case: Case) -> str:
    """By the kind of case."""
    return {"scorer": _scorer, "rearrange": _packing, "select": _choice}[case.name.partition("_")[0]](case)


def _net(case: Case) -> SpatioTemporalNet:
    hyper = case.hyper
    net = SpatioTemporalNet(hyper["D"], hyper["heads"], hyper["mlp"])
    net.load_state_dict({name.removeprefix("in.w."): value for name, value in case.tensors.items() if name.startswith("in.w.")})
    return net.eval()


def _cells(x: Tensor, indices: Tensor) -> Tensor:
    """(1, cells, 9, D) of all frames, zeros for missing patches."""
    flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])])
    return flat[indices][None]                                           # -1 is the row of zeros


def _scorer(case: Case) -> str:
    frames, cells = case["out.scores"].shape
    side = int(cells**0.5)
    stage = stts(FACTS, weights=_net(case)).stages[0]
    patches = _cells(case["in.x"], case["in.pooled_patches_idx"])
    inputs = ScoreInputs(patches.mean(dim=2), 1, grid_of(frames, side, side), modality="video", signals={stage.needs[0]: patches})
    with torch.no_grad():
        scores = stage.scorer(inputs).view(frames, cells)
    scores[0] -= 1                                                       # the first frame comes before all others
    return apart("out.scores", scores, case["out.scores"], 1e-5)


def _choice(case: Case) -> str:
    x, hyper = case["in.x"], case.hyper
    frames, cells = case["out.keep_cells"].shape
    side = int(cells**0.5)
    numbers = torch.arange(x.shape[0] * x.shape[1]).view(frames, side, 3, side, 3).transpose(2, 3).reshape(-1, 9)
    stage = stts(FACTS, weights=_net(case), variant="code").stages[0]
    patches, grid = _cells(x, numbers), grid_of(frames, side, side)
    num_keep = frames * cells - hyper["prune_count"]
    if stts(FACTS, 1 - hyper["prune_fraction"], weights=_net(case)).stages[0].budget.num_keep(frames * cells, frames) != num_keep:
        return "the budget keeps another number"
    with torch.no_grad():
        kept = run_stage(stage, [patches], grid=grid, num_keep=num_keep, modality="video").keep_indices[0]
        inputs = ScoreInputs(patches.mean(dim=2), num_keep, grid, modality="video", signals={stage.needs[0]: patches})
        bias = stage.video.key_bias(stage.scorer(inputs), inputs)[0]
    found = differ("out.keep_indices", kept, case["out.keep_indices"])
    patch_bias, valid = torch.zeros(x.shape[0] * x.shape[1]), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.bool)
    patch_bias[numbers] = bias[:, None].expand(-1, 9)
    valid[numbers[kept]] = True
    valid = valid.view(x.shape[:2])
    if not torch.allclose(patch_bias.view(frames, 1, 1, -1), case["out.attn_bias"], rtol=1e-4, atol=1e-6):
        found = found or "out.attn_bias differs"
    packing = pack_pictures(valid, valid.sum(dim=1).tolist(), refill=True)
    through = packing.unpack(packing.pack(x), torch.zeros_like(x))       # blocks that do nothing
    same = torch.equal(through, case["out.final_hidden"])
    return found or differ("out.valid_mask", valid.long(), case["out.valid_mask"].long()) or ("" if same else "out.final_hidden differs")


def _packing(case: Case) -> str:
    valid = case["in.valid_mask"].bool()
    packing = pack_pictures(valid, valid.sum(dim=1).tolist(), refill=True)
    length = packing.segments.shape[1]
    places = torch.stack([packing.places // length, packing.places % length], dim=-1) * packing.kept[..., None]
    mask = packing.mask & (packing.segments >= 0)[:, None, None, :]      # empty places: ours see each other, theirs nobody
    return (
        differ("out.new_locs", places, case["out.new_locs"])
        or differ("out.refill_mask", packing.context.long(), case["out.refill_mask"].long())
        or differ("out.attn_mask", mask.long(), case["out.attn_mask"].long())
        or ("" if torch.equal(packing.pack(case["in.x"]), case["out.packed"]) else "out.packed differs")
    )
