"""Count, method by method, the authors' cases that the library reproduces, for the README's table.

    python tests/reference/count_parity.py SHARED [FILE]

SHARED holds ``golden`` (functions) and ``golden_e2e`` (whole models). Every case is run with its checker; FILE (default
``vlprune/assets/parity.json``) gets ``{method: {"functions": [passed, found], "models": [passed, found]}}``. A case of a
folder that several methods share counts for the one that the checker's ``method_of(case)`` names.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import check_functions  # noqa: E402
import check_models  # noqa: E402
from golden_case import load_cases  # noqa: E402

import vlprune  # noqa: E402

TARGET = HERE.parent.parent / "vlprune" / "assets" / "parity.json"
Counts = dict[str, dict[str, list[int]]]


def note(counts: Counts, method: str, kind: str, passed: bool) -> None:
    """One more case."""
    entry = counts[method].setdefault(kind, [0, 0])
    entry[0] += passed
    entry[1] += 1


def count_functions(root: Path, counts: Counts) -> None:
    """Folders that a card names and that have a checker."""
    owners = defaultdict(list)
    for name in vlprune.list_methods():
        for folder in vlprune.get_method(name).golden:
            owners[folder].append(name)
    for folder, methods in sorted(owners.items()):
        there = (HERE / "functions" / f"{folder}.py").exists()
        for case in load_cases(root / folder):
            passed = there and not check_functions.check_case(folder, case)
            split = getattr(importlib.import_module(f"functions.{folder}"), "method_of", None) if there else None
            for method in methods if split is None else [split(case)]:
                note(counts, method, "functions", passed)


def count_models(root: Path, counts: Counts) -> None:
    """Folders whose method has an entry in ``models``."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for case in check_models.case_folders(folder):
            meta = json.loads((case / "meta.json").read_text())
            name = meta.get("method", folder.name)
            if not (HERE / "models" / f"{name}.py").exists():
                continue
            options = check_models.options_of(name, meta)
            method = options["method"]
            try:
                passed = not check_models.check_case(case, options, meta["positions"])
            except Exception:
                passed = False
            note(counts, method, "models", passed)


def count(shared: Path) -> Counts:
    """All of them, by method."""
    counts: Counts = defaultdict(dict)
    count_functions(shared / "golden", counts)
    count_models(shared / "golden_e2e", counts)
    return dict(sorted(counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Count, write, say the sum."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or not (Path(given[0]) / "golden").is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    counts = count(Path(given[0]))
    lines = [f' "{name}": {json.dumps(entry)}' for name, entry in counts.items()]
    target = Path(given[1]) if len(given) > 1 else TARGET
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for kind in ("functions", "models"):
        found = [entry[kind] for entry in counts.values() if kind in entry]
        print(f"{kind}: {sum(passed for passed, _ in found)} of {sum(total for _, total in found)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
