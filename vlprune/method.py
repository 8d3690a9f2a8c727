"""A published method is a value made of parts: stages at points, and the card that describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.points import Point
from vlprune.protocols import Reducer, ScoreInputs, Scorer, Selector, Tap

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

    def __post_init__(self) -> None:
        if self.video is not None and (self.point.tower != "vision" or self.point.order != (self.point.layer, 0)):
            raise OptionError(f"a stage over the frames inside a vision tower acts at the input of its blocks, not at {self.point.label}")
        if self.training is not None and self.point.tower != "vision":
            raise OptionError(f"a stage for training={self.training} only acts at vision points, not at {self.point.label}")

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Every signal that the parts of this stage look at, each once."""
        return tuple(dict.fromkeys((*self.scorer.needs, *self.selector.needs, *getattr(self.reducer, "needs", ()), *self.gate_needs)))


@dataclass(frozen=True)
class Bypass:
    """Some rows run through a part of a decoder block, the others keep their residual.

    Attributes:
        layer: 0-based decoder layer.
        part: ``"attn"``, ``"mlp"`` or ``"block"``.
        rows: ``(visual (B, L) bool) -> (B, L) bool``, true where the row *runs*. Applied in prefill.
        kv: what the bypassed rows leave in the layer's keys and values. ``"full"`` and ``"project_only"``: keys and values
            projected from their residual (the same numbers; both compute the attention of all rows today).
            ``"active_only"``: nothing, so later tokens do not see them in this layer.
    """

    layer: int
    part: str
    rows: Callable[[Tensor], Tensor]
    kv: str = "full"


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
        keys: ``(visual (B, L) bool) -> (B, L) bool``, true where a key may be seen, now and in later steps. Applied in prefill.
    """

    layer: int
    keys: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerSkip:
    """Run or skip a whole decoder layer: ``run(phase, step, position) -> bool`` with phase ``"prefill"`` or ``"decode"``."""

    layer: int
    run: Callable[[str, int, int], bool]


@dataclass(frozen=True)
class DecodeSelect:
    """While decoding, attend to some of the visual keys only, chosen anew at every step; the cache keeps them all.

    Steps with one new token and no new visual ones. Text and generated tokens are always seen.

    Attributes:
        layer: 0-based decoder layer from which on (up to the next ``DecodeSelect``) the selection is seen instead of everything.
        budget: how many of the keys that each visual item has there stay; chosen among all the visual keys of a row.
        reads: earlier layer whose head-mean attention of the new token onto the visual keys is looked at.
        reuse: the last selection stays while the cosine with the step before is at least this; ``None``: choose at every step.
        choose: ``(attention (B, n), most) -> (B, most)``, best first, or ``None`` for the largest. Keys that a row does not have hold ``-inf``.
    """

    layer: int
    budget: Budget
    reads: int
    reuse: float | None = None
    choose: Callable[[Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class PruningMethod:
    """What `vlprune.apply` puts on a model.

    Attributes:
        name: for reports.
        stages: in any order; they act in the order of their points.
        positions: the method's own position policy, ``"preserve"`` or ``"renumber"``; the user's choice wins.
        bypasses, attends, layer_skips: rows, keys and layers that are skipped rather than dropped.
        size_bias: attention counts a merged token by its size (log of the size on its key).
        decode_selects: which visual keys are looked at while decoding.
        patch_bypasses: which patches run through the MLPs of vision blocks.
        guests: tokens from elsewhere in the attention of vision blocks.
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


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of a model that a method may scale itself by. No names: methods know no model.

    Attributes:
        decoder_layers, vision_layers: depths (0 where there is no such tower).
        feature_layer: 0-based vision block whose output becomes the visual tokens.
        global_vision_layers: vision blocks in which every token sees its whole image (others see a window).
        has_cls: whether the vision tower carries a CLS token.
        signals: kinds that can be tapped.
    """

    decoder_layers: int = 0
    vision_layers: int = 0
    feature_layer: int = 0
    global_vision_layers: tuple[int, ...] = ()
    has_cls: bool = False
    signals: frozenset[str] = frozenset()

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
    search: Callable[[ModelFacts, float, Callable[[str, float, float], float]], tuple[Any, dict[str, Any]] | None] | None = None
