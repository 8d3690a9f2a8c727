"""The video question answering benchmarks in their official layouts, a few rows each, for tests.

A layout writes its files below a folder and says what the first sample has to look like. ``clip(path)`` puts a video of eight frames there.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Clip = Callable[[Path], None]


@dataclass(frozen=True)
class Expected:
    """What a layout holds.

    Attributes:
        prompt: of the first sample, letter for letter.
        right, wrong: answers to it.
        kinds: of all samples, in order.
        file: annotations, without which loading is an error that names them; empty where there are only videos.
        video: of the first sample.
    """

    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    kinds: tuple[str, ...]
    file: str
    video: str


def dump(path: Path, what: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what), encoding="utf-8")


def table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


# Video-MME

MME_ROWS = [
    {
        "video_id": "001", "duration": length, "domain": domain, "sub_category": "Astronomy", "url": "", "videoID": f"fFjv93ACG{number}",
        "question_id": f"001-{number}", "task_type": "Counting Problem", "question": "How many red socks are above the fireplace?",
        "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."], "answer": "D",
    }
    for number, (length, domain) in enumerate([("short", "Knowledge"), ("medium", "Knowledge"), ("long", "Life Record")])
]  # fmt: skip
MME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
    "option.\nHow many red socks are above the fireplace?\nA. 1.\nB. 4.\nC. 2.\nD. 3.\nThe best answer is:"
)


def video_mme(folder: Path, clip: Clip) -> Expected:
    import pyarrow
    from pyarrow import parquet

    (folder / "videomme").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(MME_ROWS), folder / "videomme" / "test-00000-of-00001.parquet")
    clip(folder / "data" / "fFjv93ACG0.mp4")
    clip(folder / "data" / "fFjv93ACG1.mkv")
    (folder / "subtitle").mkdir()
    (folder / "subtitle" / "fFjv93ACG0.srt").write_text(
        '1\n00:00:00,000 --> 00:00:00,400\n<font color="white" size=".72c">Four red socks</font>\n\n2\n00:00:00,500 --> 00:00:00,510\nbetween two frames\n\n'
        "3\n00:00:00,800 --> 00:00:02,000\nhang there\n"
    )
    right, wrong = ("D", "D. 3.", "(D)", "The best answer is: D."), ("B", "", "I cannot say")
    return Expected(MME_PROMPT, right, wrong, ("short", "medium", "long"), "videomme/test*.parquet", "data/fFjv93ACG0.mp4")


# MVBench


def mvbench(folder: Path, clip: Clip) -> Expected:
    from vlprune.evals.benchmarks.mvbench import TASKS

    for task, (places, cut) in TASKS.items():
        row = {"video": f"{task}.mp4", "question": "What happened after the person took the food?",
               "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup.", "Took the box."], "answer": "Ate the medicine."}  # fmt: skip
        bounds = {"start": 0.5, "end": 0.9} if cut else {}
        if task == "episodic_reasoning":
            row["video"], bounds = "friends_s01", {"start": 1.0, "end": 2.0}
            frames(folder / "video" / places[0] / "friends_s01", 12)
        else:
            clip(folder / "video" / places[0] / row["video"])
        dump(folder / "json" / f"{task}.json", [row | bounds])
    prompt = (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, and the action and pose of "
        "persons. Based on your observations, select the best option that accurately addresses the question.\nQuestion: What happened after the person took "
        "the food?\nOptions:\n(A) Ate the medicine.\n(B) Tidied up the blanket.\n(C) Put down the cup.\n(D) Took the box.\nOnly give the best option."
    )
    return Expected(prompt, ("A", "(A) Ate the medicine.", "Ate the medicine."), ("(B)", "Took the box.", ""), tuple(TASKS), "json/action_sequence.json",
                    "video/star/Charades_v1_480/action_sequence.mp4")  # fmt: skip


def frames(folder: Path, count: int) -> None:
    """Frames that are 20, 40, 60 ... bright."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (16, 16), (20 * number,) * 3).save(folder / f"{number + 1:05d}.jpg", quality=95)


# multiple choice with lists of their own

DIRECTLY = "Answer with the option's letter from the given choices directly."


def next_qa(folder: Path, clip: Clip) -> Expected:
    row = {"video": 4010069381, "frame_count": 369, "width": 640, "height": 480, "question": "how do the two man play the instrument", "answer": 4, "qid": 6,
           "type": "CH", "a0": "roll the handle", "a1": "tap their feet", "a2": "strum the string", "a3": "hit with sticks", "a4": "pat with hand"}  # fmt: skip
    table(folder / "test.csv", [row, row | {"qid": 7, "type": "TP", "video": 3238737531}, row | {"qid": 8, "type": "DL"}])
    dump(folder / "map_vid_vidorID.json", {"4010069381": "1000/4010069381", "3238737531": "1164/3238737531"})
    clip(folder / "NExTVideo" / "4010069381.mp4")
    clip(folder / "NExTVideo" / "1164" / "3238737531.mp4")
    choices = "A. roll the handle\nB. tap their feet\nC. strum the string\nD. hit with sticks\nE. pat with hand"
    prompt = f"how do the two man play the instrument\n{choices}\n{DIRECTLY}"
    return Expected(prompt, ("E", "E. pat with hand", "pat with hand"), ("A", "tap", ""), ("CH", "TN", "DL"), "test.csv", "NExTVideo/4010069381.mp4")


def egoschema(folder: Path, clip: Clip) -> Expected:
    rows = [{"q_uid": name, "google_drive_id": "x", "question": "What does C do?", **{f"option {number}": f"C does {number}." for number in range(5)}}
            for name in ("0074f737", "hidden", "00b9a0de")]  # fmt: skip
    dump(folder / "questions.json", rows)
    dump(folder / "subset_answers.json", {"0074f737": 3, "00b9a0de": 0})
    clip(folder / "videos" / "0074f737.mp4")
    prompt = f"What does C do?\nA. C does 0.\nB. C does 1.\nC. C does 2.\nD. C does 3.\nE. C does 4.\n{DIRECTLY}"
    return Expected(prompt, ("D", "D. C does 3.", "C does 3."), ("A", "B.", ""), ("", ""), "questions.json", "videos/0074f737.mp4")


def longvideobench(folder: Path, clip: Clip) -> Expected:
    row = {"id": "86CxyhFV9MI_0", "video_id": "86CxyhFV9MI", "video_path": "86CxyhFV9MI.mp4", "question": "What changed when he said it?",
           "candidates": ["His hat", "His tie", "Nothing"], "correct_choice": 1, "duration_group": 15, "question_category": "T2A", "duration": 1.0,
           "subtitle_path": "86CxyhFV9MI_en.json", "starting_timestamp_for_subtitles": 100.0}  # fmt: skip
    dump(folder / "lvb_val.json", [row, row | {"id": "2", "duration_group": 3600, "subtitle_path": "other_en.json"}])
    clip(folder / "videos" / "86CxyhFV9MI.mp4")
    dump(folder / "subtitles" / "86CxyhFV9MI_en.json", [{"timestamp": [100.0, 100.4], "text": "first"}, {"timestamp": [100.8, None], "text": "last"}])
    dump(folder / "subtitles" / "other_en.json", [{"start": "00:01:40.000", "end": "00:01:41.200", "line": "all along"}])
    prompt = f"Question: What changed when he said it?\nA. His hat\nB. His tie\nC. Nothing\n{DIRECTLY}"
    return Expected(prompt, ("B", "B. His tie"), ("C", "E", ""), ("15 s", "3600 s"), "lvb_val.json", "videos/86CxyhFV9MI.mp4")


def mlvu(folder: Path, clip: Clip) -> Expected:
    from vlprune.evals.benchmarks.mlvu import TASKS

    for number, task in enumerate(TASKS, 1):
        row = {"video": f"{task}_1.mp4", "duration": 480.0, "question": "What colour is the hat?", "candidates": ["Red", "Blue", "Green", "White"],
               "answer": "Green", "question_type": task}  # fmt: skip
        dump(folder / "json" / f"{number}_{task}.json", [row])
        clip(folder / "video" / f"{number}_{task}" / row["video"])
    prompt = (
        "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option that accurately addresses the "
        "question.\nQuestion: What colour is the hat?\nOptions:\n(A) Red\n(B) Blue\n(C) Green\n(D) White\nOnly give the best option."
    )
    return Expected(prompt, ("C", "C) Green", "(C)"), ("(A)", "Blue", ""), TASKS, "json/1_plotQA.json", "video/1_plotQA/plotQA_1.mp4")


# open answers

PHRASE = "Answer the question using a single word or phrase."


def activitynet_qa(folder: Path, clip: Clip) -> Expected:
    dump(folder / "test_q.json", [{"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": f"v_1QIUV7WYKXg_{number}"}
                                  for number in (3, 4)])  # fmt: skip
    dump(folder / "test_a.json", [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}, {"answer": "2", "type": 7, "question_id": "v_1QIUV7WYKXg_4"}])
    clip(folder / "videos" / "v_1QIUV7WYKXg.mp4")
    return Expected(f"Is the athlete wearing trousers? {PHRASE}", ("yes", "Yes."), ("no", "", "yes and no"), ("yes/no", "number"), "test_q.json",
                    "videos/v_1QIUV7WYKXg.mp4")  # fmt: skip


def msvd_qa(folder: Path, clip: Clip) -> Expected:
    dump(folder / "test_qa.json", [{"answer": "someone", "id": 37750, "question": "who is chopping up a pepper?", "video_id": 1301},
                                   {"answer": "pepper", "id": 37751, "question": "what is a man slicing?", "video_id": 1302}])  # fmt: skip
    (folder / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\n8yS2wqwActs_2_14 vid1302\n")
    clip(folder / "video" / "vid1301.avi")
    clip(folder / "video" / "8yS2wqwActs_2_14.avi")
    return Expected(f"Who is chopping up a pepper? {PHRASE}", ("someone", "Someone"), ("a man", ""), ("who", "what"), "test_qa.json", "video/vid1301.avi")


def msrvtt_qa(folder: Path, clip: Clip) -> Expected:
    dump(folder / "test_qa.json", [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?", "video_id": 7010},
                                   {"answer": "three", "category_id": 14, "id": 158582, "question": "do they sing?", "video_id": 7010}])  # fmt: skip
    clip(folder / "video" / "video7010.mp4")
    return Expected(f"What are three people sitting on? {PHRASE}", ("couch", "a couch", "The couch."), ("chair", ""), ("what", "other"), "test_qa.json",
                    "video/video7010.mp4")  # fmt: skip


def tgif_qa(folder: Path, clip: Clip) -> Expected:
    row = {"gif_name": "tumblr_no73q2fm0I1uuf348o1_250", "question": "what is being placed in the white ice cream cone ?", "answer": "cookie", "type": 0,
           "vid_id": "FRAMEQA1159", "key": 27138, "description": "a chocolate cookie , placed ."}  # fmt: skip
    table(folder / "Test_frameqa_question.csv", [row, row | {"type": 3, "answer": "machine", "gif_name": "tumblr_2"}], "\t")
    gif(folder / "gifs" / "tumblr_no73q2fm0I1uuf348o1_250.gif")
    return Expected(f"What is being placed in the white ice cream cone? {PHRASE}", ("cookie", "a cookie"), ("chocolate", ""), ("object", "location"),
                    "Test_frameqa_question.csv", "gifs/tumblr_no73q2fm0I1uuf348o1_250.gif")  # fmt: skip


def gif(path: Path) -> None:
    """An animated GIF of eight frames."""
    from PIL import Image

    path.parent.mkdir(parents=True)
    pictures = [Image.new("RGB", (32, 32), (30 * number, 0, 200)) for number in range(8)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)


# ours


def sign_language(folder: Path, clip: Clip) -> Expected:
    for word in ("again", "bird", "book", "eat", "help", "no", "thank_you", "yes"):
        clip(folder / "intel_asl" / f"{word}.mkv")
    (folder / "intel_asl" / "LICENSE").write_text("CC-BY-4.0")
    prompt = f"Which word is signed in the video?\nA. again\nB. book\nC. help\nD. thank you\n{DIRECTLY}"
    return Expected(prompt, ("A", "again", "A. again"), ("B", "bird", ""), ("",) * 8, "", "intel_asl/again.mkv")


LAYOUTS: dict[str, Callable[[Path, Clip], Expected]] = {
    "video-mme": video_mme, "video-mme-subtitles": video_mme, "mvbench": mvbench, "next-qa": next_qa, "egoschema": egoschema, "longvideobench": longvideobench,
    "longvideobench-subtitles": longvideobench, "mlvu": mlvu, "activitynet-qa": activitynet_qa, "msvd-qa": msvd_qa, "msrvtt-qa": msrvtt_qa, "tgif-qa": tgif_qa,
    "sign-language": sign_language,
}  # fmt: skip
