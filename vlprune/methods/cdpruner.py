"""CDPruner: keep visual tokens that matter for the text and differ from each other, as a determinantal point process.

Reference: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv:2506.10967 (NeurIPS 2025).
Official code: https://github.com/Theia-4869/CDPruner

Convention: with r the relevance, brought to (0, 1], the kernel is r_i r_j cos(i, j) over the projected tokens, and the set of largest determinant is
approached greedily. The program's T is ``num_keep``.

Relevance needs text and picture in one space. The program uses CLIP's: the tower's features at the feature layer through CLIP's last norm and visual
projection, the text through CLIP's text tower, in pieces of 77 tokens. A language model has no text tower, so

- by default it is the cosine of the projected tokens with the text tokens behind the image, both as the language model's input;
- with ``text_embeds`` and ``image_embeds`` it is the program's, from the user's own encoder::

    clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336")
    vlprune.apply(model, "cdpruner", text_embeds=lambda: clip.get_text_features(**current_prompt),
                  image_embeds=lambda x: clip.visual_projection(clip.vision_model.post_layernorm(x)))

``variant="code"`` takes the cosine with a minus, as the released program does for CLIP's patches; the published numbers are that program's, so it is the
default where embeddings are given. ``variant="paper"`` takes the cosine as it is, and is the default with the language model's own states, about which
the program says nothing.

Differences:
- Relevance is brought to (0, 1] over the tiles of an image; the program does it over all tiles of a call, which is the same for one image.
- Tiles share the budget in proportion to their tokens, for tiles of equal size the program's equal number; ``tiles="together"``: one list. In a model that
  lays the crops of an image out as one mosaic, that is one tile. Newlines come last.
- Where all tokens are equally relevant, or no text follows, r is 1; the program divides by 0.
- Once the chosen tokens span the space (K above the rank of the kernel) the most relevant come next; the program goes on with rounding errors.
- Kept tokens keep their positions; the program renumbers them (``positions="renumber"``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlprune.budget import Budget, Keep
from vlprune.errors import OptionError
from vlprune.kernels.greedy import Determinantal
from vlprune.method import MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.points import BeforeLLM
from vlprune.protocols import Tap
from vlprune.reducers import Drop
from vlprune.scorers.relevance import Relevance
from vlprune.scorers.scaled import Scaled
from vlprune.selectors.greedy import Greedy

SIGNS = {"code": -1, "paper": 1}
TILES = ("apart", "together")


def cdpruner(
    facts: ModelFacts,
    keep: Keep = 1 / 3,
    *,
    text_embeds: Tensor | Callable[[], Tensor] | None = None,
    image_embeds: Callable[[Tensor], Tensor] | None = None,
    variant: str | None = None,
    tiles: str = "apart",
) -> PruningMethod:
    """Keep relevant and diverse tokens before the language model.

    Args:
        facts: of the model.
        keep: share or number of visual tokens per item.
        text_embeds: (M, C) embeddings of the prompt, or a function that returns those of the current one; the same for every item of a call.
        image_embeds: maps the vision tower's features (B, N, Dv) to that space, (B, N, C).
        variant: ``"code"`` (minus the cosine) or ``"paper"``; by default the first with ``text_embeds``, else the second.
        tiles: ``"apart"`` or ``"together"``: whether each tile or frame picks by itself.
    """
    if variant is None:
        variant = "paper" if text_embeds is None else "code"
    if variant not in SIGNS:
        raise OptionError(f"variant={variant!r}: one of {', '.join(map(repr, SIGNS))}")
    if tiles not in TILES:
        raise OptionError(f"tiles={tiles!r}: one of {', '.join(map(repr, TILES))}")
    features = None if text_embeds is None else Tap("vision_states", facts.feature_layer)
    scorer = Scaled(Relevance(SIGNS[variant], text_embeds, image_embeds, features), lift=1e-6, eps=0.0)
    return PruningMethod("cdpruner", (Stage(BeforeLLM(), scorer, Greedy(Determinantal(), apart=tiles == "apart"), Drop(), Budget(keep)),))


CARD = MethodCard(
    "cdpruner",
    cdpruner,
    "relevance to the text and diversity: greedy choice of the largest determinant",
    paper="arXiv:2506.10967",
    code="https://github.com/Theia-4869/CDPruner",
    needs=("text_states",),  # "vision_states" instead with embeddings of the user's own
    text_aware=True,
    golden=("cdpruner",),
)
