"""A published method is a value made of parts: stages at points, and the card that describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.points import LLMPart, Point
from vlprune.protocols import HeadChoice, HeadInputs, Reducer, RouteInputs, ScoreInputs, Scorer, Selector, Step, Tap
from vlprune.tokens import TOKEN_SETS

PARTS = ("attn", "mlp", "block")
KV_POLICIES = ("full", "active_only", "project_only", "copy_prev_layer")
PHASES = ("prefill", "decode", "both")
#: ``(inputs) -> (B,) bool``: whether a stage acts on each item. Reading it costs one host sync, so only adaptive methods have one.
Gate = Callable[[ScoreInputs], Tensor]


@dataclass(frozen=True)
class VideoDrop:
    """How a stage inside a vision tower drops over all frames of a video: visual tokens leave with all their patches, frames keep different numbers.

    Such a stage sees the visual tokens of whole videos (`ScoreInputs.tokens` are the means over their patches).

    Attributes:
        key_bias: ``(scores (B, N), inputs) -> (B, N)``: added to the attention logits onto these tokens in the block before the point, where all of
            them are still there; gradients reach the scorer through it. The scorer then has to do with signals of the blocks before that one.
        refill: frames are packed into rows to run on; one that is alone in its row goes on looking at the tokens that it lost there.
    """

    key_bias: Callable[[Tensor, ScoreInputs], Tensor] | None = None
    refill: bool = False


@dataclass(frozen=True)
class Stage:
    """Scorer + selector + reducer at one pruning point.

    Attributes:
        budget: how many of an item's *original* tokens stay after this stage.
        gate: for adaptive methods; items for which it is false keep everything.
        gate_needs: signals the gate looks at.
        restore: layer of the point's tower before which the dropped rows come back (a *skip*); ``None``: at the output (a *prune*).
        training: ``True``: acts only while the block at the point is in training mode; ``False``: only in evaluation; ``None``: always.
            For vision points.
        video: for vision points of methods for videos.
        tokens: the set of tokens to choose from, in prefill: ``"visual"``, image by image or video by video; ``"text"``, what is neither visual nor
            padding, row by row; ``"all"``, both. Of the last two, budgets count the row's tokens of the set, and a number above that is all of them.
        protect: for ``"text"`` and ``"all"``: how many of the first and of the last text tokens of a row always stay. They count in the budget, but
            scorers do not see them. Of several parts of a method the largest numbers hold for all.
    """

    point: Point
    scorer: Scorer
    selector: Selector
    reducer: Reducer
    budget: Budget
    gate: Gate | None = None
    gate_needs: tuple[Tap, ...] = ()
    restore: int | None = None
    training: bool | None = None
    video: VideoDrop | None = None
    tokens: str = "visual"
    protect: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        if self.tokens != "visual" and (self.point.tower != "decoder" or self.gate is not None or self.protect[1] < 1):
            raise OptionError(f"a stage for {self.tokens} tokens acts in the decoder, without a gate, and keeps the last token (protect=(first, last from 1))")
        if self.video is not None and (self.point.tower != "vision" or self.point.order != (self.point.layer, 0)):
            raise OptionError(f"a stage over the frames inside a vision tower acts at the input of its blocks, not at {self.point.label}")
        if self.training is not None and self.point.tower != "vision":
            raise OptionError(f"a stage for training={self.training} only acts at vision points, not at {self.point.label}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Every signal that the parts of this stage look at, each once."""
        return tuple(dict.fromkeys((*self.scorer.needs, *self.selector.needs, *getattr(self.reducer, "needs", ()), *self.gate_needs)))


def check_tokens(tokens: str) -> None:
    """A set of tokens that exists."""
    if tokens not in TOKEN_SETS:
        raise OptionError(f"tokens={tokens!r}: one of {', '.join(map(repr, TOKEN_SETS))}")


@dataclass(frozen=True)
class Bypass:
    """Some rows run through a part of a decoder block, the others keep their residual.

    In a prompt, which rows run is said in one of two ways. With ``budget`` the best of each item run, and so does every row that is in no item (other
    tokens, protected ones): their number is known before the data, so the part really runs on fewer rows. With ``rows`` a mask says it; then all rows are
    computed and the results of the others thrown away.

    Attributes:
        layer: 0-based decoder layer.
        part: ``"attn"``, ``"mlp"`` or ``"block"``.
        rows: ``(mask of the token set (B, L) bool) -> (B, L) bool``, true where the row *runs*; ``None`` where there is a budget.
        kv: what the bypassed rows leave in the layer's keys and values. ``"full"`` and ``"project_only"``: keys and values projected from their
            residual (the same numbers; with a budget the second computes no queries for them). ``"active_only"``: nothing, so later tokens do not
            see them in this layer, and with a budget the cache holds only the others. ``"copy_prev_layer"``: the keys and values that the
            layer below holds for them.
        tokens, protect: as in `Stage`; budgets count the tokens of each item.
        phase: ``"prefill"``, ``"decode"`` or ``"both"``. Generated tokens are bypassed in the last two as ``decode`` says.
        budget, scorer, selector: how many of an item's tokens run, and which. Scorers see the input of the block (``"attn"``, ``"block"``), or what the
            MLP is given (``"mlp"``). 0 with ``Budget(0, allow_zero=True)``: none of them.
        decode: ``(Step) -> bool or a list of B bools`` on the host: whether the new token of the batch, or of each row, runs; ``None``: never.
        weigh: for a whole block with a budget: ``(states (B, L, D) at the input of the block) -> (B, L)``, factors on what the block adds to those of
            the token set that run; gradients reach a router through it. ``None``: nothing is scaled.
    """

    layer: int
    part: str
    rows: Callable[[Tensor], Tensor] | None = None
    kv: str = "full"
    tokens: str = "visual"
    protect: tuple[int, int] = (0, 1)
    phase: str = "prefill"
    budget: Budget | None = None
    scorer: Scorer | None = None
    selector: Selector | None = None
    decode: Callable[[Step], bool | Sequence[bool]] | None = None
    weigh: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        if self.weigh is not None and (self.part != "block" or self.budget is None):
            raise OptionError("weigh scales what a whole block adds to the tokens that a budget chose: give part='block' and a budget, or leave it out")
        for name, given, known in (("part", self.part, PARTS), ("kv", self.kv, KV_POLICIES), ("phase", self.phase, PHASES)):
            if given not in known:
                raise OptionError(f"{name}={given!r}: one of {', '.join(map(repr, known))}")
        if self.phase != "decode" and (self.rows is None) == (self.budget is None):
            raise OptionError("a bypass in prompts needs either rows, a mask, or a budget with a scorer")
        if self.budget is not None and self.scorer is None and self.budget.keep != 0:
            raise OptionError("a bypass with a budget needs a scorer, unless the budget is 0")
        if self.kv == "copy_prev_layer" and (self.layer == 0 or self.part == "mlp"):
            raise OptionError(f"kv='copy_prev_layer' in the {self.part} of layer {self.layer}: there has to be a layer below, and attention that is bypassed")

    gate: ClassVar[None] = None

    @property
    def point(self) -> Point:
        """Where it chooses."""
        return LLMPart(self.layer, part=self.part)

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Signals that its scorer and selector look at."""
        return tuple(dict.fromkeys(tap for part in (self.scorer, self.selector) if part is not None for tap in part.needs))

    @property
    def in_prompts(self) -> bool:
        """Whether it does anything in a prompt."""
        return self.phase != "decode" and not (self.budget is not None and self.budget.is_everything)


@dataclass(frozen=True)
class PatchBypass:
    """Some patches run through the MLP of a vision block, the others keep their residual. CLS and registers always run.

    Attributes:
        layer: 0-based vision block.
        scorer: of the patches behind the block's attention; reads no signals.
        budget: how many of an image's *original* patches run, the highest scores; ``None``: those with a score above 0, which costs one host read.
        always: ``(states (B, L, D)) -> (B, L, D)``, added to every token behind the MLP, such as an adapter; ``None``: nothing.
    """

    layer: int
    scorer: Scorer
    budget: Budget | None = None
    always: Callable[[Tensor], Tensor] | None = None

    @property
    def label(self) -> str:
        """The name used in reports."""
        return f"vision_mlp:{self.layer}"


@dataclass(frozen=True)
class Guests:
    """Tokens from elsewhere that take part in the attention of one vision block, as keys and values for the others, and are gone behind it.

    Attributes:
        layer: 0-based vision block.
        tokens: ``(states (B, S, D) at the input of the block, CLS first where there is one) -> (B, M, D)``, states as the block would get them;
            ``None``: nobody this time.
    """

    layer: int
    tokens: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Attend:
    """Attention of one decoder layer over a selection of keys; every row still asks, and gets its answer in its place.

    Attributes:
        layer: 0-based decoder layer.
        keys: ``(mask of the token set (B, L) bool) -> (B, L) bool``, true where a key may be seen, now and in later steps. Applied in prefill.
        tokens: the token set, as in `Stage`.
        choose: ``(HeadInputs) -> HeadChoice``, or ``None`` for everything: which keys each head sees, and which queries it asks with, in this call
            alone; the cache keeps all keys. Instead of ``keys``.
        phase: when ``choose`` is asked: ``"prefill"``, ``"decode"`` or ``"both"``. Steps of several new tokens without a prompt count as prefill.
        see: called in prompts with what ``choose`` got and what the heads put out, (B, Q, H, d), to decide about later layers.
        stateless: ``choose`` looks at nothing of earlier calls (`HeadInputs.state`), so the cache may stay as the model made it.
    """

    layer: int
    keys: Callable[[Tensor], Tensor] | None = None
    tokens: str = "visual"
    choose: Callable[[HeadInputs], HeadChoice | None] | None = None
    see: Callable[[HeadInputs, Tensor], None] | None = None
    phase: str = "prefill"
    stateless: bool = False

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        if self.phase not in PHASES:
            raise OptionError(f"phase={self.phase!r}: one of {', '.join(map(repr, PHASES))}")
        if (self.keys is None) == (self.choose is None):
            raise OptionError("attention over a selection needs either keys, a mask, or choose, head by head")
        if self.see is not None and (self.choose is None or self.phase == "decode"):
            raise OptionError("see looks at heads in prompts: it goes with choose and a phase of 'prefill' or 'both'")


@dataclass(frozen=True)
class LayerSkip:
    """Run or skip a whole decoder layer, for every row of the batch.

    A token that skips the layer leaves in its cache what ``kv`` says (see `Bypass`). With ``"active_only"``, nothing, a later token that runs the layer
    would miss keys: that is an error, when the method is put on (for ``horizon`` steps after prompts of some lengths) and when it happens, as in a later
    turn on the same cache.

    Attributes:
        layer: 0-based decoder layer.
        run: ``(phase, step, position) -> bool``; phase is ``"prefill"`` or ``"decode"``, step counts decoded tokens from 0, position is the number of
            tokens before this call.
        kv: ``"active_only"``, ``"project_only"`` or ``"copy_prev_layer"``.
        horizon: number of decoding steps after which ``run`` does not change.
    """

    layer: int
    run: Callable[[str, int, int], bool]
    kv: str = "active_only"
    horizon: int = 256

    def __post_init__(self) -> None:
        if self.kv not in KV_POLICIES[1:]:
            raise OptionError(f"kv={self.kv!r} of a layer that is skipped: one of {', '.join(map(repr, KV_POLICIES[1:]))}")
        if self.kv == "copy_prev_layer" and self.layer == 0:
            raise OptionError("kv='copy_prev_layer' in layer 0: there is no layer below")


@dataclass(frozen=True)
class Observe:
    """Look at what a layer did while decoding, to decide about later layers or steps.

    Attributes:
        layer: 0-based decoder layer.
        see: called behind the layer, whenever its MLP ran for some row, with a `Step` whose ``states`` is the residual before the MLP and ``after`` the
            one behind it; ``ran`` says for which rows. Reading a tensor on the host costs a sync.
    """

    layer: int
    see: Callable[[Step], None]


@dataclass(frozen=True)
class DecodeSelect:
    """While decoding, attend to some of the visual (or text) keys only, chosen anew at every step; the cache keeps them all.

    Steps with one new token and no new visual ones. Tokens that are not in the set, protected and generated ones are always seen.

    Attributes:
        layer: 0-based decoder layer from which on (up to the next ``DecodeSelect``) the selection is seen instead of everything.
        budget: how many of the keys that each visual item has there stay; chosen among all the visual keys of a row.
        reads: earlier layer whose head-mean attention of the new token onto the visual keys is looked at.
        reuse: the last selection stays while the cosine with the step before is at least this; ``None``: choose at every step.
        choose: ``(attention (B, n), most) -> (B, most)``, best first, or ``None`` for the largest. Keys that a row does not have hold ``-inf``.
        tokens, protect: as in `Stage`; below "visual" keys stands for the keys of this set.
    """

    layer: int
    budget: Budget
    reads: int
    reuse: float | None = None
    choose: Callable[[Tensor, int], Tensor] | None = None
    tokens: str = "visual"
    protect: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class KeysFrom:
    """Keys and values of a decoder layer are made of what an earlier block was given, for every token, in prompts and while decoding.

    Attributes:
        layer: 0-based decoder layer whose attention gets them.
        source: 0-based decoder layer, at most ``layer``, at whose input the states are looked at.
        project: ``(states (B, L, D)) -> (keys, values)``, both (B, L, Hkv d), before norms of heads and rotation.
        query: ``(what the attention is given (B, L, D)) -> (B, L, H d)`` instead of the layer's own projection of queries; ``None``: that one.
        share: lower layer whose keys and values are these: its entries of the cache are used and none are kept; ``None``: the layer's own.
    """

    layer: int
    source: int
    project: Callable[[Tensor], tuple[Tensor, Tensor]]
    query: Callable[[Tensor], Tensor] | None = None
    share: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.source <= self.layer:
            raise OptionError(f"keys of layer {self.layer} from the input of layer {self.source}: the source is a layer from 0 to {self.layer}")
        if self.share is not None and not self.source <= self.share < self.layer:
            raise OptionError(f"share={self.share}: layer {self.layer} can use the keys of a layer from {self.source} to {self.layer - 1}")


@dataclass(frozen=True)
class RouteMask:
    """Which of the experts that its router chose for a token run, in one decoder layer with experts; in prompts and while decoding.

    An expert that does not run gives its token nothing; weights of the others stay as they are. Experts that every token shares always run.

    Attributes:
        layer: 0-based decoder layer.
        choose: ``(RouteInputs) -> (T, k) bool``, true where the expert runs, or ``None`` for all of them.
    """

    layer: int
    choose: Callable[[RouteInputs], Tensor | None]


@dataclass(frozen=True)
class PruningMethod:
    """What `vlprune.apply` puts on a model.

    Attributes:
        name: for reports.
        stages: in any order; they act in the order of their points.
        positions: the method's own position policy, ``"preserve"`` or ``"renumber"``; the user's choice wins.
        bypasses, attends, layer_skips: rows, keys and layers that are skipped rather than dropped.
        observes: what is looked at while decoding.
        size_bias: attention counts a merged token by its size (log of the size on its key).
        decode_selects: which visual keys are looked at while decoding.
        patch_bypasses: which patches run through the MLPs of vision blocks.
        guests: tokens from elsewhere in the attention of vision blocks.
        keys_from: layers whose keys and values are made of an earlier layer's states.
        route_masks: which experts run.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    positions: str = "preserve"
    bypasses: tuple[Bypass, ...] = ()
    attends: tuple[Attend, ...] = ()
    layer_skips: tuple[LayerSkip, ...] = ()
    size_bias: bool = False
    decode_selects: tuple[DecodeSelect, ...] = ()
    patch_bypasses: tuple[PatchBypass, ...] = ()
    guests: tuple[Guests, ...] = ()
    observes: tuple[Observe, ...] = ()
    keys_from: tuple[KeysFrom, ...] = ()
    route_masks: tuple[RouteMask, ...] = ()

    @property
    def token_sets(self) -> tuple[str, ...]:
        """Sets of tokens that its parts look at; stages that keep everything not counted."""
        found = [stage.tokens for stage in self.stages if not stage.budget.is_everything]
        found += [part.tokens for part in self.bypasses if part.in_prompts]
        others: tuple[Any, ...] = (*self.attends, *self.decode_selects)
        found += [part.tokens for part in others]
        found += ["visual"] if self.patch_bypasses or self.guests else []
        return tuple(tokens for tokens in TOKEN_SETS if tokens in found)

    @property
    def protects(self) -> tuple[tuple[int, int], ...]:
        """How many first and last text tokens each part that chooses from rows protects."""
        parts: tuple[Any, ...] = (*self.stages, *self.bypasses, *self.decode_selects)
        return tuple(part.protect for part in parts if part.tokens != "visual")

    @property
    def follows_decoding(self) -> bool:
        """Whether it acts by the step of a generation, so that a `GenerationState` is kept for it."""
        parts: tuple[Any, ...] = (*self.bypasses, *(attend for attend in self.attends if not attend.stateless))
        return bool(self.layer_skips or self.observes or any(part.phase != "prefill" for part in parts))


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a model that a method may scale itself by. No names: methods know no model.

    Attributes:
        decoder_layers, vision_layers: depths (0 where there is no such tower).
        feature_layer: 0-based vision block whose output becomes the visual tokens.
        global_vision_layers: vision blocks in which every token sees its whole image (others see a window).
        has_cls: whether the vision tower carries a CLS token.
        signals: kinds that can be tapped.
        token_sets: what a prompt can hold, ``"visual"`` among it for models that see.
        expert_layers: decoder layers with a router and experts.
    """

    decoder_layers: int = 0
    vision_layers: int = 0
    feature_layer: int = 0
    global_vision_layers: tuple[int, ...] = ()
    has_cls: bool = False
    signals: frozenset[str] = frozenset()
    token_sets: tuple[str, ...] = TOKEN_SETS
    expert_layers: tuple[int, ...] = ()

    @property
    def own_set(self) -> str:
        """``"visual"`` where the model sees, else ``"text"``."""
        return "visual" if "visual" in self.token_sets else "text"

    def nearest_global(self, layer: int) -> int:
        """The vision block closest to ``layer`` (0-based) with attention over the whole image; the earlier one on a tie."""
        return min(self.global_vision_layers or range(max(self.vision_layers, 1)), key=lambda block: (abs(block - layer), block))


@dataclass(frozen=True)
class MethodCard:
    """The frozen registry entry of a method. Tables, tests and error messages are made from it.

    Attributes:
        build: ``build(facts, keep, **options) -> PruningMethod``; its keyword options are the user's options.
        points: labels of where it acts by default, with ``K`` for a layer that scales with depth.
        needs: kinds of signals (``vlprune.protocols.TAP_KINDS``).
        modality: ``"image"``, ``"video"`` or ``"any"``.
        exact: kept tokens are unchanged, so "drop equals mask" holds.
        adaptive: the number kept depends on the data.
        equivariant: permuting the tokens permutes the choice (false for baselines that look at places only).
        default_keep: used when the user gives none.
        tokens: which tokens it reduces: ``"visual"``, ``"text"`` or ``"all"``. The last two also serve models and prompts without pictures.
        golden: folders under ``golden/`` with the authors' numbers.
        search: ``search(facts, keep, suggest) -> (keep, options)`` for `vlprune.tune`: draws each number with ``suggest(name, low, high)``;
            ``None`` where these numbers cannot meet ``keep``.
    """

    name: str
    build: Callable[..., PruningMethod]
    summary: str
    paper: str = ""
    code: str = ""
    points: tuple[str, ...] = ("before_llm",)
    needs: tuple[str, ...] = ()
    modality: str = "any"
    reduction: str = "drop"
    text_aware: bool = False
    exact: bool = True
    adaptive: bool = False
    equivariant: bool = True
    default_keep: Keep | tuple[float, ...] = 1 / 3
    golden: tuple[str, ...] = ()
    test_options: Mapping[str, Any] = field(default_factory=dict)
    tokens: str = "visual"
    search: Callable[[ModelFacts, float, Callable[[str, float, float], float]], tuple[Any, dict[str, Any]] | None] | None = None
