"""The picture question answering benchmarks in their official layouts, a few rows each, for tests.

A layout writes its files below a folder and says what the first sample has to look like, and what the summary is when the answers are `Expected.said`.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Expected:
    """What a layout holds.

    Attributes:
        prompt: of the first sample, letter for letter.
        right, wrong: answers to it.
        kinds: of all samples, in order.
        file: pattern of the annotations, without which loading is an error that names them; empty: there are only pictures.
        said: an answer to each sample.
        scores: of these answers.
        summary: of these answers, computed by hand.
    """

    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    kinds: tuple[str, ...]
    file: str
    said: tuple[str, ...]
    scores: tuple[float, ...]
    summary: Mapping[str, float] = field(default_factory=dict)


PHRASE = "Answer the question using a single word or phrase."
DIRECTLY = "Answer with the option's letter from the given choices directly."


def dump(path: Path, what: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what), encoding="utf-8")


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), colour).save(path)
    return path


def gqa(folder: Path) -> Expected:
    row = {"question": "Is it overcast?", "imageId": "n161313", "answer": "no", "fullAnswer": "No.", "isBalanced": True, "groups": {"global": None},
           "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"}}  # fmt: skip
    query = {"detailed": "relS", "semantic": "rel", "structural": "query"}
    dump(folder / "testdev_balanced_questions.json", {
        "201307251": row, "201640614": row | {"question": "Who is wearing the dress?", "imageId": "n235859", "answer": "woman", "types": query},
        "2": row | {"question": "What is it?", "answer": "t-shirt", "types": query},
        "3": row | {"answer": "left", "types": row["types"] | {"structural": "choose"}},
    })  # fmt: skip
    picture(folder / "images" / "n161313.jpg")
    picture(folder / "images" / "n235859.jpg")
    return Expected(f"Is it overcast?\n{PHRASE}", ("no", "No.", " NO\n"), ("yes", "", "not", "no it is"), ("verify", "query", "query", "choose"),
                    "testdev_balanced_questions.json", ("no", "man", "T-shirt", "right"), (1, 0, 1, 0), {"binary %": 50, "open %": 50})  # fmt: skip


def pope(folder: Path) -> Expected:
    name = "COCO_val2014_000000310196.jpg"
    for kind, labels in (("random", "yes no"), ("popular", "yes no no"), ("adversarial", "yes")):
        lines(folder / f"coco_pope_{kind}.json", [{"question_id": number, "image": name, "text": "Is there a snowboard in the image?", "label": label}
                                                  for number, label in enumerate(labels.split(), 1)])  # fmt: skip
    picture(folder / "val2014" / name)
    # labels y n | y n n | y; heard y n | n y - | y: 2 right yes of 3 heard and 3 there; 3 of 6 answers are right
    said = ("Yes", "No, there is not.", "No", "There is a board. No doubt", "", "yes")
    summary = {"accuracy %": 50, "precision %": 200 / 3, "recall %": 200 / 3, "F1 %": 200 / 3, "yes %": 50, "F1 random %": 100, "F1 popular %": 0,
               "F1 adversarial %": 100}  # fmt: skip
    return Expected(f"Is there a snowboard in the image?\n{PHRASE}", ("yes", "Yes.", "Yes, a snowboard"), ("no", "It is not.", "No, none", "", "."),
                    ("random",) * 2 + ("popular",) * 3 + ("adversarial",), "coco_pope_random.json", said, (1, 1, 0, 0, 0, 1), summary)  # fmt: skip


def mme(folder: Path) -> Expected:
    from vlprune.evals.benchmarks.mme import GROUPS

    tasks = [task for group in GROUPS.values() for task in group]
    for task in tasks:
        inside = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        text = folder / task / "questions_answers_YN" / "0020.txt" if inside else folder / task / "0020.txt"
        text.parent.mkdir(parents=True)
        text.write_text("Is a car there? Please answer yes or no.\tYes\nIs a cat there? Please answer yes or no.\tNo\n")
        picture(folder / task / "images" / "0020.png" if inside else folder / task / "0020.jpg")
    # existence: both right, 200 points; count: one right, 50; code_reasoning: nothing right, 0; the others are answered yes and yes, 50 each
    said = ("Yes.", "no", "yes", "maybe", *("Yes", "yes, there is a cat") * 11, "No", "I do not know")
    scores = (1, 1, 1, 0, *(1, 0) * 11, 0, 0)
    summary = {"perception": 200 + 9 * 50, "cognition": 3 * 50} | {f"{task} points": 50 for task in tasks}
    summary |= {"existence points": 200, "code_reasoning points": 0}
    return Expected("Is a car there? Please answer yes or no.", ("Yes", "yes.", " YES, it is"), ("No", "", "maybe", "There is, yes"),
                    tuple(task for task in tasks for _ in range(2)), "existence/*.txt", said, scores, summary)  # fmt: skip


def mmbench(folder: Path) -> Expected:
    cell = base64.b64encode(picture(folder.with_name(f"{folder.name}-picture") / "a.jpg").read_bytes()).decode()
    row = {"index": 241, "question": "What is the capital?", "hint": "The map shows Wyoming.", "A": "Casper", "B": "Cheyenne", "C": "Laramie", "D": "",
           "answer": "B", "category": "physical_property_reasoning", "image": cell, "source": "scienceqa", "l2-category": "attribute_reasoning",
           "comment": "", "split": "dev"}  # fmt: skip
    moved = {"A": "Laramie", "B": "Casper", "C": "Cheyenne", "answer": "C", "image": "241"}
    again = {"A": "Cheyenne", "B": "Laramie", "C": "Casper", "answer": "A"}
    other = {"index": 252, "hint": "nan", "l2-category": "coarse_perception"}
    alone = {"index": 253, "D": "Cody", "answer": "D"}
    table(folder / "mmbench_dev_en_20231003.tsv", [row, row | {"index": 1000241} | moved, row | {"index": 2000241} | again,
                                                   row | other, row | other | {"index": 1000252} | moved, row | alone])  # fmt: skip
    # first orders B, B and D: 2 of 3 are right; 241 is right in every order, 252 is not, 253 has only one
    said, scores = ("B", "C. Cheyenne", "cheyenne", "B.", "B", "A"), (1, 1, 1, 1, 0, 0)
    prompt = f"The map shows Wyoming. What is the capital? There are several options:\nA. Casper\nB. Cheyenne\nC. Laramie\n{DIRECTLY}"
    kinds = ("attribute_reasoning",) * 3 + ("coarse_perception",) * 2 + ("attribute_reasoning",)
    return Expected(prompt, ("B", "B. Cheyenne", "(B)", "Cheyenne"), ("A", "Laramie", "", "D"), kinds, "mmbench_dev_en*.tsv", said, scores,
                    {"first order %": 200 / 3, "circular %": 50})  # fmt: skip


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def scienceqa(folder: Path) -> Expected:
    row = {"question": "Which state is farthest north?", "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"], "answer": 0, "hint": "",
           "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science", "topic": "geography", "category": "Geography",
           "skill": "Read a map", "lecture": "", "solution": "", "split": "test"}  # fmt: skip
    dump(folder / "problems.json", {
        "1": row | {"split": "train"}, "4": row | {"hint": "Look at the map."}, "5": row,
        "6": row | {"image": None}, "7": row | {"choices": ["yes", "no"], "answer": 1, "grade": "grade8", "subject": "natural science"},
    })  # fmt: skip
    dump(folder / "pid_splits.json", {"train": ["1"], "test": ["4", "5", "6", "7"]})
    for name in ("4", "5", "7"):
        picture(folder / "test" / name / "image.png")
    choices = "A. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma"
    return Expected(f"Context: Look at the map.\nWhich state is farthest north?\n{choices}\n{DIRECTLY}", ("A", "A. West Virginia", "West Virginia"),
                    ("B", "", "Virginia", "E"), ("social science",) * 2 + ("natural science",), "problems.json", ("A", "B", "no"), (1, 0, 1),
                    {"grades 1-6 %": 50, "grades 7-12 %": 100})  # fmt: skip


def textvqa(folder: Path) -> Expected:
    row = {"question": "what is the brand of this CAMERA?", "image_id": "003a8ae2ef43b901", "image_classes": ["Camera"], "question_id": 34602,
           "question_tokens": [], "set_name": "val", "answers": ["nous les gosses", "Dakota", "clos culombu", "dakota digital", "dakota", "dakota", "Dakota's",
                                                                 "dakota", "dakota?", "the dakota"]}  # fmt: skip
    two = row | {"question_id": 34603, "answers": ["2", "two", "3", "4", "5", "6", "7", "8", "9", "0"]}
    dump(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [row, two]})
    picture(folder / "train_images" / "003a8ae2ef43b901.jpg")
    # two people say 2: eight others find 2/3, the two themselves 1/3
    return Expected(f"What is the brand of this camera?\n{PHRASE}", ("dakota", "Dakota.", "The Dakota"), ("nikon", "", "dakota 's camera"), ("", ""),
                    "TextVQA_*.json", ("dakota", "Two"), (1, 0.6))  # fmt: skip


def vqav2(folder: Path) -> Expected:
    rows = [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}, {"image_id": 262148, "question": "Is he?", "question_id": 2},
            {"image_id": 262148, "question": "How many?", "question_id": 3}]  # fmt: skip
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {"year": 2014}, "task_type": "Open-Ended", "data_type": "mscoco",
                                                                 "license": {"url": ""}, "data_subtype": "val2014", "questions": rows})  # fmt: skip
    said = (["down"] * 6 + ["at the table", "skateboard", "Down.", "table"], ["yes"] * 10, ["3"] * 3 + ["2"] * 7)
    notes = [{"question_type": "where is he", "multiple_choice_answer": answers[0], "image_id": 262148, "answer_type": kind, "question_id": row["question_id"],
              "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(answers, 1)]}
             for row, answers, kind in zip(rows, said, ("other", "yes/no", "number"), strict=True)]  # fmt: skip
    dump(folder / "v2_mscoco_val2014_annotations.json", {"info": {"year": 2014}, "license": {"url": ""}, "annotations": notes[::-1]})
    picture(folder / "val2014" / "COCO_val2014_000000262148.jpg")
    # three people say 3: seven others find 1, the three themselves 2/3
    return Expected(f"Where is he looking?\n{PHRASE}", ("down", "Down.", "a down"), ("up", "", "looking down"), ("other", "yes/no", "number"),
                    "v2_OpenEnded*.json", ("down", "Yes", "three"), (1, 1, 0.9))  # fmt: skip


def daquar(folder: Path) -> Expected:
    folder.mkdir(exist_ok=True)
    (folder / "qa.894.raw.test.txt").write_text(
        "what is on the left side of the white oven on the floor and on right side of the blue armchair in the image1 ?\ngarbage_bin\n"
        "what is on the bed in the image2 ?\nbed_sheets, pillow\nhow many chairs are in the image2?\n4\n"
    )
    picture(folder / "nyu_depth_images" / "image1.png")
    picture(folder / "nyu_depth_images" / "image2.png")
    prompt = f"What is on the left side of the white oven on the floor and on right side of the blue armchair in the image? {PHRASE}"
    return Expected(prompt, ("garbage bin", "Garbage_bin", "a garbage bin."), ("bin", "", "garbage", "garbage bin, oven"), ("",) * 3, "qa.894.raw.test.txt",
                    ("garbage_bin", "pillow, bed sheets", "four"), (1, 1, 0), {"exact match %": 100 / 3})  # fmt: skip


def easy_vqa(folder: Path) -> Expected:
    dump(folder / "test" / "questions.json", [["what is the red shape?", "triangle", 0], ["what is the color of the shape?", "red", 0],
                                              ["is there not a black shape in the image?", "yes", 1]])  # fmt: skip
    picture(folder / "test" / "images" / "0.png")
    picture(folder / "test" / "images" / "1.png")
    return Expected("what is the red shape?", ("triangle", "Triangle.", "a red triangle"), ("circle", "", "red", "a triangle or a circle", "triangles"),
                    ("shape", "colour", "yes/no"), "test/questions.json", ("circle", "The triangle is red", "no"), (0, 1, 0))  # fmt: skip


def clothing(folder: Path) -> Expected:
    from vlprune.evals.benchmarks.clothing import CLASSES

    for name in CLASSES:
        for number in range(3 if name == "dress" else 1):
            picture(folder / "test" / name / f"{name}{number}.jpg")
    choices = "A. dress\nB. hat\nC. longsleeve\nD. outwear\nE. pants\nF. shirt\nG. shoes\nH. shorts\nI. skirt\nJ. t-shirt"
    prompt = f"What kind of clothing is in the picture?\n{choices}\n{DIRECTLY}"
    kinds = ("dress",) * 3 + CLASSES[1:]
    # dresses are right once in three times, hats and t-shirts always: (1/3 + 1 + 1) / 10
    said, scores = ("A", "B", "hat", "a hat", *"A" * 7, "It is a t-shirt."), (1, 0, 0, 1, *(0,) * 7, 1)
    return Expected(prompt, ("A", "A. dress", "Dress", "a dress"), ("B", "", "skirt", "K"), kinds, "test/*", said, scores,
                    {"mean of classes %": 700 / 30})  # fmt: skip


LAYOUTS: dict[str, Callable[[Path], Expected]] = {
    "gqa": gqa, "pope": pope, "mme": mme, "mmbench": mmbench, "scienceqa": scienceqa, "textvqa": textvqa, "vqav2": vqav2, "daquar": daquar,
    "easy-vqa": easy_vqa, "clothing": clothing,
}  # fmt: skip
