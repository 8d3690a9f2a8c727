"""The contracts between the parts, in words that the tests check.

Shapes: B visual items of equal size in one call, N visual tokens of an item, K kept, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vlprune.errors import MissingSignalError

#: What can be tapped in a vision tower, with the shape for an item of N tokens. In towers with a merger (Qwen-VL) a visual token's value is the
#: mean over its patches.
VISION_KINDS: dict[str, str] = {
    "column_mean": "(N,) attention received: mean over heads and over all queries, CLS included",
    "cls_row": "(N,) head-mean attention row of CLS",
    "cls_row_heads": "(N, H) attention row of CLS, head by head",
    "cls_row_wide": "(N,) attention row of CLS with all heads as one: softmax of q.k over the whole width, divided by its root",
    "received_from": "(N,) head-mean attention received from the queries whose own column sum is above options[0] times the mean",
    "vision_keys": "(N, d) head-mean keys",
    "vision_keys_all": "(N, H d) keys of all heads, side by side",
    "vision_states": "(N, Dv) output of the block: what the projector gets, for the feature layer",
    "patch_states": "(N, M, Dv) output of the block at the M patches that make each visual token, zeros where it has fewer; inside a tower, for videos",
    "cls_state": "(N, Dv) output of the block at CLS, the same for every token",
    "pixels": "(N, 3 p p) the patch of the picture, as given to the tower, channel by channel; layer is ignored",
    "survives": "(N,) 1 where stages inside the tower left the token, else 0; layer is ignored; for the engine, not for methods",
    "sensitivity": "(N,) how much the projector's output moves with its input; layer is ignored, options as in `vlprune.kernels.sensitivity`",
}
#: What can be tapped in a decoder. ``text_*`` are aligned with the T text tokens after the item (`ScoreInputs.text_valid`).
DECODER_KINDS: dict[str, str] = {
    "last_row": "(N,) head-mean attention row of the last prompt token; options[0]: mean of those of that many last text tokens, which have to be protected",
    "received": "(N,) head-mean attention that the row pays it, summed; silenced heads pay none; options[0]: 'mean' over all, 'seen' over those that see it",
    "text_rows": "(N,) mean of such rows over the text tokens after the item",
    "text_mass": "(N,) mean share of attention that those text tokens pay to the item, the same for every token",
    "text_max": "(N,) largest attention weight over heads and over those text tokens",
    "rater_rows": "(N,) mean of such rows over the text raters: tokens that the item's embeddings point at more than at the average text token",
    "rater_rows_plus": "(N,) the same over the options[0] heads with most such attention, divided by the attention that positions alone would give",
    "transition": "(N, 6) module input against output: size ratio, cosine and denominator of attention and MLP",
    "key_l1": "(N,) L1 norm of the rotated keys of all heads",
    "normed": "(N, D) the decoder's final norm applied to the hidden states at the point; layer is ignored",
    "text_valid": "(T,) which entries of text signals are text tokens after the item; comes with the others by itself",
    "text_states": "(T, D) hidden states at the point; layer is ignored",
    "text_normed": "(T, D) the decoder's final norm applied to them; layer is ignored",
    "text_key_l1": "(T,) L1 norm of the rotated keys of all heads",
}
TAP_KINDS = (*VISION_KINDS, *DECODER_KINDS)
#: Signals that stages for ``"text"`` and ``"all"`` tokens can ask for; an item is then a row, and N counts its tokens without the protected ones.
ROW_SET_KINDS = frozenset({"last_row", "received", "transition", "key_l1", "normed"})


@dataclass(frozen=True)
class Tap:
    """A request for one signal.

    Attributes:
        kind: one of ``TAP_KINDS``.
        layer: 0-based block the signal is read from. Decoder attention taps at a layer that has not run when the point
            is reached are *probes*: that layer's own norm and projections applied to the point's input.
        options: numbers that the kind takes, if any.
    """

    kind: str
    layer: int
    options: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in TAP_KINDS:
            raise MissingSignalError(f"no signal {self.kind!r}. Known: {', '.join(TAP_KINDS)}.")

    @property
    def tower(self) -> str:
        """``"vision"`` or ``"decoder"``."""
        return "vision" if self.kind in VISION_KINDS else "decoder"

    def __str__(self) -> str:
        return f"{self.kind}@{self.tower}:{self.layer}" + (f"{list(self.options)}" if self.options else "")


@dataclass(frozen=True)
class ScoreInputs:
    """What a scorer or selector may look at: B visual items of equal size at one pruning point.

    Attributes:
        tokens: (B, N, D) hidden states of the visual tokens still there.
        num_keep: K, known before the data.
        grid: (B, N, 3) frame, row, column, or ``None`` where the model has no grid.
        original: (B, N) each token's number within its item before any reduction.
        num_original: number of tokens of each item before any reduction.
        modality: ``"image"``, ``"video"``; ``"text"`` or ``"all"`` where the item is the text, or all, of a row (`Stage.tokens`).
        signals: the tensors asked for, keyed by tap; (B, N) or (B, N, C), float32; ``text_*`` signals (B, T) or (B, T, C).
        sizes: (B, N) how many original tokens each token stands for, or ``None`` if one each.
        text_valid: (B, T) which entries of ``text_*`` signals are text tokens after the item, others are filler; ``None`` if none were asked for.
        project: the model's projector, features (B, K, Dv) as in ``vision_states`` of the feature layer to tokens (B, K, D), where one feature
            becomes one token and nothing is done to it afterwards; ``None`` elsewhere (tiles, pooled frames, mergers of several patches).
        num_frames: frames of each video as the host knows it; ``None`` for images and where only the grid says so.
        roles: (B, N) role that an earlier stage gave each token (`Selection.roles`), or ``None``.
    """

    tokens: Tensor
    num_keep: int
    grid: Tensor | None = None
    original: Tensor | None = None
    num_original: int = 0
    modality: str = "image"
    signals: Mapping[Tap, Tensor] = field(default_factory=dict)
    sizes: Tensor | None = None
    text_valid: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    num_frames: int | None = None
    roles: Tensor | None = None

    def signal(self, tap: Tap) -> Tensor:
        """Return the signal asked for in ``needs``; (B, N) or (B, N, C), float32."""
        try:
            return self.signals[tap]
        except KeyError:
            have = ", ".join(map(str, self.signals)) or "none"
            raise MissingSignalError(f"signal {tap} was not collected (there: {have}); name it in `needs`.") from None


@dataclass(frozen=True)
class Selection:
    """Which tokens stay.

    Attributes:
        keep_indices: (B, K) int64, strictly increasing, numbering the N tokens of ``ScoreInputs.tokens``.
        roles: (B, K) small ints that index ``role_names``, for pictures; ``None`` if there is one role only.
        role_names: names of the roles.
        plan: what a selector worked out on the way and the reducer made for it goes on with (indices, no features); ``None`` elsewhere.
    """

    keep_indices: Tensor
    roles: Tensor | None = None
    role_names: tuple[str, ...] = ("kept",)
    plan: Any = None


@dataclass(frozen=True)
class Reduced:
    """What a reducer hands back: new features for the kept tokens, or ``None`` when they are unchanged."""

    tokens: Tensor | None = None        # (B, K, D)
    sizes: Tensor | None = None         # (B, K)


@runtime_checkable
class Scorer(Protocol):
    """Maps visual tokens to importance.

    Returns float32 scores of shape (B, N); the higher, the more worth keeping. Pure: the same inputs give the same
    scores and nothing is modified. Permuting the tokens (with their signals) permutes the scores.
    """

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Signals that must be collected for it."""
        ...

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """(B, N) float32."""
        ...


@runtime_checkable
class Selector(Protocol):
    """Chooses exactly ``inputs.num_keep`` tokens, in raster order, on the device and without reading it back."""

    @property
    def needs(self) -> tuple[Tap, ...]:
        """Signals that must be collected for it."""
        ...

    def __call__(self, scores: Tensor, inputs: ScoreInputs) -> Selection:
        """The tokens that stay."""
        ...


@runtime_checkable
class Reducer(Protocol):
    """Decides what becomes of the others: nothing (drop), or folded into the kept ones (merge, recycle).

    One that looks at signals has a property ``needs`` as scorers have.
    """

    @property
    def exact(self) -> bool:
        """Whether kept tokens are unchanged, so that "drop equals mask" must hold."""
        ...

    def __call__(self, inputs: ScoreInputs, selection: Selection) -> Reduced:
        """New features of the kept tokens."""
        ...


class GenerationState:
    """What policies remember of one generation. It belongs to the cache object: interleaved generations do not see each other's, and beams take it along.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``, of the call that runs now.
        step: decoded tokens before this one, since the last prompt; 0 in prompts.
        position: tokens before this call.
        turn: prompts before this one on the same cache.
        values: yours. Tensors have a leading batch dimension and follow the beams; other things are shared by them.
        scratch: yours, emptied at every call: decisions of this step.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.position, self.turn = "prefill", 0, 0, -1
        self.values: dict[str, Any] = {}
        self.scratch: dict[Any, Any] = {}
        self.trace: Any = None
        self._steps = 0
        self._last: tuple[Any, GenerationState] | None = None

    def begin(self, phase: str, position: int) -> None:
        """A call of the model starts."""
        self.phase, self.position, self.scratch = phase, position, {}
        self.step = 0 if phase == "prefill" else self._steps
        self._steps = 0 if phase == "prefill" else self._steps + 1
        self.turn += phase == "prefill"

    def rows(self, index: Tensor) -> GenerationState:
        """The state of other batch rows (beams); asked with the same tensor by every layer, answered once."""
        return self._once(index, lambda value: value[index.to(value.device)])

    def repeat(self, repeats: int) -> GenerationState:
        """The state with every row repeated; asked by every layer, answered once."""
        return self._once(repeats, lambda value: value.repeat_interleave(repeats, dim=0))

    def _once(self, key: Any, pick: Callable[[Tensor], Tensor]) -> GenerationState:
        if self._last is None or self._last[0] is not key:
            made = GenerationState()
            vars(made).update({name: value for name, value in vars(self).items() if name != "_last"})
            made.values = {name: pick(value) if isinstance(value, Tensor) else value for name, value in self.values.items()}
            self._last = (key, made)
        return self._last[1]


@dataclass(frozen=True)
class Step:
    """What a policy sees of a decoding step.

    Attributes:
        layer: 0-based decoder layer. part: ``"attn"``, ``"mlp"`` or ``"block"``.
        states: (B, Q, D) hidden states at the input of the part; of the MLP, what it is given. Q is 1 unless several tokens come at once.
        state: of the generation.
        after: behind an `vlprune.method.Observe`, hidden states behind the layer. ran: there, which rows ran, on the host; ``None``: all of them.
    """

    layer: int
    part: str
    states: Tensor
    state: GenerationState
    after: Tensor | None = None
    ran: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class HeadInputs:
    """What a choice of keys head by head looks at: one layer's attention, rotated, the cache's keys included.

    Attributes:
        layer: 0-based decoder layer. phase: ``"prefill"`` or ``"decode"``.
        queries: (B, H, Q, d). keys, values: (B, Hkv, S, d), earlier entries first; query i stands at entry S - Q + i (growing caches).
        mask: (B, 1, Q, S) bool or additive, or ``None``: causal.
        scale: on the logits.
        tokens: in prompts, (B, Q) which of the new entries are in the token set of the `vlprune.method.Attend`; ``None`` while decoding.
        real: in prompts, (B, Q) which of the new entries are neither padding nor filler.
        state: of the generation; ``None`` where the method has nothing that follows decoding, or there is no cache.
        past: in prompts, entries that were in the cache before the new ones.
        real_counts: in prompts, for each row how many of the new entries are real, on the host.
        counts: in prompts, for each row how many of the new entries are in the token set, on the host.
        plain: in prompts, whether the mask means nothing but "causal, and no padding": no window, no blocks that see each other.
        cap: soft cap on the logits, or ``None``.
    """

    layer: int
    phase: str
    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    scale: float
    tokens: Tensor | None = None
    real: Tensor | None = None
    state: GenerationState | None = None
    past: int = 0
    real_counts: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    plain: bool = False
    cap: float | None = None


@dataclass(frozen=True)
class HeadChoice:
    """What each head attends to.

    Places of ``keys`` and ``queries`` ascend in a prompt; one past the last entry is filler, which nobody sees and which gets no answer. With one new
    token ``keys`` may also be (B, Hkv, K), one choice for the heads that share keys.

    Attributes:
        keys: (B, H, K) int64: entries that a head sees; ``None``: all.
        queries: (B, H, R) int64: new tokens that a head asks with, the others get nothing from it; ``None``: all. The same tensor as ``keys``
            says that both are chosen alike: in a prompt on an empty cache whose mask is plain, attention is then causal among them, and no mask is built.
        seen: bool, broadcast to (B, H, R, K): pairs that may be seen at all, besides what the model's mask allows; ``None``: all.
        heads: (B, n) int64: query heads that answer, the others give zeros; ``None``: all. Instead of the above.
        out: (B, H, Q, d): the attention itself, where each query has keys of its own and the method has summed them up. Instead of the above.
        pairs: query-key pairs of each row in a head's answer, mean over heads, where shapes do not say it (``out``).
        flops: of the matrix products that choosing took.
        counts: of each row how many of ``queries`` are no filler, on the host; ``None``: as many as there are tokens to fill them.
    """

    keys: Tensor | None = None
    queries: Tensor | None = None
    seen: Tensor | None = None
    heads: Tensor | None = None
    out: Tensor | None = None
    pairs: float | None = None
    flops: float = 0.0
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RouteInputs:
    """What a choice among experts looks at: the tokens that reach the experts of one layer in one call, row after row.

    Attributes:
        layer: 0-based decoder layer.
        probabilities: (T, k) float32: what the router gives the k experts that it chose for each token, out of 1 for all experts.
        weights: (T, k) what their outputs are multiplied by, as the model has it.
        experts: (T, k) int64, their numbers.
        visual: (T,) bool, visual tokens; ``None``: none of them is.
    """

    layer: int
    probabilities: Tensor
    weights: Tensor
    experts: Tensor
    visual: Tensor | None = None


def mark(mask: Tensor, rows: Tensor, slots: Tensor, value: bool) -> None:
    """Set entries ``slots`` (G, n) of ``rows`` (G,) of a bool mask (B, L). Item assignment of a Python bool would make the host wait for a GPU."""
    mask.index_put_((rows[:, None], slots), torch.full((), value, dtype=torch.bool, device=mask.device))


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Pick ``indices`` (B, K) along dimension 1 of ``x`` (B, N, ...)."""
    shape = indices.shape + (1,) * (x.dim() - 2)
    return torch.gather(x, 1, indices.reshape(shape).expand(*indices.shape, *x.shape[2:]))
