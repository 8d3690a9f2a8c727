"""The command line: ``vlprune demo``, ``methods``, ``inspect``, ``bench``, ``draw``, ``tune``, ``calibrate`` and ``eval``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlprune.errors import OptionError, VlpruneError

app = typer.Typer(help="Prune the visual tokens of vision-language models.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def console() -> Console:
    """A console that is wide enough for tables when nobody looks at it live."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=150)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Turn the library's errors into one line and exit code 2."""
    try:
        yield
    except VlpruneError as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


@contextmanager
def told() -> Iterator[Callable[[str], None]]:
    """What tells what a long measurement is at: a line that changes on a terminal, in a log one line each with the seconds so far."""
    errors, start = Console(stderr=True), time.monotonic()
    if not errors.is_terminal:
        yield lambda text: typer.echo(f"{time.monotonic() - start:7.1f} s  {text}", err=True)
        return
    with errors.status("...") as status:
        yield status.update


def parse_keep(text: str | None) -> Any:
    """``64`` a number of tokens, ``0.25`` or ``1/4`` a share, ``0.9,0.5,0.1`` a share per stage, other words a schedule's name."""
    if text is None:
        return None
    parts = [_number(part) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def _number(text: str) -> int | float | str:
    for kind in (int, float, Fraction):
        try:
            number = kind(text)
        except (ValueError, ZeroDivisionError):
            continue
        return float(number) if isinstance(number, Fraction) else number
    return text.strip()


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a vision-language model. Without it the embedded model is used.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to ask about.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video file to ask about.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    method: Annotated[str | None, typer.Option(help="A name from `vlprune methods`. Without it the default of the model family.")] = None,
    keep: Annotated[str | None, typer.Option(help="A share such as 0.25, or a number of visual tokens such as 64.")] = None,
    frames: Annotated[int, typer.Option(help="How many frames of a video are read.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/demo"),
) -> None:
    """Answer questions dense and pruned, side by side, and draw which visual tokens stayed."""
    with one_clear_line():
        from vlprune import demo as job
        from vlprune.loading import load_embedded, load_model
        from vlprune.registry import get_method

        value = parse_keep(keep)
        if method is not None:
            get_method(method)                                           # a wrong name is told before a model is loaded
        if model is None and image is None and video is None:
            if question is not None:
                raise OptionError("a question needs a picture: give --image FILE or --video FILE")
            job.run_demo(method, value, out, console())
            return
        if image is None and video is None:
            raise OptionError("give a picture with --image FILE or a video with --video FILE")
        for path, kind in ((image, "picture"), (video, "video")):
            if path is not None and not path.is_file():
                raise OptionError(f"there is no {kind} file {str(path)!r}")
        loaded = load_embedded() if model is None else load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        text = question or ("how many digits are there ?" if loaded.embedded else "What is shown here?")
        job.run_custom(
            loaded, image=image, video=video, question=text, method=method, keep=value, out=out, console=console(), frames=frames,
            max_new_tokens=4 if loaded.embedded else max_new_tokens,
        )  # fmt: skip


@app.command()
def methods(markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, for the README.")] = False) -> None:
    """List the methods: what they keep, where they act, what they need."""
    from vlprune.tables import METHOD_COLUMNS, PROMPT_COLUMNS, method_rows, methods_markdown, prompt_rows, prompts_markdown

    if markdown:
        typer.echo(f"{methods_markdown()}\n\n{prompts_markdown()}")
        return
    for title, columns, rows in (("Methods", METHOD_COLUMNS, method_rows()), ("Methods for prompts (vlprune.prompts)", PROMPT_COLUMNS, prompt_rows())):
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        for name in columns:
            table.add_column(name, overflow="fold", no_wrap=name in ("name", "paper"))
        for row in rows:
            table.add_row(*row)
        console().print(table)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
) -> None:
    """Show a model's pruning points, the signals at each, and its visual token counts. No weights are loaded."""
    with one_clear_line():
        from vlprune.tables import inspect_model

        for part in inspect_model(model, trust_remote_code):
            console().print(part, highlight=False)


@app.command()
def bench(
    methods: Annotated[str | None, typer.Option(help="Names with commas between; all if not given. dense and random always run.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of tokens that stay; if not given 1/9, with --text each method's default.")] = None,
    shape: Annotated[str, typer.Option(help="A shape of vlprune.bench.SHAPES, such as cpu, tiny or llava-1.5-7b.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Counted runs of each method.", min=1)] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, with what it was measured on.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Measure the parts instead: choosing, the greedy kernel, column-mean attention.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Measure the methods for text on a text-only decoder, at long prompts.")] = False,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts of --text, with commas between.")] = "4096,16384",
    steps: Annotated[int, typer.Option(help="Tokens decoded after each prompt of --text; schedules by step begin to act later.", min=1)] = 16,
) -> None:
    """Measure prefill, decode, scorer and cache of the methods against dense and random, in one run."""
    with one_clear_line():
        from vlprune import bench as job

        names = [name.strip() for name in methods.split(",")] if methods else None
        if parts and text:
            raise OptionError("--parts and --text are two measurements: give one of them")
        if parts:
            _bench_parts(names, 1 / 9 if keep is None else keep, shape, rounds, device, json, markdown)
            return
        if text:
            _bench_text(names, keep, shape, lengths, batch, rounds, steps, device, json, markdown)
            return
        keep = 1 / 9 if keep is None else keep
        with told() as tell:
            rows = job.run(names, keep, shape, batch, rounds, device=device, progress=tell)
        table = Table(title=" ".join(f"{k}={v}" for k, v in job.environment(shape, batch, device).items()), title_justify="left", pad_edge=False)
        head, _, *lines = job.markdown(rows).strip().splitlines()
        for number, name in enumerate(_cells(head)):
            table.add_column(name, justify="right" if number > 1 else "left")
        for line in lines:
            table.add_row(*_cells(line))
        console().print(table)
        if json is not None:
            job.write_json(rows, json)
        if markdown is not None:
            facts = "\n".join(f"- {key}: {value}" for key, value in job.environment(shape, batch, device).items())
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(f"{job.markdown(rows)}\nMeasured on:\n\n{facts}\n")


@app.command()
def draw(
    methods: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    keep: Annotated[str, typer.Option(help="A share such as 2/9, or a number of visual tokens.")] = "2/9",
    image: Annotated[Path | None, typer.Option(help="A picture. Without a file a scene of digits is drawn.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video file, frames as columns.")] = None,
    clip: Annotated[bool, typer.Option("--clip", help="A clip of moving digits instead of a file.")] = False,
    question: Annotated[str | None, typer.Option(help="Read by the methods that look at the text.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a vision-language model. Without it the embedded model is used.")] = None,
    frames: Annotated[int, typer.Option(help="How many frames of a video are read.", min=1)] = 6,
    size: Annotated[int | None, typer.Option(help="Longer side of each picture in pixels.", min=32)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
    out: Annotated[Path, typer.Option(help="The sheet.")] = Path("out/sheet.png"),
) -> None:
    """Draw what each method keeps of the same picture, or of the frames of a clip, on one sheet."""
    with one_clear_line():
        from vlprune import contact_sheet as job
        from vlprune.loading import load_model
        from vlprune.registry import get_method, list_methods

        names = list_methods("visual") if methods == "all" else [name.strip() for name in methods.split(",")]
        for name in names:
            get_method(name)                                             # a wrong name is told before a model is loaded
        subject = job.subject(image, video, clip, frames)
        loaded = job.embedded(subject) if model is None else load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        asked = question or (subject.question if loaded.embedded else "What is shown here?")
        with Console(stderr=True).status("...") as status:
            sheet = job.draw_sheet(loaded, subject, names, parse_keep(keep), asked, size=size, save=out, progress=lambda text: status.update(text))
        console().print(f"{len(sheet.entries)} methods on {subject.name}: {out}", highlight=False, markup=False, soft_wrap=True)
        for name, why in sheet.left_out.items():
            console().print(f"  not {name}: {why}", highlight=False, markup=False, soft_wrap=True, style="dim")


@app.command()
def tune(
    method: Annotated[str, typer.Option(help="A method with numbers to search.")] = "vflowopt",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model. Without it an embedded one is used.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures or videos, or a .jsonl file with image (or images, video) and question; texts for methods that reduce text."),
    ] = None,
    question: Annotated[str, typer.Option(help="Asked about samples that come without one.")] = "What is shown here?",
    most: Annotated[int, typer.Option(help="How many of the samples are used, evenly spread.", min=1)] = 30,
    keep: Annotated[str | None, typer.Option(help="The average share that stays, such as 1/3. The method's default if not given.")] = None,
    trials: Annotated[int, typer.Option(help="How many, the default not counted.", min=1)] = 60,
    objective: Annotated[str, typer.Option(help="cosine of the last hidden states, or kl of the next word; against the unpruned model.")] = "cosine",
    out: Annotated[Path, typer.Option(help="The plan. Its trials are kept beside it, and go on where they were stopped.")] = Path("plan.json"),
    seed: Annotated[int, typer.Option(help="Of the search.", min=0)] = 0,
    frames: Annotated[int, typer.Option(help="How many frames of a video are read.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, of the method, the same in all trials, such as router=FILE; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of each text that are used.", min=2)] = 2048,
    continuation: Annotated[int, typer.Option(help="How many of them, at its end, are given one by one behind the prompt.", min=1)] = 16,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
) -> None:
    """Search a method's numbers on samples of yours, and write a plan for apply(model, plan=FILE)."""
    with one_clear_line():
        from vlprune import tune as job
        from vlprune.skipping.calibrate import parse_options

        card, options = job.searchable(method), parse_options(option or [])  # mistakes are told before a model is loaded
        texts = card.tokens != "visual"
        given = (model, samples, most, dtype, device, trust_remote_code)
        loaded, inputs, about = _tuning_texts(*given, length) if texts else _tuning_pictures(*given, question, frames)
        for note in loaded.notes:
            console().print(note, highlight=False, markup=False, style="yellow")
        try:
            plan = job.tune(
                loaded.model, inputs, card, parse_keep(keep), trials=trials, objective=objective, out=out, seed=seed, about=about,
                continuation=continuation if texts else 0, options=options,
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        says = f"{objective} over {len(inputs)} samples: default {plan.found['default']:.5f}, best of {plan.found['trials']} {plan.found['score']:.5f}"
        says += f" ({plan.found['refused']} had no value)" if plan.found["refused"] else ""
        how = f"vlprune.apply(model, plan={str(out)!r})   # keep={plan.keep!r}, {dict(plan.options)!r}"
        console().print(f"{card.name} on {loaded.name}: {says}\n{how}", highlight=False, soft_wrap=True, markup=False)


def _tuning_pictures(
    model: str | None, samples: Path | None, most: int, dtype: str, device: str, trust_remote_code: bool, question: str, frames: int
) -> tuple[Any, list[Any], str]:
    """Model, its inputs, and where they come from; pictures or videos with questions."""
    from vlprune.loading import load_embedded, load_model
    from vlprune.samples import digit_samples, read_samples

    if samples is None and model is not None:
        raise OptionError("give --samples: a folder of pictures, or a .jsonl file with pictures and questions")
    found = digit_samples(most) if samples is None else read_samples(samples, question, most)
    about = "digit scenes, split train" if samples is None else str(samples)
    loaded = load_embedded() if model is None else load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return loaded, [sample.inputs(loaded, frames) for sample in found], about


def _tuning_texts(
    model: str | None, samples: Path | None, most: int, dtype: str, device: str, trust_remote_code: bool, length: int
) -> tuple[Any, list[Any], str]:
    """The same with texts. Without a model the embedded decoder for recall, and its texts: those of ``length`` tokens with six questions."""
    from vlprune.skipping.embedded_texts import load_embedded_text, recall_texts
    from vlprune.skipping.texts import check_source, load_text_model, read_texts

    if model is None:
        if samples is not None:
            raise OptionError("texts need the model that they are for: give --model, or leave out --samples")
        return load_embedded_text(), recall_texts("train", most, length=length), "recall texts, split train"
    source = check_source(samples)
    loaded = load_text_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return loaded, read_texts(source, loaded, most=most, length=length), str(source)


@app.command()
def calibrate(
    method: Annotated[str, typer.Option(help="A method that is set by measurements on the model, such as spts, ffn_skip or fasa.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of a language model, or of a vision-language one.")],
    samples: Annotated[Path | None, typer.Option(help='A .jsonl file with {"text": ...} or {"input_ids": [...]} a line, or a plain text file.')] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; out/calibrate/METHOD if not given.")] = None,
    most: Annotated[int, typer.Option(help="How many of the texts are used, evenly spread.", min=1)] = 200,
    length: Annotated[int, typer.Option(help="Tokens of each text that are used.", min=2)] = 2048,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, of the calibration, such as rank=192; may be repeated.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Start anew instead of going on from what is in the folder.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
) -> None:
    """Measure on texts of yours what a method wants to know of a model. Goes on where it was stopped."""
    with one_clear_line():
        from vlprune.skipping import calibrate as job
        from vlprune.skipping.progress import bar
        from vlprune.skipping.texts import check_source, load_text_model, read_texts

        job.calibration_of(method)                                       # mistakes are told before a model is loaded
        options = job.parse_options(option or [])
        source = check_source(samples)
        target = Path("out/calibrate") / method if out is None else out
        loaded = load_text_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for note in loaded.notes:
            console().print(note, highlight=False, markup=False, style="yellow")
        inputs = read_texts(source, loaded, most=most, length=length)
        try:
            with bar(method) as tell:
                path = job.calibrate(method, loaded.model, inputs, target, progress=tell, resume=not anew, **options)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        named = job.option_of(method)
        how = f"vlprune.apply(model, {method!r}, {named or '...'}={str(path)!r})"
        console().print(f"{method} on {loaded.name}, {len(inputs)} texts: {path}\n{how}", highlight=False, soft_wrap=True, markup=False)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model; or embedded, or embedded-video.")] = "embedded",
    benchmarks: Annotated[str, typer.Option(help="Names with commas between; --list shows them.")] = "digits",
    methods: Annotated[str, typer.Option(help="Names with commas between, or all. dense and random always run, and first.")] = "all",
    keep: Annotated[str, typer.Option(help="Shares or numbers of visual tokens, with commas between.")] = "1/3,2/9,1/9",
    frames: Annotated[int, typer.Option(help="Frames of a video, at most.", min=1)] = 8,
    sampling: Annotated[str, typer.Option(help="Which frames: uniform, fps or keyframes.")] = "uniform",
    fps: Annotated[float | None, typer.Option(help="Frames a second, for --sampling fps.")] = None,
    resize: Annotated[int | None, typer.Option(help="Longest side of a frame in pixels.", min=16)] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, NAME=hub:ID, or a folder with a folder for each benchmark.")] = None,
    split: Annotated[str | None, typer.Option(help="Another split than the official one.")] = None,
    out: Annotated[Path, typer.Option(help="The results folder. The same command goes on where it was stopped.")] = Path("out/eval"),
    limit: Annotated[int | None, typer.Option(help="Samples of each benchmark at most; such results do not compare with full ones.", min=1)] = None,
    draws: Annotated[int, typer.Option(help="Runs of random with different seeds.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of samples that are made.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Samples asked at a time.", min=1)] = 1,
    option: Annotated[list[str] | None, typer.Option(help="METHOD.KEY=VALUE, an option of a method.")] = None,
    costs: Annotated[bool, typer.Option(help="Measure latency, throughput and memory, too.")] = True,
    batches: Annotated[str, typer.Option(help="Batch sizes of the throughput; 1 is always among them.")] = "1,8,32",
    gallery: Annotated[int, typer.Option(help="Samples of each benchmark shown on the page with what stayed.", min=0)] = 3,
    judge: Annotated[str | None, typer.Option(help="MODULE:FUNCTION of yours for open answers: (sample, answer) to the share that is right.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Ask samples again that failed.")] = False,
    ray: Annotated[str | None, typer.Option(help="Spread the samples over a Ray cluster: local, auto, or an address.")] = None,
    workers: Annotated[int | None, typer.Option(help="Models in the cluster; one for each GPU, else two, if not given.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the benchmarks and what they need.")] = False,
) -> None:
    """Evaluate methods on benchmarks against dense and random: tables, plots and a page. Goes on where it was stopped."""
    with one_clear_line():
        from vlprune.evals import command as job

        if show:
            table = Table(title="Benchmarks", title_justify="left", title_style="bold", pad_edge=False)
            for name in ("name", "input", "needs", "source"):
                table.add_column(name, overflow="fold", no_wrap=name == "name")
            for row in job.rows_of_benchmarks():
                table.add_row(*row)
            console().print(table)
            return
        request = job.request_from(
            model=model, benchmarks=benchmarks, methods=methods, keep=keep, frames=frames, sampling=sampling, fps=fps, resize=resize, data=data or [],
            split=split, out=out, limit=limit, draws=draws, seed=seed, batch=batch, option=option or [], costs=costs, batches=batches, retry=retry,
            dtype=dtype, device=device, trust_remote_code=trust_remote_code, gallery=gallery, judge=judge,
        )  # fmt: skip
        engine = None
        if ray is not None:
            from vlprune.evals.ray_engine import RayEngine

            engine = RayEngine(request.plan, ray, workers)
        try:
            job.run(request, console(), engine)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        finally:
            if engine is not None:
                engine.close()


def _bench_parts(names: list[str] | None, keep: float, shape: str, rounds: int, device: str | None, json: Path | None, markdown: Path | None) -> None:
    from vlprune import bench, bench_parts

    with told() as tell:
        found = bench_parts.run(names, keep, shape, rounds, device, progress=tell)
    facts = {**bench.environment(shape, 1, device), "keep": f"{keep:.4g}", "rounds": rounds}
    for title, head, rows in bench_parts.tables(found):
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 or name in bench_parts.WORDS else "right")
        for cells in rows:
            table.add_row(*cells)
        console().print(table)
    for name, why in found.left_out.items():
        console().print(f"left out: {name}: {why}", highlight=False, markup=False)
    if json is not None:
        bench_parts.write_json(found, facts, json)
    if markdown is not None:
        bench_parts.write_markdown(found, facts, markdown)


def _bench_text(
    names: list[str] | None, keep: float | None, shape: str, lengths: str, batch: int, rounds: int, steps: int, device: str | None, json: Path | None,
    markdown: Path | None,
) -> None:  # fmt: skip
    from vlprune import bench, bench_text

    words = [part.strip() for part in lengths.split(",")]
    if not all(word.isdigit() for word in words):
        raise OptionError(f"--lengths {lengths!r}: whole numbers with commas between, such as 4096,16384")
    sizes = [int(word) for word in words]
    with told() as tell:
        rows, left_out = bench_text.run(names, keep, shape, sizes, batch, rounds, steps, device=device, progress=tell)
    environment = bench.environment(shape, batch, device)
    of_pictures = ("tower", "tower_width", "tower_heads", "visual", "text")
    share = "each method's default" if keep is None else f"{keep:.4g}"
    facts = {**{key: value for key, value in environment.items() if key not in of_pictures}, "keep": share, "rounds": rounds, "decoded": steps}
    for size in sizes:
        head, _, *lines = bench_text.table([row for row in rows if row.length == size])
        table = Table(title=f"{size:,} tokens", title_justify="left", title_style="bold", pad_edge=False)
        for number, name in enumerate(_cells(head)):
            table.add_column(name, justify="right" if number > 1 else "left")
        for line in lines:
            table.add_row(*_cells(line))
        console().print(table)
    for name, why in left_out.items():
        console().print(f"left out: {name}: {why}", highlight=False, markup=False)
    if json is not None:
        bench_text.write_json(rows, left_out, facts, json)
    if markdown is not None:
        listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(f"{bench_text.markdown(rows, left_out)}\nMeasured on:\n\n{listed}\n")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def main() -> None:
    """Entry point of the ``vlprune`` command."""
    app()


if __name__ == "__main__":
    main()
