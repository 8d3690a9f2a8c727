"""The picture question answering benchmarks: their official layouts are read, their prompts are exact, scores and summaries are those computed by hand."""

from __future__ import annotations

import pickle
from inspect import signature
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("datasets")

from tests.image_layouts import LAYOUTS
from vlprune.errors import OptionError
from vlprune.evals.asking import Frames, open_sample
from vlprune.evals.benchmark import Sample, Source, get_benchmark, list_benchmarks, load_samples

IMAGE = [name for name in list_benchmarks() if get_benchmark(name).modality == "image" and not get_benchmark(name).embedded]


def test_every_image_benchmark_has_a_layout() -> None:
    """A new benchmark is tested like the others."""
    assert set(IMAGE) == set(LAYOUTS)
    for name in IMAGE:
        card = get_benchmark(name)
        assert card.layout
        assert "arXiv:" in card.source or "github.com" in card.source


def summary_of(name: str, samples: list[Sample], scores: list[float], answers: list[str]) -> dict[str, float]:
    """As the tables ask for it."""
    summary = get_benchmark(name).summary
    return {} if summary is None else dict(summary(*[samples, scores, answers][: len(signature(summary).parameters)]))


@pytest.mark.parametrize("name", IMAGE)
def test_official_layout(name: str, tmp_path: Path) -> None:
    """Rows, prompt letter for letter, groups, scores of right and wrong answers, and the pictures open, also on a worker of a cluster."""
    card, expected = get_benchmark(name), LAYOUTS[name](tmp_path)
    samples = load_samples(card, Source(tmp_path))
    first = samples[0]
    assert first.question == expected.prompt
    assert tuple(sample.kind for sample in samples) == expected.kinds
    assert all(card.score(first, answer) == 1 for answer in expected.right)
    assert all(card.score(first, answer) == 0 for answer in expected.wrong)
    for sample in pickle.loads(pickle.dumps(samples)):
        opened = open_sample(sample, Frames())
        assert [picture.size for picture in opened.pictures] == [(16, 12)]
        assert {picture.mode for picture in opened.pictures} == {"RGB"}
    assert [sample.id for sample in load_samples(card, Source(tmp_path))] == [sample.id for sample in samples]


@pytest.mark.parametrize("name", IMAGE)
def test_numbers(name: str, tmp_path: Path) -> None:
    """Scores and summary of given answers are those computed by hand; answers that say nothing score nothing and break nothing."""
    card, expected = get_benchmark(name), LAYOUTS[name](tmp_path)
    samples = load_samples(card, Source(tmp_path))
    scores = [card.score(sample, answer) for sample, answer in zip(samples, expected.said, strict=True)]
    assert scores == pytest.approx(expected.scores)
    assert summary_of(name, samples, scores, list(expected.said)) == pytest.approx(dict(expected.summary))
    silent = [card.score(sample, "") for sample in samples]
    assert silent == [0] * len(samples)
    assert set(summary_of(name, samples, silent, [""] * len(samples)).values()) <= {0}


@pytest.mark.parametrize("name", IMAGE)
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    """No annotations, no pictures, and another split than there is: each an error that says what was looked for."""
    card, expected = get_benchmark(name), LAYOUTS[name](tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=expected.file.partition("*")[0].rstrip("/").split("/")[-1]):
        load_samples(card, Source(tmp_path / "empty"))
    with pytest.raises(OptionError):
        load_samples(card, Source())
    with pytest.raises(OptionError, match="nothing"):
        load_samples(card, Source(tmp_path / "whole", split="nothing"))
    pictures = [path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".jpg", ".png")]
    for path in pictures:
        path.unlink()
    if pictures:
        with pytest.raises(OptionError, match=r"not one of \d+ pictures is there, such as '.*'\. Looked in .*\.jpg|there is none of"):
            load_samples(card, Source(tmp_path / "whole"))


@pytest.mark.parametrize("name", [name for name in IMAGE if name != "clothing"])
def test_a_file_that_is_another_is_refused(name: str, tmp_path: Path) -> None:
    """It says which column is missing, or that it cannot be read."""
    expected = LAYOUTS[name](tmp_path)
    file = next(tmp_path.glob(expected.file))
    file.write_text("nothing\n1\n" if file.suffix in (".tsv", ".txt") else '[{"nothing": 1}]')
    with pytest.raises(OptionError, match=r"has no|cannot read"):
        load_samples(get_benchmark(name), Source(tmp_path))


def test_one_missing_picture_is_its_own_failure(tmp_path: Path) -> None:
    """The others count; the failure names the file."""
    LAYOUTS["gqa"](tmp_path)
    (tmp_path / "images" / "n235859.jpg").write_bytes(b"no picture")
    samples = load_samples(get_benchmark("gqa"), Source(tmp_path))
    assert len(open_sample(samples[0], Frames()).pictures) == 1
    with pytest.raises(OptionError, match=r"n235859\.jpg"):
        open_sample(samples[1], Frames())
    (tmp_path / "images" / "n235859.jpg").unlink()
    with pytest.raises(OptionError, match="n235859"):
        open_sample(load_samples(get_benchmark("gqa"), Source(tmp_path))[1], Frames())
