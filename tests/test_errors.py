"""Bad input gets an error that says what was given, what would do, and what to change; and nothing is half applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vlprune
from tests.oracle import snapshot
from tests.tiny import families
from vlprune import errors


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return families()["llava"].build()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "hi-prune"}, errors.UnknownNameError, ["'hi-prune'", "Did you mean 'hiprune'", "fastv"]),
        ({"method": "hiprune", "alhpa": 0.2}, errors.UnknownNameError, ["'alhpa'", "Did you mean 'alpha'"]),
        ({"method": "random", "keep": 0}, errors.OptionError, ["keep=0", "at least one"]),
        ({"method": "random", "keep": 0.0}, errors.OptionError, ["keep=0.0", "(0, 1]"]),
        ({"method": "random", "keep": -0.5}, errors.OptionError, ["keep=-0.5", "(0, 1]"]),
        ({"method": "random", "keep": -3}, errors.OptionError, ["keep=-3"]),
        ({"method": "random", "keep": float("nan")}, errors.OptionError, ["keep=nan", "not a number"]),
        ({"method": "random", "keep": 64.0}, errors.OptionError, ["keep=64.0", "keep=64"]),
        ({"method": "random", "keep": True}, errors.OptionError, ["keep=True"]),
        ({"method": "random", "keep": "half"}, errors.OptionError, ["'half'"]),
        ({"method": "random", "seed": "x"}, errors.OptionError, ["seed='x'"]),
        ({"method": "random", "point": "llm"}, errors.OptionError, ["'llm'", "before_llm"]),
        ({"method": "random", "point": "llm:9"}, errors.UnsupportedPointError, ["llm:9", "llm:0 ... llm:3"]),
        ({"method": "random", "positions": "shift"}, errors.OptionError, ["'shift'", "preserve", "renumber"]),
        ({"method": []}, errors.OptionError, ["empty list"]),
    ],
)
def test_bad_arguments(model: nn.Module, arguments: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    state = snapshot(model)
    with pytest.raises(error) as raised:
        vlprune.apply(model, **arguments)
    for word in words:
        assert word in str(raised.value)
    assert snapshot(model) == state
    vlprune.apply(model, "random").remove()                              # nothing half applied is in the way


def test_count_above_the_tokens_there_are(model: nn.Module) -> None:
    prompt = families()["llava"].prompt([[3, "image", 4]])
    with vlprune.apply(model, "random", keep=37), torch.no_grad(), pytest.raises(errors.OptionError, match="only 36"):
        model(**prompt)


def test_unknown_models() -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"Known families: .*llava"):
        vlprune.apply(nn.Linear(2, 2), "random")
    with pytest.raises(errors.UnsupportedModelError, match="pipeline"):
        vlprune.apply("llava-hf/llava-1.5-7b-hf", "random")  # type: ignore[arg-type]


def test_a_model_with_pictures_but_without_the_structure() -> None:
    class Strange(nn.Module):
        config = type("Config", (), {"image_token_id": 5, "model_type": "strange", "vision_config": object()})()

    with pytest.raises(errors.UnsupportedModelError, match="get_image_features") as raised:
        vlprune.apply(Strange(), "random")
    assert "decoder" in str(raised.value)


def test_a_signal_that_the_point_cannot_give() -> None:
    model = families()["internvl"].build()
    with pytest.raises(errors.MissingSignalError, match="column_mean") as raised:
        vlprune.apply(model, "hiprune")
    assert "vlprune methods" in str(raised.value)


def test_a_signal_of_a_layer_that_has_not_run(model: nn.Module) -> None:
    from vlprune.reducers import Drop
    from vlprune.scorers import SignalScore
    from vlprune.selectors import TopK

    late = vlprune.Stage(vlprune.LLMLayer(1), SignalScore(vlprune.Tap("last_row", 2)), TopK(), Drop(), vlprune.Budget(0.5))
    with pytest.raises(errors.MissingSignalError, match="has not run"):
        vlprune.apply(model, vlprune.PruningMethod("late", (late,)))


def test_video_methods_say_so_on_images() -> None:
    family = families()["llava_next_video"]
    model = family.build()
    with vlprune.apply(model, "evs"), torch.no_grad(), pytest.raises(errors.OptionError, match=r"videos only.*image"):
        model(**family.prompt([[3, "image", 4]]))


def test_no_visual_tokens_is_no_error(model: nn.Module) -> None:
    prompt = families()["llava"].prompt([[7], [5]])
    with torch.no_grad():
        before = model(**prompt).logits
        with vlprune.apply(model, "hiprune") as handle:
            assert torch.equal(model(**prompt).logits, before)
            assert "no pruning point" in str(handle.report())


def test_applied_twice_and_removed_twice(model: nn.Module) -> None:
    handle = vlprune.apply(model, "random")
    with pytest.raises(errors.AlreadyAppliedError, match="remove"):
        vlprune.apply(model, "hiprune")
    handle.remove()
    handle.remove()
    assert not handle.is_applied
    with vlprune.apply(model, "hiprune") as again:
        assert again.is_applied


def test_the_handle_points_to_the_model(model: nn.Module) -> None:
    with vlprune.apply(model, "random") as handle, pytest.raises(AttributeError, match=r"model\.generate"):
        handle.generate()


def test_nan_activations(model: nn.Module) -> None:
    prompt = families()["llava"].prompt([[3, "image", 4]])
    prompt["pixel_values"][0, 0, 0, 0] = float("nan")
    for method in ("hiprune", "fastv", "transprune"):
        with vlprune.apply(model, method), torch.no_grad(), pytest.raises(errors.NotFiniteError, match="not finite"):
            model(**prompt)


def test_a_scorer_of_the_wrong_shape(model: nn.Module) -> None:
    from vlprune.reducers import Drop
    from vlprune.selectors import TopK

    class Wrong:
        needs = ()

        def __call__(self, inputs: vlprune.ScoreInputs) -> torch.Tensor:
            return inputs.tokens.sum(-1)[:, :3]

    stage = vlprune.Stage(vlprune.BeforeLLM(), Wrong(), TopK(), Drop(), vlprune.Budget(0.5))
    prompt = families()["llava"].prompt([[3, "image", 4]])
    with vlprune.apply(model, vlprune.PruningMethod("wrong", (stage,))), torch.no_grad(), pytest.raises(errors.OptionError, match="Wrong returned shape"):
        model(**prompt)


def test_names_cannot_be_taken() -> None:
    with pytest.raises(errors.OptionError, match="exists already"):
        vlprune.register(vlprune.get_method("random"))
    with pytest.raises(errors.UnknownNameError, match="nothing"):
        vlprune.unregister("nothing")


def test_renumbering_is_refused_for_multimodal_rope() -> None:
    with pytest.raises(errors.UnsupportedModelError, match="preserve"):
        vlprune.apply(families()["qwen2_5_vl"].build(), "random", positions="renumber")


def test_a_picture_spread_over_two_rows(model: nn.Module) -> None:
    prompt = families()["llava"].prompt([[3, "image", 4], [3, "image", 4]])
    prompt["input_ids"][0, 3], prompt["input_ids"][1, 2] = 5, 97         # one placeholder moves to the other row
    with vlprune.apply(model, "random"), torch.no_grad(), pytest.raises(errors.UnsupportedCallError, match="two rows"):
        model(**prompt)
