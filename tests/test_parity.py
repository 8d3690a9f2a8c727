"""The authors' numbers, where the shared material is present beside the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
FUNCTIONS = sorted(path.stem for path in (ROOT / "tests" / "reference" / "functions").glob("[!_]*.py"))
MODELS = sorted(path.stem for path in (ROOT / "tests" / "reference" / "models").glob("[!_]*.py"))


def check(script: str, folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip(f"the authors' numbers are not part of the repository; no folder shared/{folder.parent.name}/{folder.name} beside it")
    done = subprocess.run([sys.executable, ROOT / "tests" / "reference" / script, folder, "--strict"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    check("check_functions.py", SHARED / "golden" / name)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    check("check_models.py", SHARED / "golden_e2e" / name)


def test_the_checkers_can_fail(tmp_path: Path) -> None:
    """A wrong number is found, and a missing method is listed but no failure."""
    source = SHARED / "golden_e2e" / "fastv" / "case0"
    if not source.is_dir():
        pytest.skip("no shared folder beside the checkout")
    from safetensors.torch import load_file, save_file

    case = tmp_path / "fastv" / "case0"
    case.mkdir(parents=True)
    for file in source.iterdir():
        (case / file.name).write_bytes(file.read_bytes())
    expected = load_file(source / "expected.safetensors")
    expected["step_logits"] = expected["step_logits"] + 1e-3
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, case / "expected.safetensors")
    command = [sys.executable, ROOT / "tests" / "reference" / "check_models.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "step_logits differ" in done.stdout
    (case / "meta.json").write_text((source / "meta.json").read_text().replace('"fastv"', '"unheard_of"'))
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert subprocess.run([*command, "--strict"], capture_output=True, text=True).returncode == 1
