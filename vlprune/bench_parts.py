"""Measured cost of the parts: each method's choosing, the greedy kernel, and column-mean attention, each against its yardstick in the same run.

1. *Methods.* The pruned prefill runs on the model of `vlprune.bench` until the last stage has acted, with a clock around every scorer, selector,
   reducer and gate. Their sum is set against the dense prefill of the same run. What the methods read (attention rows, column means, gathers) is
   counted beside it, as *signals*.
2. *Greedy.* `greedy_select` against a loop that multiplies the newest pick with all tokens in every step, at K and at half of it.
3. *Column means.* The chunked kernel, with its own projections, against the eager attention of the same layer: time, and most bytes of tensors alive.

Everything is warm, interleaved, and a median.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.bench import SHAPES, PeakMeter, Rig, Shape
from vlprune.errors import VlpruneError, unknown
from vlprune.fitting import Fit, fitting, reason
from vlprune.kernels.greedy import Determinantal, GreedyRule, MaxMin, MaxSum, Weighted, greedy_select, greedy_select_anew
from vlprune.method import PatchBypass, PruningMethod, Stage

BAR, GREEDY_BAR = 0.03, 0.05
GREEDY_FACTOR = 4.0
LINEAR = 1.15           # twice the work may take so much more than twice the time
RULES: dict[str, GreedyRule] = {"max-sum": MaxSum(), "max-min": MaxMin(), "weighted": Weighted(), "determinantal": Determinantal()}
#: Tokens, width and number kept of the greedy comparison, and tokens of the column means: as asked for, and for tests.
GREEDY_SIZE, COLUMN_SIZES = (2880, 4096, 640), (576, 1600, 2880, 5760)
TINY_GREEDY, TINY_COLUMNS = (300, 64, 40), (64, 100)
WORDS = ("point", "note", "met")     # columns of words, not of numbers
KINDS = ("scorer", "selector", "reducer", "gate")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class MethodRow:
    """Milliseconds of one method's parts in one prefill, medians; ``share`` is scorer, selector, reducer and gate over the dense prefill."""

    method: str
    point: str
    scorer_ms: float
    selector_ms: float
    reducer_ms: float
    gate_ms: float
    signals_ms: float
    dense_ms: float
    share: float
    bar: float
    note: str = ""

    @property
    def missed(self) -> bool:
        """Whether it takes more than it may."""
        return self.share > self.bar


@dataclass(frozen=True)
class GreedyRow:
    """Seconds of one rule at K and at half of it."""

    rule: str
    num_tokens: int
    width: int
    num_keep: int
    anew_s: float
    ours_s: float
    half_s: float
    same_picks: bool

    @property
    def missed(self) -> bool:
        """Not as much faster as asked for, or growing faster than K, or other picks."""
        return not (self.anew_s / self.ours_s >= GREEDY_FACTOR and self.ours_s / self.half_s <= 2 * LINEAR and self.same_picks)


@dataclass(frozen=True)
class ColumnRow:
    """Milliseconds and bytes of the column means and of eager attention over N tokens."""

    num_tokens: int
    eager_ms: float
    ours_ms: float
    eager_bytes: int
    ours_bytes: int

    @property
    def missed(self) -> bool:
        """Slower than what it stands in for."""
        return self.ours_ms > self.eager_ms


@dataclass
class Parts:
    """All three tables."""

    methods: list[MethodRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    greedy: list[GreedyRow] = field(default_factory=list)
    columns: list[ColumnRow] = field(default_factory=list)


def run(
    methods: Sequence[str] | None = None,
    keep: float = 1 / 9,
    shape: str = "cpu",
    rounds: int = 5,
    device: str | None = None,
    progress: Progress = lambda text: None,
) -> Parts:
    """Measure all three.

    Args:
        methods: names; ``None`` for all that are registered. ``random`` always comes first.
        keep: share of visual tokens that stay.
        shape: one of `vlprune.bench.SHAPES`.
        rounds: counted runs of each, after one that is not.
        device: ``"cpu"`` or ``"cuda"``; ``None``: a GPU if there is one.
        progress: called with a word on what is being run.
    """
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    small, found = shape == "tiny", Parts()
    measure_methods(found, list(dict.fromkeys(["random", *(methods or vlprune.list_methods("visual"))])), keep, SHAPES[shape], rounds, device, progress)
    found.greedy = greedy_rows(*(TINY_GREEDY if small else GREEDY_SIZE), min(rounds, 3), device, progress)
    found.columns = column_rows(SHAPES[shape], TINY_COLUMNS if small else COLUMN_SIZES, rounds, device, progress)
    return found


# methods


class Done(Exception):
    """The last stage has acted; the rest of the prefill is not needed."""


class Clocked:
    """A part of a stage that notes how long its calls take; in all else it is that part."""

    def __init__(self, part: Any, now: Callable[[], float], note: Callable[[float], None]) -> None:
        self._part, self._now, self._note = part, now, note

    def __call__(self, inputs: Any, *arguments: Any) -> Any:
        start = self._now()
        out = self._part(inputs, *arguments)
        self._note(self._now() - start)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def clocked(method: PruningMethod, now: Callable[[], float], spent: dict[str, float]) -> PruningMethod:
    """The method with a clock around each part, adding to ``spent`` by kind; ends the forward pass with `Done` after its last part."""
    acting = [stage for stage in method.stages if not stage.budget.is_everything]
    last = max(acting, key=lambda stage: (stage.point.tower != "vision", stage.point.layer), default=None)

    def note(kind: str, end: bool) -> Callable[[float], None]:
        def add(seconds: float) -> None:
            spent[kind] += seconds
            spent["calls"] += 1
            if end:
                raise Done

        return add

    def wrap(stage: Stage) -> Stage:
        final = ("selector" if stage.reducer.exact else "reducer") if stage is last else ""
        parts: dict[str, Any] = {kind: getattr(stage, kind) for kind in KINDS}
        watched: dict[str, Any] = {kind: Clocked(part, now, note(kind, kind == final)) for kind, part in parts.items() if part is not None}
        return replace(stage, **watched)

    def wrap_bypass(bypass: PatchBypass) -> PatchBypass:
        scorer: Any = Clocked(bypass.scorer, now, note("scorer", False))
        return replace(bypass, scorer=scorer)

    return replace(method, stages=tuple(map(wrap, method.stages)), patch_bypasses=tuple(map(wrap_bypass, method.patch_bypasses)))


def is_greedy(value: Any) -> bool:
    """Whether a part, or a part of it, picks with the greedy kernel."""
    if getattr(sys.modules.get(type(value).__module__), "greedy_select", None) is greedy_select:
        return True
    return is_dataclass(value) and any(is_greedy(getattr(value, entry.name)) for entry in fields(value))


def measure_methods(found: Parts, names: Sequence[str], keep: float, shape: Shape, rounds: int, device: str, progress: Progress) -> None:
    """Fill in the methods' rows and those that do not fit. Methods for videos have a model and a dense time of their own."""
    cards = {name: vlprune.get_method(name) for name in names if name != "dense"}
    for video in (False, True):
        group = [name for name, card in cards.items() if (card.modality == "video") == video]
        if not group or (video and not any(cards[name].modality == "video" for name in group)):
            continue
        progress(f"building the {'video' if video else 'image'} model")
        rig = Rig(shape, video=video, batch=1, device=device, decode_steps=0)
        fits, left_out = fitting(rig.model, group, keep, "video" if video else "image", untrained=True)
        found.left_out.update(left_out)
        dense: list[float] = []
        spent: dict[str, list[dict[str, float]]] = {one.name: [] for one in fits}
        for number in range(rounds + 1):
            progress(f"round {number}/{rounds}: dense" if number else "warm-up: dense")
            dense.append(rig.once()[0])
            for one in fits:
                if one.name in found.left_out:
                    continue
                progress(f"round {number}/{rounds}: {one.name}" if number else f"warm-up: {one.name}")
                try:
                    spent[one.name].append(once(rig, one.method))
                except VlpruneError as error:
                    found.left_out[one.name] = reason(error).removeprefix(f"{one.name} ")
                else:
                    if not spent[one.name][-1]["calls"]:
                        found.left_out[one.name] = "none of its parts acts in this prefill"
        found.methods += [row(one, spent[one.name][1:], statistics.median(dense[1:])) for one in fits if one.name not in found.left_out]
        del rig
    found.methods.sort(key=lambda row: names.index(row.method))


@torch.no_grad()
def once(rig: Rig, method: PruningMethod) -> dict[str, float]:
    """Seconds by kind of part, and of everything that the engine counts as choosing, in one prefill."""
    spent = {**dict.fromkeys(KINDS, 0.0), "calls": 0.0}
    with vlprune.apply(rig.model, clocked(method, rig.now, spent)) as handle:
        handle.pruner.clock = rig.now
        try:
            rig.model(**rig.inputs, use_cache=True, logits_to_keep=1)
        except Done:
            pass
        spent["all"] = handle.pruner.clocked
    return spent


def row(one: Fit, spent: list[dict[str, float]], dense_ms: float) -> MethodRow:
    """Medians over the rounds."""
    found = {kind: 1e3 * statistics.median(each[kind] for each in spent) for kind in KINDS}
    parts = 1e3 * statistics.median(sum(each[kind] for kind in KINDS) for each in spent)
    signals = 1e3 * statistics.median(max(0.0, each["all"] - each["scorer"] - each["selector"] - each["gate"]) for each in spent)
    greedy = any(is_greedy(getattr(stage, kind)) for stage in one.method.stages for kind in KINDS)
    notes = [*(["greedy"] if greedy else []), *(["video"] if one.card.modality == "video" else []), *([one.options] if one.options else [])]
    return MethodRow(
        one.name, one.points, found["scorer"], found["selector"], found["reducer"], found["gate"], signals, dense_ms, parts / dense_ms,
        GREEDY_BAR if greedy else BAR, ", ".join(notes),
    )  # fmt: skip


# kernels


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, one after another in every round, the first of which is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, call in runs.items():
            start = _now(device)
            call()
            times[name].append(_now(device) - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def greedy_rows(num_tokens: int, width: int, num_keep: int, rounds: int, device: str, progress: Progress) -> list[GreedyRow]:
    """A row a rule, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, num_tokens, width, generator=generator).to(device)
    weights = torch.rand(1, num_tokens, generator=generator).to(device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    rows = []
    for name, rule in RULES.items():
        progress(f"greedy: {name}")

        def ours(number: int, rule: GreedyRule = rule) -> torch.Tensor:
            return greedy_select(features, number, rule, first, weights=weights)

        def anew(rule: GreedyRule = rule) -> torch.Tensor:
            return greedy_select_anew(features, num_keep, rule, first, weights=weights)

        same = torch.equal(ours(num_keep), anew())
        took = interleaved({"anew": anew, "ours": lambda: ours(num_keep), "half": lambda: ours(num_keep // 2)}, rounds, device)
        rows.append(GreedyRow(name, num_tokens, width, num_keep, took["anew"], took["ours"], took["half"], same))
    return rows


@torch.no_grad()
def column_rows(shape: Shape, sizes: Sequence[int], rounds: int, device: str, progress: Progress) -> list[ColumnRow]:
    """A row a number of tokens, on an attention layer of the shape's vision tower."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPAttention

    from vlprune.adapters._attention import column_mean, scale_of
    from vlprune.adapters._vision import plain_query_key

    config = CLIPVisionConfig(hidden_size=shape.tower_width, num_attention_heads=shape.tower_heads, attn_implementation="eager")
    torch.manual_seed(0)
    attention = CLIPAttention(config).eval().to(device)
    rows = []
    for size in sizes:
        progress(f"column means: {size} tokens")
        states = torch.randn(1, size, shape.tower_width, device=device)

        def ours(states: torch.Tensor = states) -> None:
            queries, keys, lengths = plain_query_key(attention, states, {})
            column_mean(queries, keys, scale_of(attention, queries.shape[-1]), lengths)

        def eager(states: torch.Tensor = states) -> None:
            attention(states)

        took = interleaved({"eager": eager, "ours": ours}, rounds, device)
        bytes_held = []
        for call in (eager, ours):
            with PeakMeter() as meter:
                call()
            bytes_held.append(int(meter.most))
        rows.append(ColumnRow(size, 1e3 * took["eager"], 1e3 * took["ours"], *bytes_held))
    return rows


# results


def tables(parts: Parts) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and cells of each table; the first column is text, and so is the second of the methods."""
    methods = [
        [
            r.method, r.point, *(f"{ms:.1f}" for ms in (r.scorer_ms, r.selector_ms, r.reducer_ms, r.gate_ms)), f"{r.share:.2%}", f"{r.bar:.0%}",
            "MISSED" if r.missed else "met", f"{r.signals_ms:.1f} ({r.signals_ms / r.dense_ms:.1%})", f"{r.dense_ms:.0f}", r.note,
        ]
        for r in parts.methods
    ]  # fmt: skip
    greedy = [
        [
            f"{r.rule}, {r.num_keep} of {r.num_tokens} x {r.width}", f"{1e3 * r.anew_s:.0f}", f"{1e3 * r.ours_s:.0f}", f"{r.anew_s / r.ours_s:.1f}x",
            f"{1e3 * r.half_s:.0f}", f"{r.ours_s / r.half_s:.2f}", "yes" if r.same_picks else "NO", "MISSED" if r.missed else "met",
        ]
        for r in parts.greedy
    ]  # fmt: skip
    columns = [
        [
            str(r.num_tokens), f"{r.eager_ms:.1f}", f"{r.ours_ms:.1f}", f"{r.eager_ms / r.ours_ms:.2f}x", f"{r.eager_bytes / 1e6:.1f}",
            f"{r.ours_bytes / 1e6:.1f}", f"{r.ours_bytes / r.num_tokens / 1e3:.2f}", "MISSED" if r.missed else "met",
        ]
        for r in parts.columns
    ]  # fmt: skip
    return [
        (
            "Scorer, selector, reducer and gate of each method in one prefill",
            ["method", "point", "scorer ms", "selector ms", "reducer ms", "gate ms", "share of dense", "bar", "met", "signals ms", "dense ms", "note"],
            methods,
        ),
        (
            f"Greedy selection against a loop that computes each step's similarities anew (bar {GREEDY_FACTOR:.0f}x; time linear in K or better)",
            ["rule", "anew ms", "ours ms", "faster", "ours at K/2 ms", "K against K/2", "same picks", "met"],
            greedy,
        ),
        (
            "Column-mean attention in chunks, projections included, against eager attention of the same layer (bar: as fast; memory linear in N)",
            ["tokens", "eager ms", "ours ms", "faster", "eager peak MB", "ours peak MB", "ours kB a token", "met"],
            columns,
        ),
    ]


def markdown(parts: Parts) -> str:
    """The tables for a results folder, and what was left out."""
    blocks = []
    for title, head, rows in tables(parts):
        rule = ["---" if number == 0 or name in WORDS else "---:" for number, name in enumerate(head)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
        blocks.append(f"{title}\n\n" + "\n".join(lines) + "\n")
    if parts.left_out:
        blocks.append("Left out:\n\n" + "\n".join(f"- {name}: {why}" for name, why in parts.left_out.items()) + "\n")
    return "\n".join(blocks)


def write_markdown(parts: Parts, facts: dict[str, Any], path: Path) -> None:
    """The tables, and what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{markdown(parts)}\nMeasured on:\n\n" + "".join(f"- {key}: {value}\n" for key, value in facts.items()))


def write_json(parts: Parts, facts: dict[str, Any], path: Path) -> None:
    """The numbers, and what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"measured_on": facts, **asdict(parts)}, indent=1) + "\n")
