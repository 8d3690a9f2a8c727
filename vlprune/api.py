"""`apply` and the handle: the library's front door."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

from torch import nn

from vlprune.adapter import Adapter, find_adapter
from vlprune.budget import Budget, Keep
from vlprune.errors import AlreadyAppliedError, MissingSignalError, OptionError, UnsupportedModelError, UnsupportedPointError, unknown
from vlprune.hooks import HookSet
from vlprune.method import Bypass, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.plan import Plan, load_plan
from vlprune.points import LLMLayer, VisionMiddle
from vlprune.protocols import ROW_SET_KINDS, TAP_KINDS
from vlprune.pruner import Pruner
from vlprune.registry import get_method
from vlprune.report import Report, make_report
from vlprune.skipping.nesting import check_nesting
from vlprune.trace import Trace

_APPLIED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PruneHandle]] = weakref.WeakKeyDictionary()
POSITIONS = ("preserve", "renumber")


class PruneHandle:
    """What `apply` returns: report, undo, and a context manager. The model itself is used as before."""

    def __init__(self, model: nn.Module, adapter: Adapter, pruner: Pruner, hooks: HookSet, keep: Any) -> None:
        self.model, self.adapter, self.pruner, self.keep = model, adapter, pruner, keep
        self._hooks: HookSet | None = hooks

    @property
    def method(self) -> PruningMethod:
        """The method with its stages resolved for this model."""
        return self.pruner.method

    @property
    def trace(self) -> Trace | None:
        """The record of the last prefill with visual tokens (tensors still on the device)."""
        return self.pruner.last_trace

    @property
    def is_applied(self) -> bool:
        """Whether the model is still pruned by this handle."""
        return self._hooks is not None

    def report(self) -> Report:
        """Tokens, FLOPs and cache bytes of the last prefill; prints as a table."""
        return make_report(self.trace, self.method.name, self.keep)

    def remove(self) -> None:
        """Make the model exactly what it was. Calling it again does nothing."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            _APPLIED.pop(self.model, None)

    def __enter__(self) -> PruneHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def __getattr__(self, name: str) -> Any:
        if name in ("generate", "forward", "eval", "to", "config"):
            raise AttributeError(f"the handle has no {name!r}: vlprune.apply changes the model in place, so call model.{name} as before")
        raise AttributeError(f"PruneHandle has no attribute {name!r}; it has report(), remove(), trace, method, keep, model")

    def __repr__(self) -> str:
        state = "applied" if self.is_applied else "removed"
        method = self.method
        choosing: tuple[Any, ...] = (*method.stages, *method.bypasses)
        labels = [*(part.point.label for part in choosing), *(bypass.label for bypass in method.patch_bypasses)]
        labels += [f"llm:{skip.layer}" for skip in method.layer_skips]
        labels += [f"llm:{attend.layer}.heads" for attend in method.attends if attend.choose is not None]
        stages = ", ".join(labels if len(labels) < 7 else (*labels[:3], "...", labels[-1])) or "no stage"
        return f"<PruneHandle {self.method.name} on {type(self.model).__name__} at {stages}; {state}>"


def apply(
    model: nn.Module,
    method: str | MethodCard | PruningMethod | Sequence[str] | None = None,
    keep: Keep | Sequence[float] | str | None = None,
    *,
    positions: str | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    **options: Any,
) -> PruneHandle:
    """Prune the visual tokens of this model instance, in place, until ``handle.remove()``.

    Args:
        model: a Hugging Face vision-language model, a CLIP-like model, or an open_clip / timm vision transformer.
        method: a name from `vlprune.list_methods`, a card or a method of your own, several of them (see `compose_methods`), or ``None`` for the
            default of the model family.
        keep: a float in (0, 1], the share of visual tokens that stay; an int, the number per visual item (image, or whole
            video); for methods with a schedule also what their page says. ``None``: the method's default.
        positions: ``"preserve"`` keeps every survivor's own position (default); ``"renumber"`` closes the gaps.
        plan: a file that ``vlprune tune`` wrote (or a `vlprune.plan.Plan`): method, keep and options together, instead of these.
        options: of the method; see ``help(vlprune.get_method(name).build)``.

    Raises:
        UnknownNameError, OptionError: a method, option or value that does not exist.
        UnsupportedModelError, UnsupportedPointError, MissingSignalError: the model cannot serve the method.
        AlreadyAppliedError: the model is pruned already.

    Nothing is changed if an error is raised.
    """
    adapter = find_adapter(model)
    current = _APPLIED.get(model)
    if current is not None and (known := current()) is not None and known.is_applied:
        raise AlreadyAppliedError(f"{type(model).__name__} is pruned already by {known!r}. Call its remove() first, or give several methods at once as a list.")
    if plan is not None:
        method, keep, options = planned(plan, model, adapter.facts, {"method": method, "keep": keep, **options})
    if method is None:
        method, default_keep = adapter.default_method()
        keep = default_keep if keep is None else keep
    built, keep, modality = build_method(method, adapter.facts, keep, options)
    policy = built.positions if positions is None else positions
    if policy not in POSITIONS:
        raise OptionError(f"positions={policy!r}: choose 'preserve' or 'renumber'")
    check_stages(built, adapter)
    pruner = Pruner(built, positions=policy, modality=modality)
    hooks = HookSet()
    try:
        adapter.attach(hooks, pruner)
    except BaseException:
        hooks.remove()
        raise
    handle = PruneHandle(model, adapter, pruner, hooks, keep)
    _APPLIED[model] = weakref.ref(handle)
    return handle


def planned(plan: str | os.PathLike[str] | Plan, model: nn.Module, facts: ModelFacts, given: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """Method, keep and options of a plan that was made for a model like this one; nothing of the kind may be ``given`` beside it."""
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise OptionError(f"a plan says method, keep and options by itself: leave out {', '.join(beside)}, or leave out plan")
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    plan.check(model, facts)
    return plan.method, plan.keep, dict(plan.options)


def build_method(method: Any, facts: ModelFacts, keep: Any, options: dict[str, Any]) -> tuple[PruningMethod, Any, str]:
    """Resolve what the user gave to a method, its keep and the modality it works on."""
    if isinstance(method, PruningMethod):
        if options:
            raise OptionError(f"a PruningMethod is complete; it takes no options (given: {', '.join(options)})")
        if keep is not None:
            stages = tuple(replace(stage, budget=Budget(keep)) for stage in method.stages)
            rows = tuple(replace(b, budget=Budget(keep)) if b.budget is not None and b.budget.keep != 0 else b for b in method.bypasses)
            patches = tuple(replace(bypass, budget=Budget(keep)) for bypass in method.patch_bypasses)
            method = replace(method, stages=stages, bypasses=rows, patch_bypasses=patches)
        return method, keep, "any"
    if isinstance(method, (list, tuple)):
        return compose_methods(method, facts, keep, options)
    card = method if isinstance(method, MethodCard) else get_method(str(method))
    keep = card.default_keep if keep is None else keep
    known = [name for name, p in inspect.signature(card.build).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise unknown(f"option of {card.name}", name, known)
    if isinstance(keep, (int, float)):
        Budget(keep)                                                     # say at once what is wrong with it
    return card.build(facts, keep, **options), keep, card.modality


def compose_methods(methods: Sequence[Any], facts: ModelFacts, keep: Any, options: dict[str, Any]) -> tuple[PruningMethod, Any, str]:
    """Several methods as one: their stages together, and what else they do.

    Each gets its own ``keep`` from its options (``visionzip=dict(keep=0.5)``). A share given for all of them is what is left in the end: of n methods
    for the same tokens, in the order of their first points, the i-th leaves ``keep ** (i / n)``. Without any, each has its default.
    """
    names = [method if isinstance(method, str) else getattr(method, "name", "") for method in methods]
    if not methods:
        raise OptionError("an empty list of methods; give names such as ['hiprune', 'transprune']")
    if len(set(names)) < len(names):
        raise OptionError(f"methods={names}: each of them once")
    extra = sorted(set(options) - set(names))
    if extra:
        raise OptionError(f"with several methods, give options by method, e.g. {names[0]}=dict(...); got {', '.join(extra)}")
    own = {name: dict(options.get(name, {})) for name in names}
    if isinstance(keep, int) and not isinstance(keep, bool) and any("keep" not in part for part in own.values()):
        raise OptionError(
            f"keep={keep!r} with several methods does not say how much each leaves. Give a share such as keep=0.1, or each its own number: "
            f"{names[0]}=dict(keep={2 * keep}), {names[-1]}=dict(keep={keep})"
        )
    first, sets = {}, {}
    for method, name in zip(methods, names, strict=True):
        built = build_method(method, facts, own[name].get("keep"), {key: value for key, value in own[name].items() if key != "keep"})[0]
        sets[name] = built.token_sets
        first[name] = min(((stage.point.tower != "vision", stage.point.order) for stage in built.stages), default=(True, (0, 0)))
    order = sorted(names, key=lambda name: first[name])
    parts = []
    for method, name in zip(methods, names, strict=True):
        same = [other for other in order if sets[other] == sets[name]]   # methods for visual tokens and for text each have the whole share
        share = keep ** ((same.index(name) + 1) / len(same)) if isinstance(keep, float) else keep
        given = own[name].pop("keep", None if isinstance(method, PruningMethod) else share)
        parts.append(build_method(method, facts, given, own[name]))
    modalities = {modality for _, _, modality in parts} - {"any"}
    if len(modalities) > 1:
        raise OptionError(f"{' and '.join(names)} do not go together: one works on images only, the other on videos only")
    built_parts = [built for built, _, _ in parts]
    together: dict[str, Any] = {}
    for entry in fields(PruningMethod):                                  # everything a method does is a tuple of things, or a switch
        values = [getattr(built, entry.name) for built in built_parts]
        if isinstance(values[0], tuple):
            together[entry.name] = tuple(part for value in values for part in value)
        elif isinstance(values[0], bool):
            together[entry.name] = any(values)
    positions = next((built.positions for built in built_parts if built.positions != "preserve"), "preserve")
    stages = sorted(together.pop("stages"), key=lambda stage: (stage.point.tower != "vision", stage.point.order))
    return PruningMethod("+".join(names), tuple(stages), positions, **together), keep, next(iter(modalities), "any")


def check_stages(method: PruningMethod, adapter: Adapter) -> None:
    """Every point must exist on this model and give the signals its stage looks at."""
    points = adapter.points()
    _check_sets(method, adapter)
    check_nesting(method.name, method.layer_skips)
    for bypass in method.patch_bypasses:
        able = adapter.bypass_layers()
        if bypass.layer not in able:
            blocks = f"blocks {able[0]} to {able[-1]}" if able else "none of its blocks; models that are nothing but a vision tower can"
            raise UnsupportedPointError(f"{method.name} lets patches skip the MLP of vision block {bypass.layer}; this {adapter.name} model can in {blocks}.")
    for guest in method.guests:
        if VisionMiddle(guest.layer).label not in points:
            raise UnsupportedPointError(f"{method.name} adds tokens to the attention of vision block {guest.layer}, which this {adapter.name} model cannot.")
    parts: tuple[Any, ...] = (*method.bypasses, *method.layer_skips, *method.observes, *method.attends, *method.keys_from, *method.route_masks)
    for part in parts:
        if f"llm:{part.layer}" not in points:
            raise UnsupportedPointError(f"{method.name} acts in decoder layer {part.layer}, which this {adapter.name} model does not have.")
    for mask in method.route_masks:
        able = adapter.facts.expert_layers
        if mask.layer not in able:
            which = f"layers {', '.join(map(str, able))} have them" if able else "no layer of it has them"
            raise UnsupportedPointError(
                f"{method.name} chooses among the experts of decoder layer {mask.layer}; looked for a router (mlp.gate) with its experts (mlp.experts) there, "
                f"and in this {adapter.name} model {which}. It takes a mixture of experts, such as Qwen3-VL-MoE."
            )
    for skip in method.bypasses:
        offered = adapter.offers(LLMLayer(skip.layer + (skip.part == "mlp"))) & (ROW_SET_KINDS if skip.tokens != "visual" else frozenset(TAP_KINDS))
        for tap in skip.needs:
            _check_tap(method, adapter, skip, tap, offered)
    for stage in method.stages:
        label = stage.point.label
        if label not in points:
            raise UnsupportedPointError(f"{method.name} acts at {label}, which this {adapter.name} model does not have. Its points: {_ranges(points)}.")
        offered = adapter.offers(stage.point) if stage.tokens == "visual" else adapter.offers(stage.point) & ROW_SET_KINDS
        for tap in stage.needs:
            _check_tap(method, adapter, stage, tap, offered)


def _check_sets(method: PruningMethod, adapter: Adapter) -> None:
    """The model has the tokens that the method reduces, and it is known at every stage how many of them there are."""
    for tokens in method.token_sets:
        if tokens not in adapter.token_sets:
            able = " or ".join(adapter.token_sets)
            raise UnsupportedModelError(
                f"{method.name} reduces {tokens} tokens, and vlprune reduces {able} tokens of this {adapter.name} model. Choose a method for these: "
                "`vlprune methods` lists which tokens each reduces."
            )
    last: Stage | None = None
    for stage in sorted((stage for stage in method.stages if stage.point.tower == "decoder"), key=lambda stage: stage.point.order):
        if last is not None and stage.tokens != "all":
            raise OptionError(
                f"{method.name} chooses among {stage.tokens} tokens at {stage.point.label}, behind a choice among all tokens at {last.point.label}: how many "
                "of them are left is in the data. Let the choice among all tokens come last."
            )
        last = stage if stage.tokens == "all" and not stage.budget.is_everything and stage.restore is None else last


def _check_tap(method: PruningMethod, adapter: Adapter, stage: Stage | Bypass, tap: Any, offered: frozenset[str]) -> None:
    have = ", ".join(sorted(offered)) or "none"
    if tap.kind not in offered:
        raise MissingSignalError(
            f"{method.name} needs {tap.kind} at {stage.point.label}, which this {adapter.name} model does not offer there (it offers: {have}). "
            "Choose a method without it; `vlprune methods` lists what each needs."
        )
    depth = adapter.facts.vision_layers if tap.tower == "vision" else adapter.facts.decoder_layers
    if not 0 <= tap.layer < depth:
        raise OptionError(f"{method.name} reads {tap.kind} in {tap.tower} layer {tap.layer}, but there are layers 0 to {depth - 1}")
    ready = stage.point.layer + (isinstance(stage, Bypass) and stage.part == "mlp")           # the MLP stands behind its layer's attention
    late = tap.tower == stage.point.tower and (tap.layer > ready or (tap.layer >= stage.point.layer and tap.kind == "transition"))
    if late:
        raise MissingSignalError(f"{method.name} reads {tap.kind} of {tap.tower} layer {tap.layer}, which has not run when {stage.point.label} is reached")


def _ranges(labels: list[str]) -> str:
    """``["llm:0", "llm:1", "llm:2"]`` as ``"llm:0 ... llm:2"``."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for label in labels:
        groups.setdefault((label.partition(":")[0], label.endswith(".mid")), []).append(label)
    return ", ".join(members[0] if len(members) == 1 else f"{members[0]} ... {members[-1]}" for members in groups.values())


__all__ = ["POSITIONS", "PruneHandle", "apply", "build_method", "check_stages"]
