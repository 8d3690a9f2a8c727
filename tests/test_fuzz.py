"""Random prompts, methods, budgets, points, padding and backends against the masked run. ``make fuzz N=2000`` goes on for longer."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlprune
from tests.oracle import decoder_of, hidden_columns, masked_run, tower_columns
from tests.tiny import IMAGE, VIDEO, families
from vlprune.errors import MissingSignalError, OptionError, UnsupportedPointError

EXAMPLES = int(os.environ.get("FUZZ_N", "25"))


@cache
def built(family: str, attention: str) -> torch.nn.Module:
    """A tiny model, made once."""
    return families()[family].build(attention)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A family, a batch and a way to prune it."""
    name = draw(st.sampled_from(sorted(families())))
    family = families()[name]
    modality = draw(st.sampled_from(family.modalities))
    shapes = family.shapes.get(modality, 1)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[Any] = [draw(st.integers(1, 5))]
        for _ in range(draw(st.integers(0, 2))):
            row += [(modality, draw(st.integers(0, shapes - 1))), draw(st.integers(1, 4))]
        rows.append(row)
    method = draw(st.sampled_from([m for m in vlprune.list_methods("visual") if m != "dense" and vlprune.get_method(m).exact]))
    options: dict[str, Any] = dict(vlprune.get_method(method).test_options)
    if method in ("random", "uniform"):
        options["point"] = draw(st.sampled_from(["before_llm", "llm:0", "llm:1", "llm:3"]))
    keep = draw(st.one_of(st.floats(0.05, 1.0), st.integers(1, 6)))
    return {
        "family": name, "rows": rows, "method": method, "options": options, "keep": keep, "seed": draw(st.integers(0, 50)),
        "padding": draw(st.sampled_from(["left", "right"])), "attention": draw(st.sampled_from(["sdpa", "eager"])), "steps": draw(st.integers(0, 2)),
    }  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, derandomize="FUZZ_N" not in os.environ, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_prompt_any_method_equals_the_masked_run(case: dict[str, Any]) -> None:
    """Law 1, 3 and 6 on whatever hypothesis thinks of."""
    family, model = families()[case["family"]], built(case["family"], case["attention"])
    inputs = family.prompt(case["rows"], padding=case["padding"], seed=case["seed"])
    has_items = any(not isinstance(part, int) for row in case["rows"] for part in row)
    try:
        handle = vlprune.apply(model, case["method"], keep=case["keep"], **case["options"])
    except (MissingSignalError, UnsupportedPointError):
        return                                                           # declared: the family lacks what the method needs
    with handle, torch.no_grad():
        modality = vlprune.get_method(case["method"]).modality
        shown = {part[0] for row in case["rows"] for part in row if not isinstance(part, int)}
        try:
            if case["steps"] and case["padding"] == "left":
                options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO]}
                out = model.generate(**inputs, max_new_tokens=case["steps"] + 1, **options)
                new = out.sequences[:, inputs["input_ids"].shape[1] : -1]
                pruned = torch.stack(out.logits, dim=1)
            else:
                new, pruned = inputs["input_ids"][:, :0], model(**inputs).logits
        except OptionError:
            assert modality != "any" and shown - {modality}              # noqa: PT018  a video method was shown an image
            return
        trace = handle.trace
    length = inputs["input_ids"].shape[1]
    depth = len(decoder_of(model).layers)  # type: ignore[arg-type]
    empty = [torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)] * depth
    hidden = hidden_columns(trace, depth) if trace is not None and has_items else empty
    kwargs = {}
    if new.shape[1] and not handle.adapter.multimodal_rope:  # type: ignore[attr-defined]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    reference = masked_run(model, inputs, hidden, new, family.generated_type, tower_columns(trace, model), **kwargs).logits
    if new.shape[1]:
        torch.testing.assert_close(pruned, reference[:, length - 1 :], rtol=1e-3, atol=1e-3)
    else:
        seen = inputs["attention_mask"].bool() & ~hidden[-1]
        torch.testing.assert_close(pruned[seen], reference[seen], rtol=1e-3, atol=1e-3)
    if trace is None or not has_items:
        return
    for record in trace.points:
        for kept in record.kept:
            assert bool((kept.diff() > 0).all())
    if not vlprune.get_method(case["method"]).adaptive and isinstance(case["keep"], int):
        last = [record for record in trace.points if record.point == handle.method.stages[-1].point.label][-1]      # separators leave no tower
        assert all(kept.numel() == case["keep"] for kept in last.kept)
