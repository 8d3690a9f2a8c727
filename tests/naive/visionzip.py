"""VisionZip by loops over the tokens of one item: dominant tokens, targets, and the mean of what is most like each target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.protocols import ScoreInputs


def reference(stage: Any, inputs: ScoreInputs, number: int) -> tuple[list[int], Tensor]:
    """Kept indices and tokens after the stage; ten of 64 kept tokens are contextual."""
    by_kind = {tap.kind: values[0] for tap, values in inputs.signals.items()}
    attention, keys, features = by_kind["cls_row"], by_kind["vision_keys"], by_kind["vision_states"]
    total, num_keep = attention.shape[0], inputs.num_keep
    contextual = round(num_keep * 10 / 64)
    dominant = sorted(range(total), key=lambda token: -float(attention[token]))[: num_keep - contextual]
    rest = [token for token in range(total) if token not in dominant]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    groups: dict[int, list[int]] = {target: [target] for target in targets}
    for token in rest:
        if token in targets:
            continue
        likeness = [float(torch.dot(keys[token], keys[target]) / (keys[token].norm() * keys[target].norm())) for target in targets]
        groups[targets[likeness.index(max(likeness))]].append(token)
    kept = sorted([*dominant, *targets])
    assert inputs.project is not None
    tokens = []
    for token in kept:
        if token in groups:
            mean = torch.stack([features[member] for member in groups[token]]).mean(dim=0)
            tokens.append(inputs.project(mean[None, None])[0, 0])
        else:
            tokens.append(inputs.tokens[0, token])
    return kept, torch.stack(tokens)
