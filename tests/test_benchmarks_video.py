"""The video question answering benchmarks: their official layouts are read, their prompts are exact, right is right and wrong is wrong."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("decord")
pytest.importorskip("av")
pytest.importorskip("datasets")

import vlprune
from tests.video_layouts import LAYOUTS, MME_PROMPT, frames
from vlprune.errors import OptionError
from vlprune.evals.asking import Frames, inputs_for, open_sample
from vlprune.evals.benchmark import Source, get_benchmark, list_benchmarks, load_samples
from vlprune.evals.hub_files import hub_folders
from vlprune.video import write_video

VIDEO = [name for name in list_benchmarks() if get_benchmark(name).modality == "video" and not get_benchmark(name).embedded]
ANNOTATED = [name for name in VIDEO if name != "sign-language"]
needs_video_model = pytest.mark.skipif(
    not (Path(vlprune.__file__).parent / "assets" / "tiny_video_vlm" / "model.safetensors").exists(), reason="the embedded video model is not there"
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts a video of eight frames, one an eighth of a second, somewhere."""
    pictures = [np.full((32, 32, 3), 30 * number, dtype=np.uint8) for number in range(8)]
    made = write_video(tmp_path_factory.mktemp("clip") / "clip.avi", pictures, fps=8)

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, path)

    return put


def test_every_video_benchmark_has_a_layout() -> None:
    """A new benchmark is tested like the others."""
    assert set(VIDEO) == set(LAYOUTS)
    for name in VIDEO:
        card = get_benchmark(name)
        assert card.layout
        assert "arXiv:" in card.source or "ACM" in card.source or name == "sign-language"


@pytest.mark.parametrize("name", VIDEO)
def test_official_layout(name: str, tmp_path: Path, clip: Any) -> None:
    """Rows, prompt letter for letter, groups, scores, and the video opens."""
    card, expected = get_benchmark(name), LAYOUTS[name](tmp_path, clip)
    samples = load_samples(card, Source(tmp_path))
    first = samples[0]
    assert first.question == expected.prompt
    assert tuple(sample.kind for sample in samples) == expected.kinds
    assert first.video == tmp_path / expected.video
    assert all(card.score(first, answer) == 1 for answer in expected.right)
    assert all(card.score(first, answer) == 0 for answer in expected.wrong)
    there = [sample for sample in samples if isinstance(sample.video, Path) and sample.video.exists()]
    assert there[0] is first
    for sample in there:
        opened = open_sample(sample, Frames(8))
        part = 8 if sample.start is None else 3 if opened.clip is not None and opened.clip.path.is_dir() else 4      # 1 to 2 s of three a second, 0.5 to 0.9 s
        assert len(opened.pictures) == part
    assert [sample.id for sample in load_samples(card, Source(tmp_path))] == [sample.id for sample in samples]


@pytest.mark.parametrize("name", ANNOTATED)
def test_missing_files_are_named(name: str, tmp_path: Path, clip: Any) -> None:
    """No annotations, no videos, and another split than there is: each an error that says what was looked for."""
    card, expected = get_benchmark(name), LAYOUTS[name](tmp_path / "whole", clip)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=expected.file.split("/")[-1].partition("*")[0]):
        load_samples(card, Source(tmp_path / "empty"))
    with pytest.raises(OptionError):
        load_samples(card, Source(tmp_path / "whole", split="nothing"))
    for path in list((tmp_path / "whole").rglob("*")):
        if path.suffix in (".mp4", ".avi", ".mkv", ".gif", ".jpg"):
            path.unlink()
    for folder in (tmp_path / "whole").rglob("friends_s01"):
        folder.rmdir()
    with pytest.raises(OptionError, match=r"not one of \d+ videos is there, such as '.*'\. Looked in .*\.mp4"):
        load_samples(card, Source(tmp_path / "whole"))


@pytest.mark.parametrize("name", ANNOTATED)
def test_a_missing_column_is_named(name: str, tmp_path: Path, clip: Any) -> None:
    """A file that is not what it should be says which column it lacks, or that it cannot be read."""
    expected = LAYOUTS[name](tmp_path, clip)
    file = next(tmp_path.glob(expected.file))
    if file.suffix == ".parquet":
        file.write_bytes(b"PAR1 not")
        words = "cannot read"
    elif file.suffix == ".csv":
        file.write_text("nothing\n1\n")
        words = "has no"
    else:
        file.write_text('[{"nothing": 1}]')
        words = "has no"
    with pytest.raises(OptionError, match=words):
        load_samples(get_benchmark(name), Source(tmp_path))


def test_words_of_sign_language(tmp_path: Path, clip: Any) -> None:
    """Four words share their choices, each is right once; the folder itself will do; without clips it says where it looked."""
    card = get_benchmark("sign-language")
    LAYOUTS["sign-language"](tmp_path, clip)
    samples = load_samples(card, Source(tmp_path / "intel_asl"))
    assert samples == load_samples(card, Source(tmp_path))
    assert [sample.answers[0] for sample in samples] == list("ABCDABCD")
    for sample in samples:
        word = sample.id.replace("_", " ")
        assert len(set(sample.choices)) == 4
        assert sample.choices[ord(sample.answers[0]) - ord("A")] == word
    for path in sorted((tmp_path / "intel_asl").glob("*.mkv"))[2:]:
        path.unlink()
    assert [sample.choices for sample in load_samples(card, Source(tmp_path))] == [("again", "bird")] * 2
    (tmp_path / "intel_asl" / "bird.mkv").unlink()
    with pytest.raises(OptionError, match=r"no two clips.*intel_asl'.*\.mkv"):
        load_samples(card, Source(tmp_path))
    with pytest.raises(OptionError, match="not split"):
        load_samples(card, Source(tmp_path, split="test"))
    with pytest.raises(OptionError, match="hub:ID"):
        load_samples(card, Source())


def test_one_missing_video_is_its_own_failure(tmp_path: Path, clip: Any) -> None:
    """The others count; the failure names the file."""
    LAYOUTS["video-mme"](tmp_path, clip)
    samples = load_samples(get_benchmark("video-mme"), Source(tmp_path))
    assert len(open_sample(samples[1], Frames(2)).pictures) == 2          # an .mkv
    with pytest.raises(OptionError, match=r"fFjv93ACG2\.mp4"):
        open_sample(samples[2], Frames(2))


def test_subtitles_at_the_frames(tmp_path: Path, clip: Any) -> None:
    """Video-MME wants those that are on screen at a frame that was read, and the plain prompt where there is none."""
    LAYOUTS["video-mme-subtitles"](tmp_path, clip)
    first, second, _ = load_samples(get_benchmark("video-mme-subtitles"), Source(tmp_path))
    for count, lines in ((8, "Four red socks\nhang there\n"), (1, "")):     # the only frame is the one at 0.5 s
        opened = open_sample(first, Frames(count))
        assert first.words is not None
        assert opened.clip is not None
        shown = "between two frames\n" if count == 1 else lines.replace("socks\n", "socks\nbetween two frames\n")
        assert first.words(opened.clip) == [f"This video's subtitles are listed below:\n{shown}{MME_PROMPT}"]
    opened = open_sample(second, Frames(2))
    assert second.words is not None
    assert opened.clip is not None
    assert second.words(opened.clip) == [MME_PROMPT]


def test_subtitles_between_the_frames(tmp_path: Path, clip: Any) -> None:
    """As in LongVideoBench's code: behind the last frame before the middle of the text."""
    expected = LAYOUTS["longvideobench-subtitles"](tmp_path, clip)
    first, second = load_samples(get_benchmark("longvideobench-subtitles"), Source(tmp_path))
    opened = open_sample(first, Frames(8))                                # at 0, 1/8 ... 7/8 s; the texts' middles are 0.2 s and 0.9 s
    assert opened.clip is not None
    assert first.words is not None
    assert second.words is not None
    assert first.words(opened.clip) == [0, 1, "first", 2, 3, 4, 5, 6, 7, "last", expected.prompt]
    assert second.words(opened.clip) == open_sample(second, Frames(8)).parts == [0, 1, 2, 3, 4, "all along", 5, 6, 7, expected.prompt]
    (tmp_path / "subtitles" / "other_en.json").unlink()
    with pytest.raises(OptionError, match=r"other_en\.json"):
        open_sample(second, Frames(8))
    assert first.words(replace(opened.clip, times=[0.1, 0.6], frames=opened.clip.frames[:2])) == [0, "first", 1, "last", expected.prompt]
    assert first.words(replace(opened.clip, times=[0.1, 3.0], frames=opened.clip.frames[:2])) == [0, "first", 1, expected.prompt]


def test_frames_with_subtitles_between_reach_a_picture_model(tmp_path: Path, clip: Any) -> None:
    """The prompt of a model that takes pictures alternates; a video model has its frames first."""
    from vlprune.loading import load_embedded

    LAYOUTS["longvideobench-subtitles"](tmp_path, clip)
    first = load_samples(get_benchmark("longvideobench-subtitles"), Source(tmp_path))[0]
    loaded = load_embedded()
    assert not loaded.takes_video
    opened = open_sample(first, Frames(4))
    ids = inputs_for(loaded, opened)["input_ids"][0].tolist()
    token = loaded.model.config.image_token_id
    runs = [number for number, one in enumerate(ids) if one == token and (number == 0 or ids[number - 1] != token)]
    plain = inputs_for(loaded, replace(opened, parts=None))
    assert ids.count(token) == plain["input_ids"][0].tolist().count(token) == 4 * 256
    assert len(runs) >= 2                                                 # something stands between the frames


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    """Times, cuts and sampling as in a file."""
    from vlprune.evals.frame_folders import read_frames

    frames(tmp_path / "f", 12)
    whole = read_frames(tmp_path / "f", 4, 3.0)
    assert whole.indices == [1, 4, 7, 10]
    assert whole.times == pytest.approx([1 / 3, 4 / 3, 7 / 3, 10 / 3])
    assert [round(np.asarray(frame).mean() / 20) for frame in whole.frames] == [1, 4, 7, 10]
    assert read_frames(tmp_path / "f", 8, 3.0, start=1.0, end=2.0).indices == [3, 4, 5]
    assert whole.duration == 4.0
    (tmp_path / "f" / "00005.jpg").write_bytes(b"no picture")
    with pytest.raises(OptionError, match=r"00005\.jpg"):
        read_frames(tmp_path / "f", 12, 3.0)
    (tmp_path / "none").mkdir()
    with pytest.raises(OptionError, match="no frames"):
        read_frames(tmp_path / "none", 4, 3.0)


def test_summaries() -> None:
    """What the official reports add to the mean."""
    from vlprune.evals.benchmark import Sample

    made = [Sample(f"{number}", "?", ("a cat",), kind=kind, facts={"domain": kind}) for number, kind in enumerate(("CW", "CH", "TN", "DL"))]
    of = {name: get_benchmark(name).summary for name in ("next-qa", "mlvu", "video-mme", "msvd-qa")}
    assert all(of.values())
    assert of["next-qa"](made, [1, 0, 1, 0]) == {"causal %": 50, "temporal %": 100, "descriptive %": 0}  # type: ignore[misc]
    uneven = [*made[:2], replace(made[1], id="5")]
    assert of["mlvu"](uneven, [1, 0, 1]) == {"M-Avg": 75}  # type: ignore[misc]
    assert of["video-mme"](uneven, [1, 0, 1]) == {"CH %": 50, "CW %": 100}  # type: ignore[misc]
    assert of["msvd-qa"](made[:2], [1, 1], ["a cat", "cat"]) == {"exact match %": 50}  # type: ignore[misc]


def test_through_datasets(tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples from a data set with named parts, as on the hub, as from its folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    LAYOUTS["video-mme"](tmp_path / "data", clip)
    card = "---\nconfigs:\n- config_name: videomme\n  data_files:\n  - split: test\n    path: videomme/test-*\n---\n"
    (tmp_path / "data" / "README.md").write_text(card)
    mme = get_benchmark("video-mme")
    assert load_samples(mme, Source(hub=str(tmp_path / "data"))) == load_samples(mme, Source(tmp_path / "data"))
    with pytest.raises(OptionError, match="split 'train'"):
        load_samples(mme, Source(hub=str(tmp_path / "data"), split="train"))


def test_archives_of_the_hub(tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a data set holds in archives is unpacked once, and nothing lands outside."""
    import zipfile

    import huggingface_hub

    clip(tmp_path / "data" / "a.mp4")
    hub = tmp_path / "snapshot"
    hub.mkdir()
    with zipfile.ZipFile(hub / "videos_chunked_01.zip", "w") as pack:
        pack.write(tmp_path / "data" / "a.mp4", "data/a.mp4")
        pack.writestr("../../outside.txt", "no")
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: (asked.append(f"{repo_type} {name}"), str(hub))[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    found = hub_folders("lmms-eval/Video-MME-test")
    assert asked == ["dataset lmms-eval/Video-MME-test"]
    assert found[0] == hub
    assert (found[1] / "data" / "a.mp4").is_file()
    assert found[1].is_relative_to(tmp_path / "home")
    assert [path.is_relative_to(found[1]) for path in tmp_path.rglob("outside.txt")] == [True]


def test_moving_scenes_are_files_of_eight_frames() -> None:
    """Written, read with decord, removed; fewer samples are the beginning of more."""
    pytest.importorskip("sklearn")
    card = get_benchmark("moving-scenes")
    samples = load_samples(card, Source(count=6))
    assert [sample.id for sample in load_samples(card, Source(count=12))][:6] == [sample.id for sample in samples]
    opened = open_sample(pickle.loads(pickle.dumps(samples[2])), Frames())       # as on a worker of a cluster
    assert opened.clip is not None
    assert (opened.clip.backend, opened.clip.indices, len(opened.pictures)) == ("decord", list(range(8)), 8)
    assert not opened.clip.path.exists()
    assert open_sample(samples[2], Frames(4)).clip.indices == [1, 3, 5, 7]  # type: ignore[union-attr]
    answer = samples[2].answers[0]
    assert card.score(samples[2], f" {answer} ") == 1
    assert card.score(samples[2], f"{answer} {answer}") == 0


@needs_video_model
def test_runs_of_the_embedded_video_model(tmp_path: Path, clip: Any) -> None:
    """Official layouts and the moving scenes in one run: answers, groups, a broken video on record, and dense is right on the scenes."""
    from vlprune.evals.evaluate import Request, evaluate
    from vlprune.evals.worker import ModelSpec, Plan

    LAYOUTS["video-mme-subtitles"](tmp_path / "mme", clip)
    plan = Plan(ModelSpec("embedded-video"), ("random",), ("1/2",))
    sources = {"video-mme-subtitles": Source(tmp_path / "mme")}
    found = evaluate(Request(plan, ("moving-scenes", *sources), sources, tmp_path / "out", limit=12, costs=False, gallery=0))["benchmarks"]
    dense, chance = found["moving-scenes"]["rows"]
    assert dense["score"] > 0.6
    assert len(dense["kinds"]) == 12
    assert dense["tokens"]["mean"] == 2 * chance["tokens"]["mean"] == 256
    mme = found["video-mme-subtitles"]
    assert (mme["counted"], mme["samples"]) == (2, 3)
    assert "fFjv93ACG2.mp4" in mme["failed"]["001-2"]
    assert not mme["rows"][0]["failed"]
    assert set(mme["rows"][0]["summary"]) == {"Knowledge %"}


@needs_video_model
def test_a_step_is_timed_as_generate_takes_it() -> None:
    """A model with three-part positions gets those that `generate` would give."""
    import torch

    from vlprune.embedded_video import load_embedded_video
    from vlprune.evals.costs import _positions

    loaded = load_embedded_video()
    inputs = inputs_for(loaded, open_sample(load_samples(get_benchmark("moving-scenes"), Source(count=1))[0], Frames()))
    with torch.no_grad():
        made = loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
        out = loaded.model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
        token = out.logits[:, -1:].argmax(-1)
        step = loaded.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, **_positions(loaded.model, mask))
    torch.testing.assert_close(step.logits[:, -1], made.logits[1])
