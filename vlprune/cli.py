"""The command line: ``vlprune demo``, ``vlprune methods``, ``vlprune inspect``, ``vlprune bench``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def parse_keep(text: str | None) -> Any:
    """``64`` a number of tokens, ``0.25`` a share, ``0.9,0.5,0.1`` a share per stage, other words a schedule's name."""
    if text is None:
        return None
    parts = [_number(part) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
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
    from vlprune.tables import METHOD_COLUMNS, method_rows, methods_markdown

    if markdown:
        typer.echo(methods_markdown())
        return
    table = Table(title="Methods", title_justify="left", title_style="bold", pad_edge=False)
    for name in METHOD_COLUMNS:
        table.add_column(name, overflow="fold")
    for row in method_rows():
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
    keep: Annotated[float, typer.Option(help="Share of visual tokens that stay.")] = 1 / 9,
    shape: Annotated[str, typer.Option(help="A shape of vlprune.bench.SHAPES, such as cpu, tiny or llava-1.5-7b.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Counted runs of each method.", min=1)] = 5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here, with what it was measured on.")] = None,
) -> None:
    """Measure prefill, decode, scorer and cache of the methods against dense and random, in one run."""
    with one_clear_line():
        from vlprune import bench as job

        names = [name.strip() for name in methods.split(",")] if methods else None
        with Console(stderr=True).status("...") as status:
            rows = job.run(names, keep, shape, batch, rounds, device=device, progress=lambda text: status.update(text))
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


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def main() -> None:
    """Entry point of the ``vlprune`` command."""
    app()


if __name__ == "__main__":
    main()
