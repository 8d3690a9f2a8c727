"""Compare the library's parts with numbers from the authors' programs, index for index.

    python tests/reference/check_functions.py DIR [--strict]

DIR is one method's golden folder (``*.safetensors``, ``cases.json``) or a folder of such folders, named after the
method. Prints ``name  passed/found  first mismatch or ok`` a folder. Exits 1 on a mismatch, 2 when there is nothing to
check; a folder without a checker is ``missing``, which fails with ``--strict`` only. vlprune must be importable (``pip
install -e .``).

A checker is a file ``functions/<folder name>.py`` with ``check(case) -> str`` that runs the library's own scorers and
selectors on a `golden_case.Case` and returns the first mismatch, or an empty string.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from golden_case import Case, load_cases  # noqa: E402


def check_case(name: str, case: Case) -> str:
    """The first mismatch of a case, or an empty string; an exception in a checker is a mismatch too."""
    try:
        return str(importlib.import_module(f"functions.{name}").check(case))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_folder(folder: Path) -> tuple[int, int, str]:
    """Cases passed and found in a folder, and the first mismatch."""
    passed, found, first = 0, 0, ""
    for case in load_cases(folder):
        found += 1
        problem = check_case(folder.name, case)
        passed += not problem
        if problem and not first:
            first = f"{case.name}: {problem}"
    return passed, found, first


def main(arguments: list[str] | None = None) -> int:
    """Check every folder; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a method's golden folder, or a folder of them")
    parser.add_argument("--strict", action="store_true", help="fail when a folder has no checker")
    options = parser.parse_args(arguments)
    root: Path = options.folder.resolve()
    folders = (
        [root] if any(root.glob("*.safetensors")) else sorted({path.parent for path in root.glob("*/*.safetensors")})
    )
    if not folders:
        print(f"no *.safetensors in {options.folder} or its folders", file=sys.stderr)
        return 2
    width = max(len(folder.name) for folder in folders)
    failed = False
    for folder in folders:
        if not (HERE / "functions" / f"{folder.name}.py").exists():
            found = len(list(folder.glob("*.safetensors")))
            print(f"{folder.name:<{width}}  -/{found}  missing")
            failed |= options.strict
            continue
        passed, found, problem = check_folder(folder)
        print(f"{folder.name:<{width}}  {passed}/{found}  {problem or 'ok'}", flush=True)
        failed |= passed < found
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
