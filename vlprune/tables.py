"""Tables for people, made from the cards and the adapters: ``vlprune methods``, ``vlprune inspect`` and the README's.

``python -m vlprune.tables README.md`` writes the tables between the markers of a file; with ``--check`` it only says
whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from vlprune.adapter import adapter_classes, find_adapter
from vlprune.errors import OptionError
from vlprune.method import MethodCard
from vlprune.points import BeforeLLM, LLMLayer, Point, VisionLayer, parse_point
from vlprune.registry import get_method, list_methods

PROMPT_COLUMNS = ("name", "what stays", "paper", "what you bring")
METHOD_COLUMNS = ("name", "what stays", "paper", "where", "signals", "drop, merge or recycle", "tokens", "video", "text-aware", "keep", "parity (cases)")
PARITY = Path(__file__).parent / "assets" / "parity.json"                # written by tests/reference/count_parity.py
VIDEO = {"any": "yes", "image": "no", "video": "only"}
PICTURE_SIZES = ((336, 336), (480, 640), (768, 1024), (1080, 1920))      # height, width


def method_rows() -> list[tuple[str, ...]]:
    """One row a method, plain text."""
    return [tuple(_method_row(get_method(name))) for name in list_methods()]


def _method_row(card: MethodCard) -> list[str]:
    keep = card.default_keep
    share = f"{keep:.3g}" if isinstance(keep, float) else ", ".join(f"{part:.3g}" for part in keep) if isinstance(keep, tuple) else str(keep)
    places = Counter(card.points)
    points = ", ".join(f"{point} ({count}x)" if count > 1 else point for point, count in places.items()) or "-"
    others = card.reduction if points != "-" else "-"
    text = "yes" if card.text_aware else "no"
    needs, video = ", ".join(card.needs) or "-", VIDEO[card.modality] if card.tokens != "text" else "-"
    return [card.name, card.summary, card.paper or "-", points, needs, others, card.tokens, video, text, share, parity(card.name)]


def parity(name: str) -> str:
    """How many cases of the authors' programs come out right: functions, and whole models; ``-`` where there are none."""
    found = counted().get(name, {})
    parts = []
    for kind, one in (("functions", "function"), ("models", "model")):
        passed, total = found.get(kind, (0, 0))
        if total:
            parts.append(f"{passed} {one if passed == 1 else kind}" if passed == total else f"{passed} of {total} {kind}")
    return ", ".join(parts) or "-"


@cache
def counted() -> dict[str, dict[str, tuple[int, int]]]:
    """The counts, as the checkers found them; empty where the file is missing."""
    return json.loads(PARITY.read_text()) if PARITY.exists() else {}


def methods_markdown() -> str:
    """The table of methods."""
    rows = []
    for name, summary, paper, points, needs, *rest in method_rows():
        rows.append((f"`{name}`", summary, _paper(paper), _code(points), _code(needs), *rest))
    return _markdown(METHOD_COLUMNS, rows)


def prompt_rows() -> list[tuple[str, ...]]:
    """One row for each method that shortens prompts before the model sees them."""
    from vlprune.prompts import PROMPT_METHODS

    return [(card.name, card.summary, card.paper, card.needs) for card in PROMPT_METHODS.values()]


def prompts_markdown() -> str:
    """The table of methods for prompts."""
    rows = [(f"`{name}`", summary, _paper(paper), needs) for name, summary, paper, needs in prompt_rows()]
    return _markdown(PROMPT_COLUMNS, rows)


def families_markdown() -> str:
    """The table of model families, from the first line of each adapter file."""
    names: dict[str, list[str]] = {}
    for adapter in adapter_classes():
        names.setdefault(adapter.__module__, []).append(f"`{adapter.name}`")
    rows = []
    for module, found in names.items():
        covers = (sys.modules[module].__doc__ or "").strip().splitlines()[0].rstrip(".")
        rows.append((", ".join(dict.fromkeys(found)), covers, f"`adapters/{module.rpartition('.')[2]}.py`"))
    return _markdown(("family", "what it serves", "file"), rows)


def inspect_model(name: str, trust_remote_code: bool = False) -> list[Any]:
    """What `vlprune inspect` prints: lines and a rich table."""
    from rich.table import Table

    from vlprune.loading import empty_model, load_config

    model = empty_model(name, trust_remote_code)
    adapter = find_adapter(model)
    facts = adapter.facts
    method, keep = adapter.default_method()
    lines = [
        f"[bold]{name}[/]: {type(model).__name__}, family {adapter.name}, {sum(p.numel() for p in model.parameters()) / 1e6:,.4g} M parameters",
        f"layers: {facts.vision_layers} in the vision tower" + (" (with a CLS token)" if facts.has_cls else "") + f", {facts.decoder_layers} in the decoder",
        f"visual tokens come from vision block {facts.feature_layer} (counted from 0)",
        f"default method: {method}, keep={keep:.3g}",
    ]
    sees = "visual" in facts.token_sets
    if not sees:
        lines[1:3] = [f"layers: {facts.decoder_layers} in the decoder; it sees no pictures, what is reduced is text"]
    if facts.global_vision_layers and len(facts.global_vision_layers) < facts.vision_layers:
        lines.insert(3, f"vision blocks that see the whole picture: {', '.join(map(str, facts.global_vision_layers))}; the others see windows")
    table = Table("pruning points", "signals there", title_justify="left", pad_edge=False)
    groups: list[tuple[list[str], frozenset[str]]] = []
    for label in adapter.points():
        offered = adapter.offers(parse_point(label))
        if groups and groups[-1][1] == offered and type(parse_point(groups[-1][0][0])) is type(parse_point(label)):
            groups[-1][0].append(label)
        else:
            groups.append(([label], offered))
    for labels, offered in groups:
        table.add_row(labels[0] if len(labels) == 1 else f"{labels[0]} ... {labels[-1]}", ", ".join(sorted(offered)) or "-")
    if not sees:
        return ["\n".join(lines), table]
    return ["\n".join(lines), table, _token_counts(name, load_config(name, trust_remote_code), trust_remote_code)]


def _token_counts(name: str, config: Any, trust_remote_code: bool) -> str:
    """Visual tokens of pictures of some sizes, asked from the model's own processor where it can be loaded."""
    from vlprune.errors import VlpruneError
    from vlprune.loading import load_processor, quiet

    try:
        with quiet():
            processor = load_processor(name, config, trust_remote_code)
            counts = processor._get_num_multimodal_tokens(image_sizes=list(PICTURE_SIZES))["num_image_tokens"]
        found = {f"{width}x{height}": count for (height, width), count in zip(PICTURE_SIZES, counts, strict=True)}
        if len(set(counts)) == 1:
            return f"visual tokens of a picture: {counts[0]}, whatever its size"
        return "visual tokens of a picture: " + ", ".join(f"{count} at {size}" for size, count in found.items())
    except (VlpruneError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError):
        pass
    fixed = getattr(config, "image_seq_length", None)
    vision = getattr(config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if config.model_type in ("clip", "siglip") and isinstance(side, int) and isinstance(patch, int):
        return f"visual tokens of a picture in the tower: {(side // patch) ** 2}"
    if config.model_type == "llava" and isinstance(fixed, int):
        return f"visual tokens of a picture: {fixed}"
    return "visual tokens of a picture: not known without the processor; `handle.report()` says after a run"


def update(text: str) -> str:
    """The text with the tables between ``<!-- NAME -->`` and ``<!-- /NAME -->`` made anew."""
    for name, make in (("methods", methods_markdown), ("prompts", prompts_markdown), ("families", families_markdown)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise OptionError(f"the file has no {begin} ... {end}")
        text = f"{head}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


def _paper(name: str) -> str:
    return f"[{name}](https://arxiv.org/abs/{name.removeprefix('arXiv:')})" if name.startswith("arXiv:") else name


def _code(text: str) -> str:
    return text if text == "-" else ", ".join(f"`{part}`" for part in text.split(", "))


def _markdown(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Write the tables, or check them."""
    given = sys.argv[1:] if arguments is None else arguments
    names = [name for name in given if name != "--check"]
    path = Path(names[0] if names else "README.md")
    old = path.read_text()
    new = update(old)
    if "--check" in given:
        if new != old:
            print(f"the tables of {path} are stale: run `python -m vlprune.tables {path}`")
        return int(new != old)
    path.write_text(new)
    return 0


__all__ = ["BeforeLLM", "LLMLayer", "Point", "VisionLayer", "families_markdown", "method_rows", "methods_markdown", "prompt_rows", "prompts_markdown", "update"]

if __name__ == "__main__":
    sys.exit(main())
