"""Real runs of lmms-eval on tiny models and task files that these tests write: its plain ids against vlprune's. `make test-lmms` installs it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from tests import torchvision_stub
from vlprune.loading import load_embedded

ROOT = Path(__file__).parents[1]
SCENES, CLIPS = 16, 12
FULL, THIRD = 256, 85                                   # visual tokens of a picture of the embedded model, and of a clip; a third of them

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms_eval is not installed; make test-lmms installs it"),
]

TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.visual
doc_to_text: !function {name}.text
doc_to_target: answer
process_results: !function {name}.score
generation_kwargs: {{max_new_tokens: 4, do_sample: false}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
lmms_eval_specific_kwargs:
  default: {{before: "asked under an id that the task does not know "}}
  llava_hf: {{before: ""}}
  qwen2_5_vl: {{before: ""}}
  huggingface: {{before: ""}}
"""
FUNCTIONS = """
def visual(doc):
    return [{visual}]


def text(doc, lmms_eval_specific_kwargs):
    return lmms_eval_specific_kwargs["before"] + doc["question"]


def score(doc, results):
    return {{"acc": float(results[0].strip() == doc["answer"])}}
"""
TEMPLATE = (
    "{% for message in messages %}USER: {% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass
class Run:
    """What one evaluation left.

    Attributes:
        samples: by document: what was asked, what was answered.
        results: lmms-eval's own.
        tokens: what vlprune reported, if it was asked to.
    """

    samples: dict[int, tuple[str, str]]
    results: dict[str, Any]
    tokens: dict[str, Any]

    @property
    def answers(self) -> list[str]:
        return [self.samples[number][1] for number in sorted(self.samples)]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], visual: str) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    if "image" in rows[0]:
        data = data.cast_column("image", datasets.Image())
    folder.mkdir(exist_ok=True)
    data.to_parquet(folder / f"{name}.parquet")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / f"{name}.parquet"))
    (folder / f"{name}.py").write_text(FUNCTIONS.format(visual=visual))


def lmms(folder: Path, *arguments: str) -> str:
    """Run the command line of lmms-eval; returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.torchvision_stub", "lmms_eval", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def evaluate(folder: Path, runs: dict[str, tuple[str, str, str]]) -> tuple[dict[str, Run], str]:
    """Several evaluations in one process.

    Args:
        folder: where the task folder is and everything goes.
        runs: by name: task, model id, model arguments. Names that begin with "simple" ask for the classes for plain texts.
    """
    common = {"include_path": str(folder / "task"), "batch_size": 1, "device": "cpu", "log_samples": True, "verbosity": "INFO"}
    entries = []
    for name, (task, model, arguments) in runs.items():
        report = f",report={folder / name / 'tokens.json'}" if model.startswith("vlprune") else ""
        entries.append({"model": model, "model_args": arguments + report, "tasks": task, "output_path": str(folder / name), **common})
        entries[-1]["force_simple"] = name.startswith("simple")
    (folder / "runs.yaml").write_text(json.dumps(entries))               # JSON is YAML
    printed = lmms(folder, "--config", str(folder / "runs.yaml"))
    return {name: read(folder / name) for name in runs}, printed


def read(folder: Path) -> Run:
    """Empty where the evaluation failed."""
    tokens = json.loads((folder / "tokens.json").read_text()) if (folder / "tokens.json").exists() else {}
    found = list(folder.glob("*/*_results.json"))
    if not found:
        return Run({}, {}, tokens)
    lines = [json.loads(line) for line in next(folder.glob("*/*_samples_*.jsonl")).read_text().splitlines()]
    return Run({line["doc_id"]: (line["input"], line["filtered_resps"]) for line in lines}, json.loads(found[0].read_text()), tokens)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model, saved with a chat template, and questions about digit scenes."""
    pytest.importorskip("sklearn")
    reason = torchvision_stub.why_not("timm")
    if reason is not None:
        pytest.skip(reason)
    from vlprune.evals import digits

    folder = tmp_path_factory.mktemp("llava")
    loaded = load_embedded()
    loaded.processor.chat_template = TEMPLATE
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    rows = []
    for scene, question in digits.heldout_questions(SCENES):
        buffer = io.BytesIO()
        scene.pil().save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "question": question.text, "answer": question.answer})
    write_task(folder / "task", "digits_here", rows, 'doc["image"].convert("RGB")')
    return folder


@pytest.fixture(scope="module")
def pictures(llava: Path) -> tuple[dict[str, Run], str]:
    """All runs about pictures."""
    plain = f"pretrained={llava / 'model'},device_map=cpu"
    task = "digits_here"
    return evaluate(
        llava,
        {
            "plain": (task, "llava_hf", plain),
            "dense": (task, "vlprune_llava_hf", f"{plain},method=hiprune,keep=1"),
            "third": (task, "vlprune_llava_hf", f"{plain},method=hiprune,keep=1/3"),
            "hf_dense": (task, "vlprune_hf", f"{plain},dtype=float32,keep=1"),
            "hf_two": (task, "vlprune_hf", f"{plain},dtype=float32,method=hiprune+transprune,keep=1/3,hiprune.alpha=0.2"),
            "simple_plain": (task, "llava_hf", plain),
            "simple_dense": (task, "vlprune_llava_hf", f"{plain},keep=1"),
            "simple_third": (task, "vlprune_llava_hf", f"{plain},method=evit,keep=1/3"),
            "wrong": (task, "vlprune_llava_hf", f"{plain},method=hiprune,keep=1/3,alhpa=0.2"),
        },
    )


def test_dense_is_the_plain_class(pictures: tuple[dict[str, Run], str]) -> None:
    """The same questions, the same answers, the same score."""
    runs = pictures[0]
    assert len(runs["plain"].samples) == SCENES
    assert runs["dense"].samples == runs["plain"].samples
    assert runs["simple_dense"].samples == runs["simple_plain"].samples
    assert runs["simple_dense"].tokens["wraps"] == "lmms_eval.models.simple.llava_hf.LlavaHf"
    assert len({answer for answer in runs["plain"].answers if len(answer) > 1}) > 1                      # words, not single letters
    assert runs["dense"].results["results"]["digits_here"]["acc,none"] == runs["plain"].results["results"]["digits_here"]["acc,none"]
    assert runs["hf_dense"].answers == runs["plain"].answers
    if load_embedded().trained:
        assert runs["plain"].results["results"]["digits_here"]["acc,none"] > 0.8


def test_token_counts(pictures: tuple[dict[str, Run], str]) -> None:
    """In vlprune's report, in lmms-eval's results and on the screen."""
    runs, printed = pictures
    for name, kept in (("dense", FULL), ("hf_dense", FULL), ("third", THIRD), ("simple_third", THIRD), ("hf_two", THIRD)):
        tokens = runs[name].tokens
        assert tokens["samples"] == tokens["samples_with_visual_tokens"] == SCENES
        assert tokens["failed_calls"] == 0
        assert tokens["visual_tokens"]["prompt"] == {"mean": FULL, "min": FULL, "max": FULL}
        assert tokens["visual_tokens"]["kept"] == {"mean": kept, "min": kept, "max": kept}
        assert runs[name].results["throughput"]["avg_visual_tokens_kept"] == kept
        assert runs[name].results["throughput"]["avg_visual_tokens_prompt"] == FULL
    assert runs["third"].tokens["points"] == [{"point": "before_llm", "method": "hiprune", "before": FULL, "kept": THIRD}]
    assert runs["third"].tokens["wraps"] == "lmms_eval.models.chat.llava_hf.LlavaHf"
    assert runs["hf_two"].tokens["asked"]["options"] == {"hiprune": {"alpha": 0.2}}
    assert len(runs["hf_two"].tokens["points"]) == 4                     # one of hiprune, three of transprune
    assert "hiprune keep=0.3333: visual tokens a sample: 256.0 in the prompt, 85.0 kept (33.2%), 16 samples" in printed


@torch.no_grad()
def test_pruned_answers_are_those_of_apply(llava: Path, pictures: tuple[dict[str, Run], str]) -> None:
    from vlprune.evals import digits

    loaded = load_embedded()
    expected = []
    with vlprune.apply(loaded.model, "hiprune", keep=1 / 3):
        for scene, question in digits.heldout_questions(SCENES):
            text = f"USER: <image> {question.text} ASSISTANT:"
            inputs = loaded.processor(images=scene.pil(), text=text, return_tensors="pt")
            made = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            expected += [answer.strip() for answer in loaded.processor.batch_decode(made, skip_special_tokens=True)]
    assert [answer.strip() for answer in pictures[0]["third"].answers] == expected


def test_a_wrong_argument_is_said_and_nothing_is_evaluated(pictures: tuple[dict[str, Run], str]) -> None:
    runs, printed = pictures
    assert not runs["wrong"].results
    assert "unknown argument of vlprune_llava_hf 'alhpa'. Did you mean 'alpha'?" in printed


@torch.no_grad()
def test_dense_logits_are_bit_equal(llava: Path) -> None:
    """The two classes side by side in this process."""
    from lmms_eval.models import get_model

    arguments = {"pretrained": str(llava / "model"), "device": "cpu", "device_map": "cpu"}
    plain, dense = get_model("llava_hf")(**arguments), get_model("vlprune_llava_hf")(**arguments, method="hiprune", keep=1)
    pruned = get_model("vlprune_llava_hf")(**arguments, method="hiprune", keep="1/3")
    inputs = load_embedded().inputs("how many ?", [torch.zeros(128, 128, 3, dtype=torch.uint8).numpy()])
    one, two, three = (lm.model(**inputs).logits[:, -1] for lm in (plain, dense, pruned))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert dense.counts.kept == [FULL]
    assert pruned.counts.kept == [THIRD]
    assert get_model("vlprune_llava_hf", force_simple=True).is_simple


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded video model, and questions about files with moving digits."""
    pytest.importorskip("sklearn")
    pytest.importorskip("av")
    reason = torchvision_stub.why_not("timm")
    if reason is not None:
        pytest.skip(reason)
    from vlprune.embedded_video import ASSETS, load_embedded_video
    from vlprune.evals import moving_scenes

    if not (ASSETS / "model.safetensors").exists():
        pytest.skip("the embedded video model is not there")
    folder = tmp_path_factory.mktemp("qwen")
    loaded = load_embedded_video()
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    rows = []
    for number, (scene, question) in enumerate(moving_scenes.heldout_questions(CLIPS)):
        moving_scenes.write(scene, folder / f"{number}.mp4")
        rows.append({"video": str(folder / f"{number}.mp4"), "question": question.text, "answer": question.answer})
    write_task(folder / "task", "clips_here", rows, 'doc["video"]')
    return folder


@pytest.fixture(scope="module")
def videos(qwen: Path) -> tuple[dict[str, Run], str]:
    """All runs about videos. A frame has 128 x 128 pixels, whatever lmms-eval's class would like."""
    plain = f"pretrained={qwen / 'model'},device_map=cpu,max_num_frames=8"
    sized = f"{plain},min_pixels=16384,max_pixels=16384"
    task = "clips_here"
    return evaluate(
        qwen,
        {
            "plain": (task, "qwen2_5_vl", sized),
            "dense": (task, "vlprune_qwen2_5_vl", f"{sized},keep=1"),
            "third": (task, "vlprune_qwen2_5_vl", f"{sized},method=evs,keep=1/3"),
            "hf_dense": (task, "vlprune_hf", f"{plain},keep=1"),
            "hf_third": (task, "vlprune_hf", f"{plain},method=evs,keep=1/3"),
        },
    )


def test_videos(videos: tuple[dict[str, Run], str]) -> None:
    """Dense as the plain class; a third of the tokens of a video at a third."""
    runs = videos[0]
    assert len(runs["plain"].samples) == CLIPS
    assert runs["dense"].samples == runs["plain"].samples
    for name in ("plain", "hf_dense"):                                   # the model reads the clips, in both ways
        assert runs[name].results["results"]["clips_here"]["acc,none"] > 0.7
    for name, share in (("dense", 1), ("hf_dense", 1), ("third", 1 / 3), ("hf_third", 1 / 3)):
        tokens = runs[name].tokens["visual_tokens"]
        assert tokens["prompt"]["mean"] == FULL
        assert tokens["kept"]["mean"] == round(FULL * share)
        assert runs[name].results["throughput"]["avg_visual_tokens_kept"] == round(FULL * share)


def test_the_command_in_the_documentation(llava: Path) -> None:
    """As people type it, answers in batches."""
    report = llava / "command" / "tokens.json"
    arguments = f"pretrained={llava / 'model'},device_map=cpu,dtype=float32,method=visionzip,keep=64,report={report}"
    printed = lmms(
        llava, "--model", "vlprune_hf", "--model_args", arguments, "--tasks", "digits_here", "--include_path", str(llava / "task"), "--batch_size", "4",
        "--device", "cpu", "--limit", "8", "--output_path", str(llava / "command"), "--log_samples",
    )  # fmt: skip
    assert json.loads(report.read_text())["visual_tokens"]["kept"] == {"mean": 64, "min": 64, "max": 64}
    assert json.loads(report.read_text())["samples"] == 8
    assert "vlprune: visionzip keep=64: visual tokens a sample: 256.0 in the prompt, 64.0 kept (25.0%), 8 samples" in printed
    assert "avg_visual_tokens_kept" in printed
