"""MVBench: twenty tasks of 200 multiple-choice questions each about short videos that a single frame does not answer.

Reference: Li et al., CVPR 2024, arXiv:2311.17005. Official code: https://github.com/OpenGVLab/Ask-Anything/blob/main/video_chat2/mvbench.ipynb.

Layout: ``json/{task}.json`` (lists of video, question, candidates, answer, and for five tasks start and end in seconds), videos in ``video/`` as its archives
unpack (``star/Charades_v1_480``, ``clevrer/video_validation`` ...); episodic reasoning has folders of frames at 3 a second, ``tvqa/frames_fps3_hq``.
Prompt: the official instruction, ``Question:``, ``Options:``, one choice a line as ``(A) text``, ``Only give the best option.``
Metric: accuracy, over all and by task.
Differences: the official code begins the answer with ``Best option:(``, for which chat templates leave no room. It puts the instruction into the system
message and into the prompt; here it is in the prompt. Times of frame folders begin with the first frame (official: with the one before it).
"""

from __future__ import annotations

from vlprune.errors import OptionError
from vlprune.evals.benchmark import Benchmark, Sample, Source
from vlprune.evals.choices import asked, choice_score, letter_of
from vlprune.evals.rows import read_rows
from vlprune.evals.video_files import VideoFiles

BEFORE = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of objects, and the action and pose of "
    "persons. Based on your observations, select the best option that accurately addresses the question."
)
AFTER = "Only give the best option."
FRAME_RATE = 3.0
#: Where the videos of each task lie, and whether it has cuts; the second place is the one of the cut copies that the hub offers since 2024.
TASKS: dict[str, tuple[tuple[str, ...], bool]] = {
    "action_sequence": (("star/Charades_v1_480", "star/Charades_segment"), True),
    "action_prediction": (("star/Charades_v1_480", "star/Charades_segment"), True),
    "action_antonym": (("ssv2_video", "ssv2_video_mp4"), False),
    "fine_grained_action": (("Moments_in_Time_Raw/videos",), False),
    "unexpected_action": (("FunQA_test/test",), False),
    "object_existence": (("clevrer/video_validation",), False),
    "object_interaction": (("star/Charades_v1_480", "star/Charades_segment"), True),
    "object_shuffle": (("perception/videos",), False),
    "moving_direction": (("clevrer/video_validation",), False),
    "action_localization": (("sta/sta_video", "sta/sta_video_segment"), True),
    "scene_transition": (("scene_qa/video",), False),
    "action_count": (("perception/videos",), False),
    "moving_count": (("clevrer/video_validation",), False),
    "moving_attribute": (("clevrer/video_validation",), False),
    "state_change": (("perception/videos",), False),
    "fine_grained_pose": (("nturgbd", "nturgbd_convert"), False),
    "character_order": (("perception/videos",), False),
    "egocentric_navigation": (("vlnqa",), False),
    "episodic_reasoning": (("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"), True),
    "counterfactual_inference": (("clevrer/video_validation",), False),
}


def load(source: Source) -> list[Sample]:
    """The questions of all tasks, one task after the other. Every task's file has to be there; videos may be missing, as those with a licence of their own."""
    samples, missing = [], []
    for task, (places, cut) in TASKS.items():
        rows = read_rows(source, (f"json/{task}.json", f"{task}.json"), columns=("video", "question", "candidates", "answer"), split="train", config=task)
        videos = VideoFiles(source, tuple(f"{root}{place}" for place in places for root in ("video/", "", "video/data0613/", "data0613/")))
        part = []
        for number, row in enumerate(rows):
            choices = tuple(row["candidates"])
            prompt = asked(f"Question: {row['question']}\nOptions:", choices, before=BEFORE, after=AFTER, form="({letter}) {choice}")
            file = videos.find(row["video"])
            start = end = None
            if cut and "_segment" not in str(file.parent):
                start, end = row.get("start"), row.get("end")
                if start is None or end is None:
                    raise OptionError(f"mvbench: question {number} of {task} has no start and end, which the videos of this task need")
            right = letter_of(row["answer"], choices, f"mvbench: question {number} of {task}")
            part.append(Sample(f"{task}-{number}", prompt, (right,), video=file, start=start, end=end, choices=choices, kind=task, rate=FRAME_RATE))
        samples += part
        try:
            videos.check(part)
        except OptionError as error:
            missing.append(error)
    if len(missing) == len(TASKS):
        raise missing[0]
    return samples


BENCHMARK = Benchmark(
    "mvbench",
    "MVBench",
    "video",
    load,
    choice_score,
    source="Li et al., arXiv:2311.17005; prompt, cuts and folders of github.com/OpenGVLab/Ask-Anything video_chat2/mvbench.ipynb; cut copies as in lmms-eval",
    layout="json/{task}.json of the twenty tasks and the videos as its archives unpack, in video/ or beside (hub:OpenGVLab/MVBench)",
)
