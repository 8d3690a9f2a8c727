"""timm and open_clip where torchvision's operators are missing (a CPU build of torch beside a torchvision built for CUDA).

Both packages import torchvision for their data transforms; no test needs its operators. Where ``import torchvision`` fails only
because the C++ operators were not loaded, their names are declared (without kernels) and the import is tried again.

``PYTHONPATH=.venv/vit python -m tests.torchvision_stub vlprune.evals.imagenet --library timm`` runs a module in such an environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import torch

_LIBRARY: list[torch.library.Library] = []              # a library that is collected takes its declarations along


@cache
def why_not(package: str) -> str | None:
    """Why ``package`` (``"timm"`` or ``"open_clip"``) cannot be imported here; ``None`` if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    problem = _torchvision()
    if problem is not None:
        return f"{package} needs torchvision: {problem}"
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return None


@cache
def _torchvision() -> str | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "it is not installed"
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            return str(error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        for operator in sorted(set(re.findall(r'"torchvision::(\w+)"', source)) | set(re.findall(r'register_meta\("(\w+)"\)', source))):
            library.define(f"{operator}(Tensor x) -> Tensor")
        _LIBRARY.append(library)
        importlib.import_module("torchvision")
    return None


if __name__ == "__main__":
    why_not("timm")
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
