"""Where tokens can be reduced: the pruning points, and published layer numbers scaled to a model's depth."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.errors import OptionError


@dataclass(frozen=True)
class Depth:
    """A published layer number together with the depth it was published for.

    ``Depth(9, of=24).resolve(24)`` is 9. For another depth the *share* is kept and rounded half up,
    ``floor(layer * depth / of + 0.5)``, but a layer inside the stack (``0 < layer < of``) stays inside it.
    """

    layer: int
    of: int

    def resolve(self, depth: int) -> int:
        """Return the layer number for a stack of ``depth`` blocks."""
        scaled = (2 * self.layer * depth + self.of) // (2 * self.of)
        if 0 < self.layer < self.of:
            return min(max(scaled, 1), max(depth - 1, 1))
        return scaled


@dataclass(frozen=True)
class Point:
    """A place in the model where a stage acts: the input of block ``layer`` (0-based) of a tower."""

    layer: int
    tower: str = "decoder"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise OptionError(f"a pruning point needs a 0-based layer number, got {self.layer!r}")

    @property
    def label(self) -> str:
        """The name used in reports: ``"vision:3"``, ``"before_llm"`` or ``"llm:2"``."""
        if self.tower == "vision":
            return f"vision:{self.layer}"
        return f"llm:{self.layer}"

    @property
    def order(self) -> tuple[int, int]:
        """Which of two points of a tower comes first."""
        return self.layer, 0

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class VisionLayer(Point):
    """Input of vision block ``layer``: that many blocks saw every token."""

    tower: str = "vision"


@dataclass(frozen=True)
class VisionMiddle(Point):
    """Between attention and MLP of vision block ``layer``, whose own attention can be read there."""

    tower: str = "vision"

    @property
    def label(self) -> str:
        """``"vision:3.mid"``."""
        return f"vision:{self.layer}.mid"

    @property
    def order(self) -> tuple[int, int]:
        """Behind the input of the same block."""
        return self.layer, 1


@dataclass(frozen=True)
class LLMLayer(Point):
    """Input of decoder layer ``layer``; FastV's K=2 is ``LLMLayer(2)``, "after the 7th layer" ``LLMLayer(7)``."""

    tower: str = "decoder"


@dataclass(frozen=True)
class LLMPart(Point):
    """Where the rows of a part of decoder layer ``layer`` are chosen: ``"attn"``, ``"mlp"`` or ``"block"``. No stage acts here."""

    tower: str = "decoder"
    part: str = "block"

    @property
    def label(self) -> str:
        """``"llm:3.mlp"``."""
        return f"llm:{self.layer}.{self.part}"

    @property
    def order(self) -> tuple[int, int]:
        """The MLP comes behind what is at the input of the layer."""
        return self.layer, int(self.part == "mlp")


@dataclass(frozen=True)
class BeforeLLM(Point):
    """After the visual features were scattered into the embeddings, before decoder layer 0."""

    layer: int = 0
    tower: str = "decoder"

    @property
    def label(self) -> str:
        """The name used in reports."""
        return "before_llm"


def parse_point(text: str | Point) -> Point:
    """Read ``"vision:3"``, ``"vision:3.mid"``, ``"before_llm"`` or ``"llm:2"``; a ``Point`` passes through."""
    if isinstance(text, Point):
        return text
    name, _, layer = str(text).strip().lower().partition(":")
    if name == "before_llm" and not layer:
        return BeforeLLM()
    if name in ("vision", "llm") and layer.isdigit():
        return VisionLayer(int(layer)) if name == "vision" else LLMLayer(int(layer))
    if name == "vision" and layer.endswith(".mid") and layer[:-4].isdigit():
        return VisionMiddle(int(layer[:-4]))
    raise OptionError(f"no pruning point {text!r}. Write 'vision:K', 'vision:K.mid', 'before_llm' or 'llm:K' with K a 0-based layer number.")
