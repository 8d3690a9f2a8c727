"""Every method that acts inside a vision tower, on 1,000 ImageNet pictures: top-1, agreement with dense, tokens, FLOPs, speed.

    python -m vlprune.evals.imagenet --data ../shared/data --library timm,hf --methods all --keep 0.7,0.5,0.3 --out evals/results/imagenet_vit_tiny

``--data`` holds ``datasets/imagenet1k_sample_256.tar.xz``, one picture a class, whose file order is the class index (EliSchwartz/imagenet-sample-images;
ImageNet pictures, for non-commercial research and education only, not part of this repository), and ``weights/``, a ViT-tiny as a folder for
transformers and as a file with timm's names. Pictures are scaled to a short side of 248 (bicubic), cropped to 224 in the middle and normalised with
0.5, as timm does for these weights.

``--keep`` is what each stage leaves of what reached it: a method with three stages or more leaves its third power at the end, one with a single stage
the share itself. `SETTINGS` says where the methods act and what they are asked for, `PARTS` adds rows that are no published methods but parts of this
library put together: diversity, and merging instead of dropping. First come `dense` and, for every set of points and counts among the methods, `random`
there, the mean of ``--draws`` seeds.

Rows are written as they come, and the predictions of one that was begun batch by batch: a second call goes on where the first was killed, and skips
what is there with the same settings (``--fresh`` does not). With ``--limit`` fewer pictures are read, evenly spaced, and the results say that they do
not compare.
"""

from __future__ import annotations

import argparse
import inspect
import io
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlprune
from vlprune.adapter import find_adapter
from vlprune.api import check_stages
from vlprune.budget import Budget
from vlprune.errors import OptionError, VlpruneError
from vlprune.evals.command import options_in
from vlprune.evals.imagenet_results import Results, mean_and_error
from vlprune.fitting import reason
from vlprune.kernels.greedy import ISOLATED, Determinantal, MaxMin
from vlprune.method import ModelFacts, PruningMethod, Stage
from vlprune.methods.random_drop import RandomScore
from vlprune.points import Depth, VisionLayer
from vlprune.protocols import Reducer, Scorer, Selector, Tap
from vlprune.reducers import Drop
from vlprune.reducers.merge import Merge
from vlprune.scorers import Constant, SignalScore
from vlprune.selectors import TopK
from vlprune.selectors.greedy import Greedy

ARCHIVE = "datasets/imagenet1k_sample_256.tar.xz"
WEIGHTS = {"timm": "weights/vit_tiny_patch16_224.fp16.safetensors", "hf": "weights/vit_tiny_patch16_224_hf"}
SHORT_SIDE, SIZE, MEAN, STD = 248, 224, 0.5, 0.5
BATCH, DRAWS, TIMED = 50, 3, 4
STAGES = (Depth(4, of=12), Depth(7, of=12), Depth(10, of=12))            # behind the 4th, 7th and 10th block, EViT's places


def places_of(facts: ModelFacts) -> tuple[int, ...]:
    """`STAGES` in this tower."""
    return tuple(stage.resolve(facts.vision_layers) for stage in STAGES)


#: Options of a method here, beside its defaults: ``(facts) -> options``.
SETTINGS: dict[str, Callable[[ModelFacts], dict[str, Any]]] = {
    "cls_attention": lambda facts: {"layers": places_of(facts)},
    "aclip": lambda facts: {"when": "always"},
}
#: Methods that are not measured, with the reason.
NOT_HERE = {"patchdropout": "acts in training only; asked to act in evaluation, it is random at vision:0"}
#: Rows that are no published methods: scorer (``None``: attention of CLS), selector, reducer at `STAGES`.
PARTS: dict[str, tuple[Scorer | None, Selector, Reducer]] = {
    "[cls, merge]": (None, TopK(), Merge()),
    "[diverse]": (Constant(), Greedy(MaxMin(), ISOLATED), Drop()),
    "[diverse, merge]": (Constant(), Greedy(MaxMin(), ISOLATED), Merge()),
    "[cls + diverse]": (None, Greedy(Determinantal()), Drop()),
    "[cls + diverse, merge]": (None, Greedy(Determinantal()), Merge()),
}
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """One row to be measured: a method with its points resolved, and the options it was built with."""

    name: str
    keep: float
    method: PruningMethod
    options: str = ""

    def places(self, num_tokens: int) -> list[list[Any]]:
        """Point, tokens left and place of return of every stage: methods that agree in them share their random baseline."""
        stages = [[stage.point.label, stage.budget.num_keep(num_tokens), stage.restore] for stage in self.method.stages]
        bypasses = self.method.patch_bypasses
        return stages + [[b.label, None if b.budget is None else b.budget.num_keep(num_tokens), b.layer + 1] for b in bypasses]

    def patches(self, num_tokens: int) -> int:
        """Left at the end."""
        return min((stage.budget.num_keep(num_tokens) for stage in self.method.stages if stage.restore is None), default=num_tokens)

    def random(self, seed: int) -> PruningMethod:
        """Random drops at the same points with the same counts."""
        stages = (Stage(stage.point, RandomScore(seed), TopK(), Drop(), stage.budget, restore=stage.restore) for stage in self.method.stages)
        bypasses = (replace(bypass, scorer=RandomScore(seed), budget=bypass.budget or Budget(0.5)) for bypass in self.method.patch_bypasses)
        return PruningMethod("random", tuple(stages), patch_bypasses=tuple(bypasses))


# data and models


def load_pictures(archive: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 224, 224) uint8 and their classes, decoded once."""
    from PIL import Image

    if not archive.exists():
        raise SystemExit(f"{archive} is not there: give the folder that holds {ARCHIVE}, or the archive itself, with --data (see the docstring)")
    with tarfile.open(archive) as tar:
        files = sorted((m for m in tar.getmembers() if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg", ".png"))), key=lambda m: m.name)
        chosen = list(range(len(files))) if limit is None else [round(i * len(files) / limit) for i in range(min(limit, len(files)))]
        wanted = {files[number].name: number for number in chosen}
        found: dict[int, Tensor] = {}
        for member in tar:                                               # in the order of the archive: it can only be read forward
            if member.name in wanted:
                data = tar.extractfile(member)
                assert data is not None
                found[wanted[member.name]] = prepared(Image.open(io.BytesIO(data.read())).convert("RGB"))
    return torch.stack([found[number] for number in chosen]), torch.tensor(chosen)


def prepared(picture: Any) -> Tensor:
    """(3, 224, 224) uint8 of the picture's middle."""
    from PIL import Image

    scale = SHORT_SIDE / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    cropped = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
    return torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).reshape(SIZE, SIZE, 3).permute(2, 0, 1).contiguous()


def load_model(library: str, weights: Path) -> tuple[nn.Module, Predict, str]:
    """The classifier in float32, a function from normalised pictures to logits, and the version of its library."""
    if not weights.exists():
        raise SystemExit(f"{weights} is not there: give the folder that holds {WEIGHTS[library]} with --data, or the weights with --weights")
    if library == "hf":
        import transformers

        model = transformers.AutoModelForImageClassification.from_pretrained(weights, dtype=torch.float32).eval()
        return model, lambda pixels: model(pixel_values=pixels).logits, transformers.__version__
    try:
        import timm
    except (ImportError, RuntimeError) as error:                         # RuntimeError: a torchvision that was built for another torch
        raise SystemExit(f"timm cannot be imported ({error}): pip install 'vlprune[vit]'") from None
    from safetensors.torch import load_file

    state = {name: value.float() for name, value in load_file(weights).items()}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(state["head.bias"]))
    model.load_state_dict(state)
    return model.eval(), model, timm.__version__


# plans


def make_plans(model: nn.Module, keeps: Sequence[float], methods: Sequence[str] | None, extra: dict[str, dict[str, Any]]) -> tuple[list[Plan], dict[str, str]]:
    """A plan for each method and keep, and why the others are left out."""
    adapter = find_adapter(model)
    facts = adapter.facts
    names = list(methods or [name for name in vlprune.list_methods() if any("vision" in point for point in vlprune.get_method(name).points)] + list(PARTS))
    plans, left_out = [], {name: why for name, why in NOT_HERE.items() if name in names}
    for keep in keeps:
        for name in names:
            if name in left_out or name in ("dense", "random"):
                continue
            try:
                plan = parts_plan(name, facts, keep) if name in PARTS else card_plan(name, facts, keep, extra.get(name, {}))
                check_stages(plan.method, adapter)
                plans.append(plan)
            except VlpruneError as error:
                left_out[name] = reason(error)
    return plans, left_out


def card_plan(name: str, facts: ModelFacts, keep: float, extra: dict[str, Any]) -> Plan:
    """A method of the registry."""
    card = vlprune.get_method(name)
    if card.modality == "video":
        raise OptionError("works on videos only")
    known = inspect.signature(card.build).parameters
    options = {**{key: value for key, value in SETTINGS.get(name, lambda facts: {})(facts).items() if key in known}, **extra}
    method = card.build(facts, 0.5, **options)
    if not all(stage.point.tower == "vision" for stage in method.stages):
        raise OptionError("acts in a decoder too")
    share = round(keep ** max(1, min(3, len(method.stages))), 6)
    return Plan(name, keep, card.build(facts, share, **options), ", ".join(f"{key}={value}" for key, value in options.items()))


def parts_plan(name: str, facts: ModelFacts, keep: float) -> Plan:
    """Parts put together."""
    scorer, selector, reducer = PARTS[name]
    kind = "cls_row" if facts.has_cls else "column_mean"
    stages = [
        Stage(VisionLayer(layer), scorer or SignalScore(Tap(kind, layer - 1)), selector, reducer, Budget(round(keep**step, 6)))
        for step, layer in enumerate(places_of(facts), start=1)
    ]
    return Plan(name, keep, PruningMethod(name, tuple(stages)))


# measuring


def normalised(pictures: Tensor) -> Tensor:
    """Pixels as the model takes them."""
    return (pictures.float() / 255 - MEAN) / STD


@torch.no_grad()
def classify(predict: Predict, pictures: Tensor, found: list[int], after: Callable[[], None]) -> Tensor:
    """(n,) predicted classes; ``found`` holds those known already and gets the others batch by batch, ``after`` is called behind each."""
    for part in pictures[len(found) :].split(BATCH) if len(found) < len(pictures) else ():
        found.extend(predict(normalised(part)).argmax(dim=-1).tolist())
        after()
    return torch.tensor(found)


@torch.no_grad()
def observe(model: nn.Module, predict: Predict, method: PruningMethod, pictures: Tensor, pairs: int = TIMED) -> tuple[Any, Any, float]:
    """Report and trace of one batch, and dense time over pruned time: the median over pairs of runs on the same batch, in turning order."""
    ratios = []
    handle = None
    for number in range(pairs + 1):                                      # the first pair warms up
        start = (number * BATCH) % max(1, len(pictures) - BATCH + 1)
        pixels = normalised(pictures[start : start + BATCH])
        seconds = {}
        for pruned in (number % 2 == 0, number % 2 == 1):
            with vlprune.apply(model, method) if pruned else nullcontext() as context:
                begun = time.perf_counter()
                predict(pixels)
                seconds[pruned] = time.perf_counter() - begun
            handle = context if pruned else handle
        ratios.append(seconds[False] / seconds[True])
    assert handle is not None
    return handle.report(), handle.trace, statistics.median(ratios[1:])


def measure(
    model: nn.Module, predict: Predict, methods: Sequence[PruningMethod], pictures: Tensor, labels: Tensor, dense: Tensor, found: list[list[int]], after: Any
) -> dict[str, Any]:
    """The numbers of a row: means over ``methods`` (the seeds of `random`, or one method)."""
    right, same = torch.zeros(len(labels), dtype=torch.int64), torch.zeros(len(labels), dtype=torch.int64)
    for method, known in zip(methods, found, strict=True):
        with vlprune.apply(model, method):
            classes = classify(predict, pictures, known, after)
        right += classes == labels
        same += classes == dense
    report, trace, ratio = observe(model, predict, methods[0], pictures)
    top1, error = mean_and_error(right / len(methods))
    agreement, agreement_error = mean_and_error(same / len(methods))
    return {
        "points": [record.point for record in report.points],
        "tokens": statistics.mean(trace.vision_tokens) / trace.vision_sequences,
        "top1": top1,
        "error": error,
        "agreement": agreement,
        "agreement_error": agreement_error,
        "flops_share": report.flops_pruned / report.flops_dense,
        "speed": ratio,
        "right": "".join(map(str, right.tolist())),                      # in how many draws each picture is right
    }


def run(
    model: nn.Module, predict: Predict, pictures: Tensor, labels: Tensor, library: str, plans: list[Plan], results: Results, tell: Any, draws: int = DRAWS
) -> None:
    """Measure what is not there yet, `dense` first and each `random` before the methods that it belongs to."""
    num_tokens = num_patches(model, predict, pictures)
    todo: list[tuple[dict[str, Any], list[PruningMethod]]] = []
    for plan in plans:
        common = {"library": library, "keep": plan.keep, "places": plan.places(num_tokens), "patches": plan.patches(num_tokens)}
        for name, options, methods in (("random", "", [plan.random(seed) for seed in range(draws)]), (plan.name, plan.options, [plan.method])):
            settings = {**common, "method": name, "options": options, "draws": len(methods)}
            if results.row(settings) is None and settings not in [known for known, _ in todo]:
                todo.append((settings, methods))
    todo.sort(key=lambda entry: (-entry[0]["keep"], entry[0]["method"] != "random"))
    first = {"library": library, "keep": 1.0, "places": [], "patches": num_tokens, "method": "dense", "options": "", "draws": 1}
    batches = -(-len(pictures) // BATCH)
    tell.begin(library, batches * (sum(len(methods) for _, methods in todo) + (results.row(first) is None)))

    def after() -> None:
        results.keep()
        tell.step()

    if results.row(first) is None:
        tell.row("dense", 1.0)
        known = results.classes(first, 0)
        dense = classify(predict, pictures, known, after)
        top1, error = mean_and_error((dense == labels).float())
        numbers = {"points": [], "tokens": num_tokens + tokens_in_front(model), "flops_share": 1.0, "speed": 1.0}
        agrees = {"agreement": 1.0, "agreement_error": 0.0}
        right = "".join("1" if hit else "0" for hit in (dense == labels).tolist())
        results.add(first, {**numbers, "top1": top1, "error": error, **agrees, "right": right, "classes": dense.tolist()})
    dense = torch.tensor(results.rows[results.key(first)]["classes"])
    for settings, methods in todo:
        tell.row(settings["method"], settings["keep"])
        found = [results.classes(settings, draw) for draw in range(len(methods))]
        results.add(settings, measure(model, predict, methods, pictures, labels, dense, found, after))


def num_patches(model: nn.Module, predict: Predict, pictures: Tensor) -> int:
    """N of one picture, seen by dropping once."""
    probe = vlprune.get_method("uniform").build(find_adapter(model).facts, 0.5, point="vision:1")
    with vlprune.apply(model, probe) as handle, torch.no_grad():
        predict(normalised(pictures[:1]))
        return int(handle.report().points[0].visual_before)


def tokens_in_front(model: nn.Module) -> int:
    """CLS and registers."""
    return int(getattr(find_adapter(model), "prefix", 0))


class Telling:
    """A progress bar on a terminal, a line a row elsewhere."""

    def __init__(self, progress: Any) -> None:
        self.progress, self.task, self.library = progress, None, ""

    def begin(self, library: str, batches: int) -> None:
        """Work on a library."""
        self.library = library
        self.task = self.progress.add_task(library, total=batches)

    def row(self, method: str, keep: float) -> None:
        """Work on a row."""
        self.progress.update(self.task, description=f"{self.library} {method} {keep:g}")
        if not sys.stderr.isatty():
            done = self.progress.tasks[-1]
            print(f"{self.library} {method} {keep:g} ({done.completed:g} of {done.total:g} batches done)", file=sys.stderr, flush=True)

    def step(self) -> None:
        """A batch is done."""
        self.progress.advance(self.task)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m vlprune.evals.imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder with datasets and weights, or the archive itself")
    parser.add_argument("--library", default="hf", help="timm, hf, or both with a comma")
    parser.add_argument("--weights", type=Path, help="of the model, for one library; by default those in the folder")
    parser.add_argument("--keep", default="0.7,0.5,0.3", help="what each stage leaves of what reached it")
    parser.add_argument("--methods", default="all", help="names; all: every method that acts inside a vision tower")
    parser.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("out/imagenet"))
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each random baseline, 1 to 9")
    parser.add_argument("--limit", type=int, help="number of pictures; results do not compare with full ones")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    given = parser.parse_args(argv)
    libraries = given.library.split(",")
    if not set(libraries) <= set(WEIGHTS) or (given.weights is not None and len(libraries) > 1):
        raise SystemExit(f"--library {given.library}: {' or '.join(WEIGHTS)}, or both with a comma (then without --weights)")
    if not 1 <= given.draws <= 9:
        raise SystemExit(f"--draws {given.draws}: 1 to 9")
    try:
        options = options_in(given.option)
    except OptionError as error:
        raise SystemExit(str(error)) from None
    archive = given.data / ARCHIVE if given.data.is_dir() else given.data
    pictures, labels = load_pictures(archive, given.limit)
    results = Results(given.out, fresh=given.fresh)
    arguments = [argument for argument in (sys.argv[1:] if argv is None else argv) if argument != "--fresh"]
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        tell = Telling(progress)
        for library in libraries:
            weights = given.weights or given.data / WEIGHTS[library]
            model, predict, version = load_model(library, weights)
            facts = {
                "command": " ".join(["python -m vlprune.evals.imagenet", *arguments]), "vlprune": vlprune.__version__, "torch": torch.__version__,
                "transformers" if library == "hf" else "timm": version, "device": "CPU, float32", "threads": torch.get_num_threads(),
                "weights": weights.name, "data": archive.name, "pictures": len(pictures), "limit": given.limit, "batch": BATCH,
                "keep": given.keep, "draws": given.draws,
            }  # fmt: skip
            keeps = [float(part) for part in given.keep.split(",")]
            methods = None if given.methods == "all" else given.methods.split(",")
            plans, left_out = make_plans(model, keeps, methods, options)
            results.begin(library, facts)
            results.left_out[library] = left_out
            run(model, predict, pictures, labels, library, plans, results, tell, given.draws)
    results.finish()
    print((given.out / "results.md").read_text())


if __name__ == "__main__":
    main()
