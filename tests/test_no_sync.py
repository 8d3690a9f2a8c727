"""Choosing and cutting never read the device back: no `.item()`, `nonzero` or boolean indexing between the layers of a prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vlprune
from tests.oracle import decoder_of
from tests.tiny import families
from vlprune.errors import MissingSignalError, UnsupportedPointError
from vlprune.pruner import Session
from vlprune.tokens import TokenLayout, VisualItem

READS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "unique", "_unique2", "item"}
METHODS = [name for name in vlprune.list_methods("visual") if name != "dense" and not vlprune.get_method(name).adaptive]


class Watch(TorchDispatchMode):
    """Notes operators whose result has to be known on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool] if name.startswith("index") else []
        if not self.paused and (name in READS or masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def on_the_host(watch: Watch, function: Any) -> Any:
    """The layout lives on the host; what it computes is no read of the device."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        watch.paused += 1
        try:
            return function(*args, **kwargs)
        finally:
            watch.paused -= 1

    return paused


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_no_reads_between_the_layers(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, card = families()[family], vlprune.get_method(method)
    modality = card.modality if card.modality != "any" else "image"
    if modality not in tiny.modalities:
        pytest.skip(f"{method} declares modality {card.modality!r}")
    model = tiny.build()
    prompt = tiny.prompt([[3, modality, 4], [6, modality, 2]])
    watch = Watch()
    for name in ("text_after", "last_token", "valid_mask", "visual_mask"):
        monkeypatch.setattr(TokenLayout, name, on_the_host(watch, getattr(TokenLayout, name)))
    assert isinstance(VisualItem.num_frames, property)
    monkeypatch.setattr(VisualItem, "num_frames", property(on_the_host(watch, VisualItem.num_frames.fget)))
    monkeypatch.setattr("vlprune.adapters._decoder.DecoderEngine._whole_after", staticmethod(on_the_host(watch, lambda session: session.layout.length)))
    monkeypatch.setattr(Session, "_check_finite", lambda *args: None)    # reads at once on a CPU only; on a GPU at the end
    try:
        handle = vlprune.apply(model, method, keep=0.4, **card.test_options)
    except (MissingSignalError, UnsupportedPointError) as error:
        pytest.skip(f"declared: {error}")
    if family == "qwen3_vl" and handle.method.stages[0].point.layer > 0:
        handle.remove()
        pytest.skip("transformers itself indexes with a mask when DeepStack meets a full sequence")
    layers = decoder_of(model).layers  # type: ignore[union-attr]
    with handle, torch.no_grad():
        first = layers[0].register_forward_pre_hook(lambda *_: watch.__enter__() and None, prepend=True)  # type: ignore[index, union-attr]
        last = layers[-1].register_forward_hook(lambda *_: watch.__exit__(None, None, None))  # type: ignore[index, union-attr]
        model(**prompt, use_cache=True)
        first.remove()
        last.remove()
        assert handle.report().points
    assert watch.found == []


def test_the_watch_sees_reads() -> None:
    with Watch() as watch:
        torch.ones(3).nonzero()
        float(torch.ones(1))
        _ = torch.ones(3)[torch.ones(3).bool()]
    assert len(watch.found) >= 3
