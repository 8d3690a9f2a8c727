"""Laws of methods inside a vision tower, over every registered one x every tiny tower. Parametrised from the registries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vlprune
from tests.oracle import snapshot
from tests.tiny_vit import TinyVit, vit_families
from vlprune.errors import MissingSignalError, UnsupportedModelError, UnsupportedPointError

METHODS = [
    name
    for name in vlprune.list_methods()
    if name != "dense"
    and all(point.startswith("vision:") for point in vlprune.get_method(name).points) and vlprune.get_method(name).modality != "video"
]


def run(family: TinyVit, model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return family.run(model, pixels)


@pytest.mark.parametrize("name", sorted(vit_families()))
@pytest.mark.parametrize("method", METHODS)
def test_laws_in_a_tower(method: str, name: str) -> None:
    """Whole shapes, ``keep=1.0`` and ``remove`` bit for bit, exactly K, same answer again, a picture of a batch equals it alone."""
    family, options = vit_families()[name], vlprune.get_method(method).test_options
    if family.missing:
        pytest.skip(family.missing)
    model, pixels = family.build(), family.pixels(3)
    before = run(family, model, pixels)
    state = snapshot(model)
    try:
        with vlprune.apply(model, method, keep=1.0, **options):
            untouched = run(family, model, pixels)
            assert all(torch.equal(untouched[key], before[key]) for key in before)
        handle = vlprune.apply(model, method, keep=0.4, **options)
    except (MissingSignalError, UnsupportedPointError, UnsupportedModelError) as error:
        pytest.skip(f"declared: {error}")
    with handle:
        pruned = run(family, model, pixels)
        last = handle.report().points[-1]
        again = run(family, model, pixels)
        assert all(torch.equal(again[key], pruned[key]) for key in pruned)
        assert last.visual_kept == 3 * handle.method.stages[-1].budget.num_keep(family.num_patches)
        for row in range(3):
            alone = run(family, model, pixels[row : row + 1])
            assert handle.report().points[-1].keep_indices[0].tolist() == last.keep_indices[row].tolist()
            for key, value in alone.items():
                if value.shape[:1] == (1,) and pruned[key].shape[:1] == (3,):
                    torch.testing.assert_close(value[0], pruned[key][row], rtol=1e-4, atol=1e-4)
    assert {key: value.shape for key, value in pruned.items()} == {key: value.shape for key, value in before.items()}
    assert any(not torch.allclose(pruned[key], before[key], atol=1e-3) for key in before)
    assert all(bool((indices.diff() > 0).all()) for indices in last.keep_indices)
    assert snapshot(model) == state
    after = run(family, model, pixels)
    assert all(torch.equal(after[key], before[key]) for key in before)
