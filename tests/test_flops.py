"""The counts against torch's own counter and against the numbers that papers print."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlprune
from tests.tiny import families
from vlprune.flops import paper_flops


def test_the_papers_baselines() -> None:
    """LLaVA-1.5-7B at 576 and LLaVA-NeXT-7B at 2,880 tokens (TransPrune and PyramidDrop tables: 3.82 and 20.83 TFLOPs)."""
    assert paper_flops(576, 32, 4096, 11008) == pytest.approx(3.817e12, rel=1e-3)
    assert paper_flops(2880, 32, 4096, 11008) == pytest.approx(20.83e12, rel=1e-3)


@pytest.mark.parametrize("keep", [1 / 9, 0.5])
def test_against_the_counter_of_torch(keep: float) -> None:
    """Eager attention computes every pair and masks half of it; take that half off, and both counts agree."""
    family = families()["llava"]
    model = family.build("eager")
    prompt = family.prompt([[3, "image", 4]])
    counted = {}
    for name in ("dense", "random"):
        with vlprune.apply(model, "random", keep=keep) as handle, torch.no_grad(), FlopCounterMode(display=False) as counter:
            if name == "dense":
                handle.remove()
            model(**prompt, logits_to_keep=1)
        counted[name] = counter.get_total_flops()
        report = handle.report() if name == "random" else None
    assert report is not None
    length, kept = 43, 7 + report.points[0].visual_kept
    projector = 2 * 36 * (32 * 32 + 32 * 32)
    patches = 2 * 36 * 48 * 32
    for name, mine, tokens in (("dense", report.flops_dense, length), ("random", report.flops_pruned, kept)):
        masked = 4 * 4 * 32 * (tokens**2 - tokens * (tokens + 1) / 2)
        assert counted[name] == mine + masked + projector + patches
