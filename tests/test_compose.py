"""Several methods at once: a stage before the decoder, then stages in it."""

from __future__ import annotations

import pytest
import torch

import vlprune
from tests.tiny import families
from vlprune.errors import OptionError


def test_a_share_is_what_is_left_in_the_end() -> None:
    tiny = families()["llava"]
    model = tiny.build()
    inputs = tiny.prompt([[3, "image", 4]])
    with vlprune.apply(model, ["hiprune", "transprune"], keep=0.25) as handle, torch.no_grad():
        model(**inputs)
        points = handle.report().points
    assert points[0].point == "before_llm"
    assert points[0].visual_kept == 18            # 36 * sqrt(0.25)
    assert points[-1].visual_kept == 9
    assert handle.method.name == "hiprune+transprune"


def test_each_its_own_keep_in_whatever_order_they_are_named() -> None:
    tiny = families()["llava"]
    model = tiny.build()
    inputs = tiny.prompt([[3, "image", 4]])
    kept = []
    for names in (["hiprune", "fastv"], ["fastv", "hiprune"]):
        with vlprune.apply(model, names, hiprune={"keep": 20, "alpha": 0.5}, fastv={"keep": 7}) as handle, torch.no_grad():
            model(**inputs)
            kept.append([indices.tolist() for record in handle.report().points for indices in record.keep_indices])
    assert [len(part) for part in kept[0]] == [20, 7]
    assert kept[0] == kept[1]
    assert set(kept[0][1]) <= set(kept[0][0])


@pytest.mark.parametrize(
    ("methods", "keep", "options", "words"),
    [
        ([], 0.5, {}, "empty list"),
        (["hiprune", "hiprune"], 0.5, {}, "each of them once"),
        (["hiprune", "fastv"], 9, {}, "how much each leaves"),
        (["hiprune", "fastv"], 0.5, {"alpha": 0.1}, "options by method"),
        (["evs", "cls_attention"], 0.5, {}, "do not go together"),
    ],
)
def test_what_cannot_work_is_an_error(methods: list[str], keep: float, options: dict[str, float], words: str) -> None:
    model = families()["llava"].build()
    with pytest.raises(OptionError, match=words):
        vlprune.apply(model, methods, keep, **options)
    vlprune.apply(model, "random").remove()
