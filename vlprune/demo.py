"""The main job, shown: a model answers questions about pictures, dense and pruned side by side, and draws what stayed."""

from __future__ import annotations

import importlib
import inspect
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlprune.api import apply
from vlprune.draw import draw_kept, side_by_side
from vlprune.errors import OptionError, VlpruneError
from vlprune.loading import Loaded, load_embedded
from vlprune.report import Report
from vlprune.video import Clip, read_video, write_video

REPEATS = 7                             # timed runs of each kind
PATIENCE, SHORT_PATIENCE = 20.0, 4.0    # seconds after which timing stops early: a model of the user's, the demo
SEED = 2026                             # of the held-out scenes shown; the evaluation uses others
NUM_QUESTIONS = 6


@dataclass
class Outcome:
    """One question, dense and pruned.

    Attributes:
        truth: the right answers, one a row, where they are known.
        dense, pruned: answers, one a row.
        prefill_dense_ms, prefill_ms: medians of warm, interleaved runs; ``None`` if not timed.
        picture: file with what stayed.
    """

    question: str
    dense: list[str]
    pruned: list[str]
    report: Report
    truth: list[str] = field(default_factory=list)
    prefill_dense_ms: float | None = None
    prefill_ms: float | None = None
    picture: Path | None = None

    @property
    def speedup(self) -> float | None:
        """Dense over pruned prefill time."""
        return self.prefill_dense_ms / self.prefill_ms if self.prefill_dense_ms and self.prefill_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "question": self.question, "truth": self.truth, "dense": self.dense, "pruned": self.pruned,
            "prefill_dense_ms": self.prefill_dense_ms, "prefill_ms": self.prefill_ms, "speedup": self.speedup,
            "picture": str(self.picture) if self.picture else None, "report": self.report.to_dict(),
        }  # fmt: skip


def compare(
    loaded: Loaded, inputs: dict[str, Any], question: str, method: str | None, keep: Any, max_new_tokens: int = 32, patience: float = PATIENCE
) -> Outcome:
    """Answer dense, answer pruned, and time both prefills in turn."""
    model = loaded.model
    dense = loaded.answers(inputs, max_new_tokens)
    with apply(model, method, keep) as handle:
        pruned = loaded.answers(inputs, max_new_tokens)
        report = handle.report()
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    for turn in range(REPEATS + 1):
        slow = prefill_ms(model, inputs)
        with apply(model, method, keep):
            fast = prefill_ms(model, inputs)
        late = time.perf_counter() - started > patience
        if turn or late:                                                # the first turn warms up, if there is time for that
            times[0].append(slow)
            times[1].append(fast)
        if late:
            break
    return Outcome(question, dense, pruned, report, prefill_dense_ms=statistics.median(times[0]), prefill_ms=statistics.median(times[1]))


def prefill_ms(model: Any, inputs: dict[str, Any]) -> float:
    """Milliseconds of one forward pass over the prompt, as ``generate`` begins."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    cuda = inputs["input_ids"].device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.no_grad():
        model(**inputs, **options)
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def run_demo(method: str | None, keep: Any, out: Path, console: Any) -> list[Outcome]:
    """The demo without arguments: held-out scenes, a photograph, and a video file, with the embedded model."""
    loaded = load_embedded()
    digits, photo, photo_name = _pictures()
    _announce(loaded, method, keep, console)
    outcomes = []
    for number, (scene, asked) in enumerate(digits.heldout_questions(NUM_QUESTIONS * 2, seed=SEED)[::2], 1):
        picture = scene.pil()
        inputs = loaded.inputs(asked.text, [picture])
        outcome = compare(loaded, inputs, asked.text, method, keep, 4, SHORT_PATIENCE)
        outcome.truth = [asked.answer]
        _draw(outcome, loaded, inputs, [picture], out / f"question_{number}.png")
        outcomes.append(outcome)
    console.print(table_of(outcomes, "Pictures it never saw: held-out digits on held-out photographs"))
    console.print(_summary(outcomes))
    question = "is there a 3 ?"
    inputs = loaded.inputs(question, [photo])
    outcome = compare(loaded, inputs, question, method, keep, 4, SHORT_PATIENCE)
    outcome.truth = ["no"]
    _draw(outcome, loaded, inputs, [photo], out / "photograph.png")
    console.print(table_of([outcome], f"A real photograph ({photo_name} of scikit-image)"))
    clip, truth = _clip(out / "video.avi", digits)
    question = "how many digits are there ?"
    moving = frame_by_frame(loaded, clip, question, method, keep, out / "video_frames.png")
    moving.truth = truth
    read = f"{clip.num_frames} frames at {clip.fps:g} a second, {len(clip.frames)} of them read with decord, each asked by itself"
    console.print(table_of([moving], f"A video file: {read}"))
    console.print(_frames_table(clip, moving))
    outcomes += [outcome, moving]
    _finish(outcomes, out, console)
    return outcomes


def run_custom(
    loaded: Loaded,
    *,
    image: Path | None,
    video: Path | None,
    question: str,
    method: str | None,
    keep: Any,
    out: Path,
    console: Any,
    frames: int = 8,
    max_new_tokens: int = 32,
) -> list[Outcome]:
    """The same for the user's model, picture and question."""
    _announce(loaded, method, keep, console)
    outcomes = []
    if image is not None:
        picture = open_image(image)
        inputs = loaded.inputs(question, [picture])
        outcome = compare(loaded, inputs, question, method, keep, max_new_tokens)
        _draw(outcome, loaded, inputs, [picture], out / f"{image.stem}.png")
        console.print(table_of([outcome], f"{image.name}, {picture.width} x {picture.height}"))
        outcomes.append(outcome)
    if video is not None:
        with suppress(ImportError):                                         # the decoder's own chatter about damaged files
            decord = importlib.import_module("decord")
            decord.logging.set_level(decord.logging.QUIET)
        clip = read_video(video, frames)
        where = out / f"{video.stem}_frames.png"
        title = f"{video.name}: {len(clip.frames)} of {clip.num_frames} frames"
        if loaded.embedded:
            console.print("The embedded model was trained on single pictures: each frame is asked by itself.")
            outcome = frame_by_frame(loaded, clip, question, method, keep, where)
            console.print(table_of([outcome], title))
            console.print(_frames_table(clip, outcome))
        else:
            as_video = loaded.takes_video
            if not as_video:
                console.print(f"This model or its processor takes no videos: the {len(clip.frames)} frames are given as {len(clip.frames)} images.")
            inputs = loaded.inputs(question, clip.frames, video=as_video, clip=clip)
            outcome = compare(loaded, inputs, question, method, keep, max_new_tokens)
            _draw(outcome, loaded, inputs, clip.frames, where, captions=clip.captions)
            console.print(table_of([outcome], title))
        outcomes.append(outcome)
    _finish(outcomes, out, console)
    return outcomes


def frame_by_frame(loaded: Loaded, clip: Clip, question: str, method: str | None, keep: Any, picture: Path) -> Outcome:
    """Ask about each frame by itself, all frames in one batch."""
    inputs = loaded.batch(question, clip.frames)
    outcome = compare(loaded, inputs, question, method, keep, 4, SHORT_PATIENCE)
    _draw(outcome, loaded, inputs, clip.frames, picture, captions=clip.captions)
    return outcome


def open_image(path: Path) -> Any:
    """A picture file, or one clear line."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise OptionError(f"there is no picture file {str(path)!r}")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise OptionError(f"cannot read the picture file {str(path)!r}: {error}") from error


def table_of(outcomes: Sequence[Outcome], title: str) -> Any:
    """Questions, answers, tokens, FLOPs, cache bytes and times."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True, pad_edge=False)
    table.add_column("question", overflow="fold", min_width=22, max_width=44)
    for name in ("true", "dense", "pruned"):
        table.add_column(name, overflow="fold", max_width=24)
    for name in ("visual tokens", "prefill FLOPs", "KV cache", "prefill"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        report = outcome.report
        points = "\n".join(f"{record.point}  {record.visual_before} -> {record.visual_kept}" for record in report.points) or "all stay"
        table.add_row(
            outcome.question,
            outcome.truth[0] if len(outcome.truth) == 1 else "known" if outcome.truth else "-",
            _said(outcome.dense, outcome.truth),
            _said(outcome.pruned, outcome.truth),
            points,
            _change(report.flops_dense, report.flops_pruned, ""),
            _change(report.kv_bytes_dense, report.kv_bytes_pruned, "B"),
            f"{outcome.prefill_dense_ms:.4g} -> {outcome.prefill_ms:.4g} ms\nspeed-up {outcome.speedup:.2f}x" if outcome.speedup else "not timed",
        )
    return table


def _said(answers: list[str], truth: list[str]) -> str:
    """One answer, coloured if the truth is known, or how many are right."""
    right = sum(a == b for a, b in zip(answers, truth, strict=True)) if truth else 0
    if len(answers) == 1:
        return f"[{'green' if right else 'red'}]{answers[0]}[/]" if truth else answers[0]
    return f"{right} of {len(answers)} right" if truth else f"{len(answers)} answers"


def _frames_table(clip: Clip, outcome: Outcome) -> Any:
    """One row a frame."""
    from rich.table import Table

    table = Table(pad_edge=False)
    for name in ("frame", "time", "true", "dense", "pruned"):
        table.add_column(name, justify="right")
    for number, caption in enumerate(clip.captions):
        truth = outcome.truth[number] if outcome.truth else "-"
        table.add_row(str(clip.indices[number]), caption, truth, outcome.dense[number], outcome.pruned[number])
    return table


def _pictures() -> tuple[Any, Any, str]:
    """The digit scenes and a photograph, both from installed packages."""
    try:
        import skimage.data
        from PIL import Image

        digits = importlib.import_module("vlprune.evals.digits")
    except ImportError as error:
        raise VlpruneError(f"the demo needs {error.name}, which is not installed: pip install 'vlprune[demo]'") from error
    return digits, Image.fromarray(skimage.data.chelsea()), "the cat Chelsea"


def _clip(path: Path, digits: Any) -> tuple[Clip, list[str]]:
    """Write a video of held-out scenes, half a second each with a slow zoom, and read it back with decord."""
    from PIL import Image

    scenes = [digits.scene("heldout", number, seed=SEED + 1) for number in range(8)]
    frames = []
    for scene in scenes:
        large = scene.pil().resize((256, 256), Image.Resampling.BICUBIC)
        for step in range(4):
            edge = step                                                     # pixels cut from each side
            frames.append(large.crop((edge, edge, 256 - edge, 256 - edge)).resize((256, 256), Image.Resampling.BICUBIC))
    clip = read_video(write_video(path, frames, fps=8), num_frames=len(scenes))
    return clip, [str(len(scenes[index // 4].objects)) for index in clip.indices]


def _draw(outcome: Outcome, loaded: Loaded, inputs: dict[str, Any], pictures: Sequence[Any], path: Path, captions: Sequence[str] | None = None) -> None:
    """Save what stayed; nothing where nothing was pruned."""
    records = [record for record in outcome.report.points if record.tokens == "visual"]
    if not records or any(item.grid is None for item in records[-1].items):
        return
    shown = [loaded.seen(picture, inputs) for picture in pictures]
    single = len(outcome.dense) == 1
    said = f"true: {outcome.truth[0]}   " if single and outcome.truth else ""
    said += f"dense: {outcome.dense[0]}   pruned: {outcome.pruned[0]}" if single else ""
    if len(records[-1].items) > 1:
        many = list(range(len(records[-1].items)))
        draw_kept(shown, records, many, captions=captions, title=f"{outcome.question}   {said}", save=path)
    else:
        alone = len(shown) == 1
        captions = None if alone else captions
        draw_kept(shown[0] if alone else shown, records, captions=captions, title=f"{outcome.question}   {said}", original=alone, save=path)
    outcome.picture = path


def _announce(loaded: Loaded, method: str | None, keep: Any, console: Any) -> None:
    with apply(loaded.model, method, keep) as handle:                   # wrong names, options and models end here, before any work
        stages = ", ".join(stage.point.label for stage in handle.method.stages) or "no point"
        share = f"{handle.keep:.3g}" if isinstance(handle.keep, float) else str(handle.keep)
        size = f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.3g} M parameters, {loaded.model.dtype}, {loaded.model.device}"
        text = f"[bold]{handle.method.name}[/], keep={share}, at {stages}, on {loaded.name} ({handle.adapter.name}, {size})"
    console.print(text, highlight=False)
    for note in loaded.notes:
        console.print(f"[yellow]{note}[/]", highlight=False)


def _summary(outcomes: Sequence[Outcome]) -> str:
    total = len(outcomes)
    dense = sum(outcome.dense == outcome.truth for outcome in outcomes)
    pruned = sum(outcome.pruned == outcome.truth for outcome in outcomes)
    return (
        f"right answers: dense {dense} of {total}, pruned {pruned} of {total}. A demonstration, not a measurement: "
        "python examples/train_tiny_vlm.py --evaluate asks more."
    )


def _finish(outcomes: Sequence[Outcome], out: Path, console: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps([outcome.to_dict() for outcome in outcomes], indent=1) + "\n")
    console.print(
        "FLOPs count matrix products of vision tower, scorer and decoder (see vlprune/flops.py); times are medians of warm runs, "
        "dense and pruned in turn.", style="dim",
    )  # fmt: skip
    drawn = [str(outcome.picture) for outcome in outcomes if outcome.picture]
    none = "No picture: nothing was pruned, or this model does not say where its tokens lie."
    console.print(f"Pictures of what stayed: {', '.join(drawn)}" if drawn else none, highlight=False, soft_wrap=True)


def _change(before: float, after: float, unit: str) -> str:
    if not before:
        return "unknown"
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    factor, prefix = next((scale for scale in scales if before >= scale[0]), scales[-1])
    return f"{before / factor:.3g} -> {after / factor:.3g} {prefix}{unit}\n{after / before:.0%} of dense"


def cover(path: Path) -> Path:
    """The README's picture: one held-out scene under two methods, as the embedded model sees it."""
    digits, _, _ = _pictures()
    loaded, scene = load_embedded(), digits.scene("heldout", 5)
    asked = digits.questions(scene)[1]
    inputs = loaded.inputs(asked.text, [scene.pil()])
    drawn: list[Any] = []
    for method, keep, names in (("hiprune", 64, "HiPrune, before the LLM:"), ("fastv", 64, "FastV, in the LLM:")):
        with apply(loaded.model, method, keep) as handle:
            loaded.answers(inputs, 4)
            report = handle.report()
        first = not drawn
        drawn.append(draw_kept(scene.pil(), report, size=280, original=first, title=f"{names} {keep} of {report.points[0].visual_before} tokens"))
    side_by_side(drawn, gap=0).save(path, optimize=True)
    return path
