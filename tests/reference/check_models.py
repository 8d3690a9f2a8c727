"""Run whole tiny models with stored weights and compare with what the authors' programs gave.

    python tests/reference/check_models.py DIR [--strict]

DIR is one method's folder (with case folders inside) or a folder of them. A line a method: cases passed of found, and the
first mismatch. Exit 1 on a mismatch; a method that has no entry here is listed as missing and fails only with ``--strict``.
Compared: kept tokens index for index, logits of every step to 1e-4, decoded tokens, cache lengths by layer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import vlprune

TOLERANCE = 1e-4
HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


def options_of(name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Method, keep and options of a case, from ``models/NAME.py``; ``roles``: which roles the stored indices hold, all by default."""
    return dict(importlib.import_module(f"models.{name}").options(meta))


def load_model(folder: Path) -> torch.nn.Module:
    """The model of a case, from its config and weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()  # type: ignore[no-any-return]


def check_case(folder: Path, options: dict[str, Any], positions: str) -> str:
    """Empty if everything agrees, else the first mismatch."""
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    steps = int(expected["greedy_tokens"].numel())
    model = load_model(folder)
    method, roles = options.pop("method"), options.pop("roles", None)
    with torch.no_grad(), vlprune.apply(model, method, positions=positions, **options) as handle:
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)  # type: ignore[operator]
        points = handle.report().points
    names = sorted(name for name in expected if name.startswith("keep_indices_stage"))
    if len(names) != len(points):
        return f"{len(points)} pruning points, expected {len(names)}"
    problem = compare_slots(points, expected)
    if problem:
        return problem
    for name, record in zip(names, points, strict=True):
        if name.replace("keep_indices_", "") + "_visual_slots" in expected:
            continue                                    # compared above, merged tokens included
        kept = record.keep_indices[0]
        if roles is not None:                           # the stored indices are those of some roles only; one image a case
            kept = kept[torch.isin(record.roles[0].cpu(), torch.tensor([record.role_names.index(role) for role in roles]))]
        if not torch.equal(kept, expected[name].flatten().long()):
            return f"{name}: kept tokens differ"
    logits = torch.stack(out.logits)[:, 0]
    error = float((logits - expected["step_logits"].reshape(logits.shape)).abs().max())
    if not error <= TOLERANCE:
        return f"step_logits differ by {error:.2e}"
    if not torch.equal(out.sequences[0, -steps:], expected["greedy_tokens"].flatten().long()):
        return "decoded tokens differ"
    lengths = [layer.stored_keys().shape[2] for layer in out.past_key_values.layers]
    if lengths != expected["kv_lengths_end"].flatten().tolist():
        return f"cache lengths {lengths}"
    return ""


def compare_slots(points: list[Any], expected: dict[str, torch.Tensor]) -> str:
    """What stands in every slot of the image after each stage: an original token, or the c-th token merged there, behind the kept ones."""
    if not points or "stage0_visual_slots" not in expected:
        return ""
    labels = content = torch.arange(points[0].items[0].num_tokens)
    for number, record in enumerate(points):
        kept, name = record.keep_indices[0], f"stage{number}_visual_slots"
        there = content[torch.searchsorted(labels, kept)]
        merged = torch.zeros_like(kept, dtype=torch.bool)
        if record.roles[0] is not None and "merged" in record.role_names:
            merged = record.roles[0].cpu() == record.role_names.index("merged")
        labels, content = kept, torch.cat([there[~merged], -1000 * (number + 1) - torch.arange(int(merged.sum()))])
        if not torch.equal(content, expected[name].flatten().long()):
            return f"{name}: differ"
        if not torch.equal(content[content >= 0].sort().values, expected[f"keep_indices_stage{number}"].flatten().long()):
            return f"keep_indices_stage{number}: kept tokens differ"
    return ""


def case_folders(folder: Path) -> list[Path]:
    """Case folders of a method, or the folder itself if it is one case."""
    return [folder] if (folder / "meta.json").exists() else sorted(path.parent for path in folder.glob("*/meta.json"))


def main() -> int:
    """Check every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strict", action="store_true", help="a method that is not there yet fails")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"no folder {arguments.folder}")
    root: Path = arguments.folder.resolve()
    single = bool(case_folders(root)) and not any(case_folders(path) and not (path / "meta.json").exists() for path in root.iterdir() if path.is_dir())
    failed = False
    for folder in [root] if single else sorted(path for path in root.iterdir() if path.is_dir()):
        cases = case_folders(folder)
        if not cases:
            continue
        name = json.loads((cases[0] / "meta.json").read_text()).get("method", folder.name)
        if not (HERE / "models" / f"{name}.py").exists():
            print(f"{name:<20} missing  ({len(cases)} cases)")
            failed |= arguments.strict
            continue
        passed, first = 0, ""
        for case in cases:
            meta = json.loads((case / "meta.json").read_text())
            try:
                mismatch = check_case(case, options_of(name, meta), meta["positions"])
            except Exception as error:
                mismatch = f"{type(error).__name__}: {error}"
            passed += not mismatch
            first = first or (f"{case.name}: {mismatch}" if mismatch else "")
        print(f"{name:<20} {passed}/{len(cases)}  {first or 'ok'}")
        failed |= passed < len(cases)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
