"""Compare methods on your own clips: a folder of videos, and a CSV file with questions about them.

python examples/compare_on_my_clips.py                            # eight clips, made on the spot, and the embedded video model
python examples/compare_on_my_clips.py --clips FOLDER --questions questions.csv --model MODEL --keep 1/4,1/9 --frames 16

Columns of the CSV file: file, question, answer; and if you like choices, start and end. "file" lies in the folder; "answer" may hold several right
answers with | between; "choices" makes it a multiple-choice question, again with | between, and then the answer is the letter or the text of one of them;
"start" and "end" are seconds. The results folder has results.md, results.json, plots and index.html. The same command goes on where it was stopped.
"""

import argparse
import csv
import hashlib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from vlprune.cli import console
from vlprune.evals import moving_scenes
from vlprune.evals.asking import Frames
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_of
from vlprune.evals.command import names_in, run
from vlprune.evals.evaluate import Request
from vlprune.evals.scoring import LETTERS, normalised_match
from vlprune.evals.worker import ModelSpec, Plan


def read(clips: Path, questions: Path) -> Iterable[Sample]:
    """A sample a row. Its id changes with its text, so that an answer to an older text is never taken for one to this."""
    with questions.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            cell = {name: (row.get(name) or "").strip() for name in ("file", "question", "answer", "choices", "start", "end")}
            if not (cell["file"] and cell["question"] and cell["answer"]):
                sys.exit(f"{questions}, row {number}: file, question and answer are needed, and here they are {row}")
            text, answers, choices = cell["question"], tuple(cell["answer"].split("|")), tuple(filter(None, cell["choices"].split("|")))
            if choices:
                letter = cell["answer"].upper()
                answers = (letter if letter in LETTERS[: len(choices)] else letter_of(cell["answer"], choices, f"{questions}, row {number}"),)
                text = asked(text, choices, after="Answer with the letter of the right choice only.")
            start, end = (float(cell[name]) if cell[name] else None for name in ("start", "end"))
            name = f"{number}-{hashlib.sha1(repr(sorted(cell.items())).encode()).hexdigest()[:8]}"
            kind = "choices" if choices else "open"
            yield Sample(name, text, answers, video=clips / cell["file"], start=start, end=end, choices=choices, kind=kind)


def score(sample: Sample, answer: str) -> float:
    """The right letter, or one of the right answers but for case, articles and punctuation."""
    return choice_score(sample, answer) if sample.choices else normalised_match(answer, sample.answers)


def demonstration(folder: Path, number: int = 8) -> Path:
    """Clips of moving digits with a question each."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "question", "answer"])
        for scene, question in moving_scenes.heldout_questions(number):
            path = moving_scenes.write(scene, folder / f"{scene.index:03d}.avi")
            table.writerow([path.name, question.text, question.answer])
    return folder


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--clips", type=Path, help="folder with your videos")
parser.add_argument("--questions", type=Path, help="CSV file; questions.csv in that folder if not given")
parser.add_argument("--model", default="embedded-video", help="folder or hub id of a vision-language model")
parser.add_argument("--methods", default="vidcom2,fastv", help="names from `vlprune methods`, or all; dense and random always run")
parser.add_argument("--keep", default="1/4", help="shares or numbers of visual tokens, with commas between")
parser.add_argument("--frames", type=int, default=8, help="of a clip, at most")
parser.add_argument("--out", type=Path, default=Path("out/my_clips"), help="results folder")
parser.add_argument("--no-costs", action="store_true", help="do not measure latency and memory")
given = parser.parse_args()

clips = given.clips or demonstration(given.out / "clips")
questions = given.questions or clips / "questions.csv"
if not questions.is_file():
    sys.exit(f"there is no file {questions}: give --questions FILE with the columns file, question, answer")
if given.clips and given.model == "embedded-video":
    print("the embedded video model knows questions about moving digits only: give --model for anything else")

card = Benchmark(
    "my-clips", "My clips", "video", lambda source: read(clips, questions), score, source=f"{questions}; the right letter, or normalised match",
    layout="a CSV file with the columns file, question, answer", max_new_tokens=2 if given.model == "embedded-video" else 32,
)  # fmt: skip
plan = Plan(ModelSpec(given.model), names_in(given.methods, "methods"), names_in(given.keep, "shares"), frames=Frames(given.frames))
request = Request(plan, (card,), {card.name: Source(clips)}, given.out, costs=not given.no_costs, batches=(1,), gallery=3)
run(request, console(), command=shlex.join(["python", *sys.argv]))
