"""TCA: inside a vision tower, patches that CLS attends to stay, the next ones become four, the rest one; pictures seen before help with new ones.

Reference: "Token Condensation as Adaptation", arXiv:2410.14729 (ICCV 2025). Official code: https://github.com/Jo-wang/TCA

Convention: between attention and MLP of the blocks 3, 6 and 9 of 12, counted from 0, scaled to the depth, by the CLS attention of that very block. The
paper's rate r is what a stage takes from what reached it, twice over for the clusters: of 196 patches, r = 0.1 leaves 142, 103 and 76, here ``keep=0.39``,
what is left at the end, reached in equal ratios. One share per stage may be given instead.

On a stream of pictures for zero-shot classification, a `Reservoir` corrects the logits, and its class means take part in the attention of the three
blocks (domain anchors) once every class has two pictures:

    memory = Reservoir(num_classes, **PRESETS["imagenet"])
    with torch.no_grad(), vlprune.apply(model, "tca", memory=memory):
        for picture in stream:
            out = model(**picture, output_hidden_states=True)
            logits = memory.correct(out.logits_per_image, cls_states(out.vision_model_output.hidden_states[1:]))

``variant="code"`` (default) ranks by the mean attention over heads, as the released program does, from which the published numbers come;
``variant="paper"`` by the mean over heads of each head's ranking, which the program computes and does not use.

Differences:
- Exactly K tokens stay, the new ones among them: a cluster at the place of its centre, the last one at that of the best it stands for. Where K is
  small there are fewer clusters, and one patch stays as it is.
- The first centre is the best of the clustered patches (released: a random one); ``seed`` draws it. A centre is never left without itself (released: of
  two equal ones, the second would be a zero).
- Batches are fine; a reservoir takes their pictures one after the other, and all of them before it corrects.
- A tower without CLS is ranked by the attention received from all tokens, and has neither anchors nor ``variant="paper"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlprune.budget import Keep
from vlprune.errors import OptionError
from vlprune.method import Guests, MethodCard, ModelFacts, PruningMethod, Stage
from vlprune.methods._in_tower import budgets, chosen_layers
from vlprune.methods._reservoir import PRESETS, Reservoir, cls_states, logit_correction
from vlprune.points import VisionMiddle
from vlprune.protocols import Scorer, Tap
from vlprune.reducers.condense import CondenseParts
from vlprune.scorers import SignalScore
from vlprune.scorers.mean_rank import MeanRank
from vlprune.selectors.condense import Condense

__all__ = ["CARD", "PRESETS", "Reservoir", "cls_states", "logit_correction", "tca"]

VARIANTS = ("code", "paper")


def tca(
    facts: ModelFacts,
    keep: Keep | Sequence[Keep] = 0.39,
    *,
    layers: Sequence[int] | None = None,
    variant: str = "code",
    memory: Reservoir | None = None,
    seed: int | None = None,
) -> PruningMethod:
    """Condense what CLS does not attend to.

    Args:
        facts: of the model.
        keep: share or number of an image's patches left at the end, reached in equal ratios; or a share or number per stage.
        layers: vision blocks, counted from 0, between whose attention and MLP the stages act; by default 3, 6 and 9 of 12, scaled to the depth.
        variant: ``"code"`` ranks by mean attention, ``"paper"`` by mean rank over the heads.
        memory: a `Reservoir`, whose class means then take part in the attention of these blocks.
        seed: draws the first centre of the clusters.
    """
    if variant not in VARIANTS:
        raise OptionError(f"variant={variant!r}: choose 'code' or 'paper'")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise OptionError(f"seed={seed!r}: a whole number, or None for the best patch")
    if not facts.has_cls and (variant == "paper" or memory is not None):
        raise OptionError("this tower has no CLS token, which memory= and variant='paper' need")
    chosen = chosen_layers(layers, facts)
    if memory is not None and 0 in chosen:
        raise OptionError(f"layers={chosen}: with a memory from 1 on, since its class means are those of the block before")
    stages = []
    for layer, budget in zip(chosen, budgets(keep, len(chosen)), strict=True):
        weights = Tap("cls_row" if facts.has_cls else "column_mean", layer)
        scorer: Scorer = SignalScore(weights) if variant == "code" else MeanRank(Tap("cls_row_heads", layer))
        stages.append(Stage(VisionMiddle(layer), scorer, Condense(seed), CondenseParts(weights), budget))
    acts = memory is not None and not all(stage.budget.is_everything for stage in stages)
    guests = tuple(Guests(layer, memory.guest(layer)) for layer in chosen) if memory is not None and acts else ()
    return PruningMethod("tca", tuple(stages), guests=guests)


CARD = MethodCard(
    "tca",
    tca,
    "attention of CLS inside three blocks of a vision tower; what leaves becomes four cluster means and one sum",
    paper="arXiv:2410.14729",
    code="https://github.com/Jo-wang/TCA",
    points=("vision:K.mid", "vision:K.mid", "vision:K.mid"),
    needs=("cls_row",),
    modality="image",
    reduction="merge",
    exact=False,
    default_keep=0.39,
    golden=("tca",),
)
