"""Imports point one way; methods know no model, adapters know no method; the core imports torch only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    [
        "cli", "demo", "tables", "bench", "loading", "draw", "video",
        "tune", "trials", "samples", "agreement", "bench_parts", "fitting", "contact_sheet", "embedded_video",
    ],
    ["api"],
    ["methods", "pruner", "adapter", "report"],
    ["scorers", "selectors", "reducers", "method", "trace", "kernels", "plan"],
    ["protocols", "registry", "hooks", "flops"],
    ["points", "budget", "tokens"],
    ["errors"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
OUTER = set(LAYERS[0])


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part(name: str) -> str:
    """``vlprune.methods.fastv`` -> ``methods``."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[0] == "vlprune" else ""


CORE = [path for path in sorted((ROOT / "vlprune").rglob("*.py")) if path.name != "__init__.py" or path.parent.name != "vlprune"]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT / "vlprune").parts[0].removesuffix(".py")
    if own not in RANK:
        pytest.skip(f"{own} has no layer: integrations and empty packages")
    for name in imports(path):
        target = part(name)
        if target in RANK and target != own:
            assert RANK[target] >= RANK[own], f"{path.name} ({own}) imports {name}"
        if own not in OUTER:
            assert target not in ("adapters", "evals"), f"{path.name} imports {name}: plug-ins are found, not imported"
            assert name.split(".")[0] not in ("transformers", "timm", "open_clip", "decord", "matplotlib"), f"{path.name}: the core imports torch only"


@pytest.mark.parametrize("path", sorted((ROOT / "adapters").glob("*.py")), ids=lambda path: path.name)
def test_adapters_know_no_method(path: Path) -> None:
    for name in imports(path):
        assert part(name) not in ("methods", "scorers", "selectors", "reducers", "api", "evals", "cli"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "vlprune" / "methods").glob("[!_]*.py")), ids=lambda path: path.name)
def test_methods_know_no_model(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] in {"vlprune", "torch", *sys.stdlib_module_names}, f"{path.name} imports {name}"
    for family in ("llava", "qwen", "clip", "siglip", "gemma"):
        code = "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body[1:])
        names = {node.id.lower() for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        assert not any(family in name for name in names), f"{path.name} names {family}"


def test_only_hooks_registers_hooks() -> None:
    for path in [*CORE, *(ROOT / "adapters").glob("*.py")]:
        if path.name != "hooks.py":
            assert "register_forward" not in path.read_text(), f"{path.name} registers hooks itself"


def test_importing_vlprune_imports_no_host_library() -> None:
    code = "import sys, vlprune; print([m for m in ('transformers', 'timm', 'open_clip', 'decord', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_pickles_and_no_remote_code() -> None:
    for path in [*CORE, *(ROOT / "adapters").glob("*.py"), *(ROOT / "evals").glob("*.py")]:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
