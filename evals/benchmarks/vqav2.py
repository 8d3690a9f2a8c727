"""VQAv2, validation: 214,354 questions about 40,504 COCO photographs, with the answers of ten people.

Reference: Goyal et al., CVPR 2017, arXiv:1612.00837. Official page: https://visualqa.org; code: https://github.com/GT-Vision-Lab/VQA.

Layout: ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json``, COCO's ``val2014/COCO_val2014_{image_id, 12 digits}.jpg``.
Prompt: the official models choose without one; LLaVA's and lmms-eval's: the question, on the next line "Answer the question using a single word or phrase."
Metric: VQA accuracy with the official normalisation, see `vlprune.evals.vqa_accuracy`; over all and by the official types of answers.
Differences: only that answers are normalised also where all ten people agree.
"""

from __future__ import annotations

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.picture_files import PictureFiles
from vlprune.evals.rows import check_columns, read_rows
from vlprune.evals.vqa_accuracy import vqa_accuracy

QUESTIONS = ("v2_OpenEnded_mscoco_{split}_questions.json", "Questions/v2_OpenEnded_mscoco_{split}_questions.json")
ANSWERS = ("v2_mscoco_{split}_annotations.json", "Annotations/v2_mscoco_{split}_annotations.json")
AFTER = "Answer the question using a single word or phrase."


def load(source: Source) -> list[Sample]:
    """The questions of a split, in the order of the file."""
    split = source.split or ("validation" if source.folder is None else "val2014")
    rows = read_rows(source, QUESTIONS, columns=("question_id", "image_id", "question"), split=split)
    answers = rows if source.folder is None else read_rows(source, ANSWERS, split=split)
    check_columns(answers, ("question_id", "answers"), "vqav2")
    by_id = {row["question_id"]: row for row in answers}
    files = PictureFiles(source, (split, f"Images/mscoco/{split}", "images", "."))
    samples = []
    for row in rows:
        found = by_id.get(row["question_id"])
        if found is None:
            raise OptionError(f"vqav2: question {row['question_id']} has no answers in the file of annotations")
        said = tuple(one["answer"] for one in found["answers"])
        picture = files.of(row, f"COCO_{split}_{int(row['image_id']):012d}.jpg")
        samples.append(Sample(str(row["question_id"]), f"{row['question']}\n{AFTER}", said, (picture,), kind=found.get("answer_type") or ""))
    files.check(samples)
    return samples


def score(sample: Sample, answer: str) -> float:
    """The share of people that agree, as VQA accuracy counts it."""
    return vqa_accuracy(answer, sample.answers)


BENCHMARK = Benchmark(
    "vqav2",
    "VQAv2, validation",
    "image",
    load,
    score,
    source="Goyal et al., arXiv:1612.00837; files and metric of github.com/GT-Vision-Lab/VQA; prompt as in LLaVA-1.5 and lmms-eval 0.7 tasks/vqav2",
    layout="v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/ of COCO (hub:lmms-lab/VQAv2)",
    metric="VQA accuracy",
)
