"""The commands: what they print and save, and one clear line with exit code 2 for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import vlprune
from vlprune import demo, loading
from vlprune.cli import app, parse_keep
from vlprune.video import write_video


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def mistake(*arguments: object) -> str:
    """The one line that a wrong call prints."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights and its processor in a folder, as from the hub."""
    folder = tmp_path_factory.mktemp("llava")
    loaded = loading._stand_in()
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL with random weights, an image processor, a tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    folder = tmp_path_factory.mktemp("qwen")
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = {word: number for number, word in enumerate([*special, "user", "assistant", "what", "is", "this", "?", *(f"w{number}" for number in range(20))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", additional_special_tokens=[special[1], *special[4:]]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant"
    )
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    text = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=6, video_token_id=7, vision_start_token_id=4, vision_end_token_id=5)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    noise = np.random.default_rng(1).integers(0, 255, (6, 64, 96, 3), dtype=np.uint8)
    return write_video(tmp_path / "clip.avi", list(noise), fps=4)


def test_methods_lists_every_card() -> None:
    """Names, points and papers; the Markdown is the README's table."""
    result = run("methods")
    assert result.exit_code == 0
    for name in vlprune.list_methods():
        assert name in result.stdout
    markdown = run("methods", "--markdown").stdout
    assert markdown.count("\n") >= len(vlprune.list_methods()) + 2
    assert "[arXiv:2508.00553](https://arxiv.org/abs/2508.00553)" in markdown


def test_inspect(llava: Path, qwen: Path) -> None:
    """Points, signals, counts; nothing is loaded."""
    result = run("inspect", llava)
    assert result.exit_code == 0, result.output
    wanted = ["family llava", "11 in the vision tower", "10 in the decoder", "before_llm", "llm:1 ... llm:9", "column_mean", "visual tokens of a picture: 256"]
    for part in wanted:
        assert part in result.stdout
    result = run("inspect", qwen)
    assert result.exit_code == 0, result.output
    assert "family qwen_vl" in result.stdout
    assert "see the whole picture: 1, 3" in result.stdout
    assert "at 640x480" in result.stdout


def test_inspect_needs_no_weights(llava: Path, tmp_path: Path) -> None:
    """A configuration alone will do, and 7 B parameters fit in no memory at all."""
    config: dict[str, Any] = json.loads((llava / "config.json").read_text())
    config["text_config"].update(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    config["text_config"]["vocab_size"] = 32064
    config["text_config"].pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert "llm:31" in result.stdout
    assert "6,7" in result.stdout or "6,6" in result.stdout or "6,5" in result.stdout


@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_demo_with_a_model_and_a_picture(model: str, photo: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Both answers, the counts, the picture, the JSON."""
    out = tmp_path / "out"
    result = run(
        "demo", "--model", request.getfixturevalue(model), "--image", photo, "--question", "what is this ?", "--method", "hiprune", "--keep", "0.25",
        "--out", out, "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    outcome = json.loads((out / "demo.json").read_text())[0]
    point = outcome["report"]["points"][0]
    assert f"before_llm  {point['visual_before']} -> {point['visual_kept']}" in result.stdout
    assert point["visual_kept"] == round(point["visual_before"] * 0.25)
    assert outcome["report"]["kv_bytes_pruned"] < outcome["report"]["kv_bytes_dense"]
    assert outcome["prefill_ms"] > 0
    assert (out / "photo.png").exists()


def test_demo_with_a_model_and_a_video(qwen: Path, clip: Path, tmp_path: Path) -> None:
    """Without a video processor the frames are several images, and that is said."""
    out = tmp_path / "out"
    result = run(
        "demo", "--model", qwen, "--video", clip, "--frames", 3, "--question", "what ?", "--method", "fastv", "--keep", "0.5", "--out", out,
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "3 frames are given as 3 images" in result.stdout
    assert "llm:2" in result.stdout
    assert (out / "clip_frames.png").exists()


def test_demo_of_the_embedded_model(tmp_path: Path) -> None:
    """Six held-out questions, a photograph, a video frame by frame; without the trained weights it says so."""
    result = run("demo", "--out", tmp_path, "--method", "hiprune", "--keep", 64)
    assert result.exit_code == 0, result.output
    assert ("RANDOM WEIGHTS" in result.stdout) == (not (loading.ASSETS / "model.safetensors").exists())
    assert "before_llm  256 -> 64" in result.stdout
    assert "right answers: dense" in result.stdout
    assert "3.75 s" in result.stdout
    outcomes = json.loads((tmp_path / "demo.json").read_text())
    assert len(outcomes) == 8
    assert all(Path(outcome["picture"]).exists() for outcome in outcomes)
    assert (tmp_path / "video.avi").exists()


def test_demo_of_the_embedded_model_on_ones_own_picture_and_video(photo: Path, clip: Path, tmp_path: Path) -> None:
    """The default method; frames by themselves."""
    result = run("demo", "--image", photo, "--video", clip, "--frames", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "each frame is asked by itself" in result.stdout
    assert "before_llm  512 -> 170" in result.stdout


def test_dense_draws_nothing(photo: Path, tmp_path: Path) -> None:
    """It has no point; that is not an error."""
    result = run("demo", "--image", photo, "--method", "dense", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "all stay" in result.stdout
    assert "No picture" in result.stdout


def test_mistakes_of_the_demo(llava: Path, photo: Path, clip: Path, tmp_path: Path) -> None:
    """Each says what was given and what would do."""
    assert "Did you mean 'hiprune'" in mistake("demo", "--method", "hiprun")
    assert "no picture file" in mistake("demo", "--image", tmp_path / "none.png")
    assert "no video file" in mistake("demo", "--video", tmp_path / "none.mp4")
    (tmp_path / "bad.png").write_text("no picture")
    assert "cannot read the picture file" in mistake("demo", "--image", tmp_path / "bad.png", "--out", tmp_path)
    (tmp_path / "bad.mp4").write_text("no video")
    assert "cannot read the video file" in mistake("demo", "--video", tmp_path / "bad.mp4", "--out", tmp_path)
    assert "--image FILE or --video FILE" in mistake("demo", "--question", "what ?")
    assert "give a picture with --image FILE" in mistake("demo", "--model", llava)
    assert "Give at most 256" in mistake("demo", "--image", photo, "--keep", 300, "--out", tmp_path)
    assert "a share must lie in (0, 1]" in mistake("demo", "--image", photo, "--keep", 1.5, "--out", tmp_path)
    assert "at least one token" in mistake("demo", "--image", photo, "--keep", 0, "--out", tmp_path)
    assert "one of auto, float32" in mistake("demo", "--model", llava, "--image", photo, "--dtype", "int3")
    assert "device='nothing'" in mistake("demo", "--model", llava, "--image", photo, "--device", "nothing")


def test_a_video_method_on_a_picture_is_refused(photo: Path, tmp_path: Path) -> None:
    """Not carried out as if it had nothing to drop."""
    assert "works on videos only" in mistake("demo", "--image", photo, "--method", "evs", "--out", tmp_path)


def test_mistakes_about_models(photo: Path, tmp_path: Path) -> None:
    """Not there, not a model, not one that sees."""
    from transformers import BertConfig, LlamaConfig

    assert "no model folder" in mistake("demo", "--model", tmp_path / "none", "--image", photo)
    assert "no model" in mistake("inspect", "nobody/nothing")
    assert "no model" in mistake("inspect", tmp_path)
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64).save_pretrained(tmp_path / "llama")
    assert "'llama' model; the demo needs one that answers questions about pictures" in mistake("demo", "--model", tmp_path / "llama", "--image", photo)
    told = run("inspect", tmp_path / "llama")
    assert told.exit_code == 0
    assert "what is reduced is text" in told.output
    BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64).save_pretrained(tmp_path / "bert")
    assert "no adapter for BertModel" in mistake("inspect", tmp_path / "bert")


def test_bench(tmp_path: Path) -> None:
    """A table, JSON rows with the agreed keys, a Markdown file; a wrong shape is told."""
    result = run("bench", "--shape", "tiny", "--rounds", 1, "--methods", "hiprune", "--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "random", "hiprune"]
    assert {"method", "keep", "point", "prefill_ms_dense", "prefill_ms", "speedup", "flops_ratio", "efficiency", "scorer_ms", "scorer_share"} <= set(rows[0])
    assert "Measured on" in (tmp_path / "b.md").read_text()
    assert "unknown shape" in mistake("bench", "--shape", "huge")


def test_keep_as_written() -> None:
    """Numbers, shares, one a stage, names of schedules."""
    assert parse_keep(None) is None
    assert parse_keep("64") == 64
    assert isinstance(parse_keep("1.0"), float)
    assert parse_keep("0.9,0.5") == [0.9, 0.5]
    assert parse_keep("low") == "low"
