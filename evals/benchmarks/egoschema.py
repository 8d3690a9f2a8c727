"""EgoSchema, the subset with public answers: 500 questions about three minutes of first-person video each, five choices.

Reference: Mangalam et al., NeurIPS 2023, arXiv:2308.09126. Official repository: https://github.com/egoschema/EgoSchema.

Layout: ``questions.json`` (list of q_uid, question, option 0 to option 4), ``subset_answers.json`` (q_uid to the right number, counted from 0), and
``videos/{q_uid}.mp4``. On the hub: lmms-eval/egoschema, config Subset (video_idx, question, option, answer).
Prompt: the official code compares likelihoods; this is lmms-eval's: the question, ``A. text`` lines, "Answer with the option's letter from the given choices
directly."
Metric: accuracy. Difference: where no letter can be read the answer is wrong (lmms-eval draws one). The 4,531 questions without public answers are left out.
"""

from __future__ import annotations

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_at, without_letters
from vlprune.evals.rows import Row, find_files, read_file, read_rows
from vlprune.evals.video_files import VideoFiles

AFTER = "Answer with the option's letter from the given choices directly."


def load(source: Source) -> list[Sample]:
    """The questions with public answers, in the order of the questions file."""
    videos = VideoFiles(source, ("videos", "good_clips_git", "."))
    samples = []
    for name, question, given, right in _questions(source):
        choices = without_letters(given)
        prompt = asked(question, choices, after=AFTER)
        samples.append(Sample(name, prompt, (letter_at(right, choices, f"egoschema: {name}"),), video=videos.find(name), choices=choices))
    videos.check(samples)
    return samples


def _questions(source: Source) -> list[tuple[str, str, list[str], int]]:
    """Video, question, choices, number of the right one."""
    if source.folder is None:
        rows = read_rows(source, (), columns=("video_idx", "question", "option", "answer"), config="Subset")
        return [(row["video_idx"], row["question"], row["option"], row["answer"]) for row in rows]
    rows = read_rows(source, ("questions.json",), columns=("q_uid", "question", *(f"option {number}" for number in range(5))))
    file = find_files(source.folder, ("subset_answers.json",))[0]
    answers: Row = read_file(file)[0]
    known = [row for row in rows if row["q_uid"] in answers]
    if not known:
        raise OptionError(f"egoschema: not one of the questions has an answer in {str(file)!r}")
    return [(row["q_uid"], row["question"], [row[f"option {number}"] for number in range(5)], answers[row["q_uid"]]) for row in known]


BENCHMARK = Benchmark(
    "egoschema",
    "EgoSchema, subset",
    "video",
    load,
    choice_score,
    source="Mangalam et al., arXiv:2308.09126; files of github.com/egoschema/EgoSchema; prompt as in lmms-eval's egoschema_subset",
    layout="questions.json, subset_answers.json and videos/{q_uid}.mp4 (hub:lmms-eval/egoschema)",
)
