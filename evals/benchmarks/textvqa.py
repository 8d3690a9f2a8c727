"""TextVQA, validation: 5,000 questions about text in 3,166 photographs, with the answers of ten people.

Reference: Singh et al., CVPR 2019, arXiv:1904.08920. Official page: https://textvqa.org.

Layout: ``TextVQA_0.5.1_val.json`` (``data``: question_id, image_id, question, answers) and ``train_images/{image_id}.jpg``, where validation pictures are too.
Prompt: lmms-eval's: the question with only its first letter as a capital, on the next line "Answer the question using a single word or phrase."
Metric: VQA accuracy over the ten answers after EvalAI's normalisation, see `vlprune.evals.vqa_accuracy`.
Differences: LLaVA's own numbers come with the words that an OCR system read in the prompt; lmms-eval leaves them out, and so does this.
"""

from __future__ import annotations

from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import read_rows
from vlprune.evals.vqa_accuracy import normalised_evalai, vqa_accuracy

FILES = ("TextVQA_*_{split}.json", "textvqa/TextVQA_*_{split}.json")
AFTER = "Answer the question using a single word or phrase."


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    split = "validation" if source.folder is None else "val"
    rows = read_rows(source, FILES, columns=("question_id", "image_id", "question", "answers"), split=split)
    files = PictureFiles(source, ("train_images", "images", "."))
    samples = []
    for row in rows:
        prompt = f"{row['question'].capitalize()}\n{AFTER}"
        samples.append(Sample(str(row["question_id"]), prompt, tuple(row["answers"]), (files.of(row, row["image_id"]),)))
    files.check(samples)
    return samples


def score(sample: Sample, answer: str) -> float:
    """The share of people that agree, as VQA accuracy counts it."""
    return vqa_accuracy(answer, sample.answers, normalised_evalai)


BENCHMARK = Benchmark(
    "textvqa",
    "TextVQA, validation",
    "image",
    load,
    score,
    source="Singh et al., arXiv:1904.08920; metric as EvalAI's processor in github.com/facebookresearch/mmf; prompt as in lmms-eval 0.7 tasks/textvqa",
    layout="TextVQA_0.5.1_val.json and train_images/{image_id}.jpg (hub:lmms-lab/textvqa)",
    metric="VQA accuracy",
)
