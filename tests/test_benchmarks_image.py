"""The picture question answering benchmarks: their official layouts are read, their prompts are exact, scores and summaries are those computed by hand."""

from __future__ import annotations

import pickle
import sys
import types
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("datasets")

from tests.image_layouts import LAYOUTS, lines, picture
from vlprune.errors import OptionError
from vlprune.evals.asking import Frames, open_sample
from vlprune.evals.benchmark import Sample, Source, get_benchmark, list_benchmarks, load_samples
from vlprune.evals.vqa_accuracy import normalised_evalai, normalised_vqa, vqa_accuracy
from vlprune.evals.wups import wups

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


# points, rounds and kinds, where not all is there


def test_points_want_both_questions_of_a_picture(tmp_path: Path) -> None:
    """A picture with one question of two makes no points, as with --limit or a broken file."""
    LAYOUTS["mme"](tmp_path)
    samples = load_samples(get_benchmark("mme"), Source(tmp_path))[:3]
    found = summary_of("mme", samples, [1, 1, 1], ["yes", "no", "yes"])
    assert found == {"perception": 200, "cognition": 0, "existence points": 200}


def test_circular_wants_every_order(tmp_path: Path) -> None:
    """Questions of which an order is missing do not count, and without repeated rows there is no such number."""
    LAYOUTS["mmbench"](tmp_path)
    samples = load_samples(get_benchmark("mmbench"), Source(tmp_path))
    assert summary_of("mmbench", samples[:4], [1] * 4, ["B", "C", "A", "B"]) == {"first order %": 100, "circular %": 100}
    assert summary_of("mmbench", samples[1:2], [1], ["C"]) == {}
    assert summary_of("mmbench", samples[-1:], [1], ["D"]) == {"first order %": 100}
    assert [sample.choices[-1] for sample in samples] == ["Laramie", "Cheyenne", "Casper", "Laramie", "Cheyenne", "Cody"]


def test_answers_that_are_not_public(tmp_path: Path) -> None:
    """The test split of MMBench has none."""
    LAYOUTS["mmbench"](tmp_path)
    file = tmp_path / "mmbench_dev_en_20231003.tsv"
    file.rename(tmp_path / "mmbench_test_en_20231003.tsv")
    assert len(load_samples(get_benchmark("mmbench"), Source(tmp_path, split="test"))) == 6
    text = (tmp_path / "mmbench_test_en_20231003.tsv").read_text()
    (tmp_path / "mmbench_test_en_20231003.tsv").write_text(text.replace("Cody\tD\t", "Cody\t\t"))
    with pytest.raises(OptionError, match=r"253 has the answer '', .* not public"):
        load_samples(get_benchmark("mmbench"), Source(tmp_path, split="test"))


def test_one_kind_of_pope(tmp_path: Path) -> None:
    """As a split; its other files need not be there, and labels are yes or no."""
    LAYOUTS["pope"](tmp_path)
    (tmp_path / "coco_pope_random.json").unlink()
    pope = get_benchmark("pope")
    assert [sample.id for sample in load_samples(pope, Source(tmp_path, split="popular"))] == ["popular-1", "popular-2", "popular-3"]
    with pytest.raises(OptionError, match=r"coco_pope_random\.json"):
        load_samples(pope, Source(tmp_path))
    lines(tmp_path / "coco_pope_popular.json", [{"question_id": 1, "image": "a.jpg", "text": "?", "label": "perhaps"}])
    with pytest.raises(OptionError, match="label 'perhaps'"):
        load_samples(pope, Source(tmp_path, split="popular"))


def test_lists_of_daquar(tmp_path: Path) -> None:
    """All pairs in one file, with a list of the split's pictures."""
    LAYOUTS["daquar"](tmp_path)
    (tmp_path / "qa.894.raw.test.txt").rename(tmp_path / "all_qa_pairs.txt")
    (tmp_path / "test_images_list.txt").write_text("image2\nimage3\n")
    (tmp_path / "train_images_list.txt").write_text("image1.png\n")
    daquar = get_benchmark("daquar")
    assert [sample.answers[0] for sample in load_samples(daquar, Source(tmp_path))] == ["bed_sheets, pillow", "4"]
    assert [sample.answers[0] for sample in load_samples(daquar, Source(tmp_path, split="train"))] == ["garbage_bin"]
    (tmp_path / "train_images_list.txt").unlink()
    with pytest.raises(OptionError, match="train_images_list"):
        load_samples(daquar, Source(tmp_path, split="train"))


def test_another_class_of_clothing_is_left_out(tmp_path: Path) -> None:
    """The classes are the ten; a folder without any of them is an error."""
    clothing = get_benchmark("clothing")
    picture(tmp_path / "test" / "scarf" / "a.jpg")
    with pytest.raises(OptionError, match="dress, hat"):
        load_samples(clothing, Source(tmp_path))
    picture(tmp_path / "test" / "hat" / "b.JPG")
    assert [sample.id for sample in load_samples(clothing, Source(tmp_path))] == ["hat/b"]


# accuracy by people, nearness in WordNet


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Cat", "cat"), ("two dogs", "2 dogs"), ("none", "0"), ("dont know", "don't know"), ("couldnt've", "couldn't've"), ("well", "well"),
        ("1,000", "1000"), ("3.5 m.", "3.5 m"), ("red/blue", "red blue"), ("red / blue", "red blue"), ("t-shirt", "t shirt"),
        ("(left)", "left"), ("a\nb", "b"), ("what?", "what"), ("U.S.A.", "usa"), ("isn't", "isn't"), ("man's", "man's"), ("1,5/2", "152"),
    ],
)  # fmt: skip
def test_official_normalisation(text: str, plain: str) -> None:
    """Rules of vqaEval.py by example."""
    assert normalised_vqa(text) == plain


def test_normalisation_of_evalai() -> None:
    """Differs in the genitive, and drops commas and question marks without a space."""
    assert normalised_evalai("Dakota's, red?") == "dakota 's red"
    assert normalised_evalai("a,b?c") == "abc"
    assert normalised_vqa("a,b?c") == "b c"


@pytest.mark.parametrize(("count", "share"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_people(count: int, share: float) -> None:
    """Ten people, of whom so many agree: each of the others finds count / 3, each of these (count - 1) / 3, at most 1."""
    assert vqa_accuracy("Yes!", ["yes"] * count + ["no"] * (10 - count)) == pytest.approx(share)


def test_one_reference_counts_by_itself() -> None:
    """Nobody else is there to agree."""
    assert vqa_accuracy("two", ["2"]) == 1
    assert vqa_accuracy("two", ["3"]) == 0


def test_nearness_by_hand() -> None:
    """The smaller product of best similarities; below the threshold a tenth."""
    near = {("carton", "box"): 0.95, ("bed", "box"): 0.5}

    def alike(one: str, other: str) -> float:
        return near.get((one, other), near.get((other, one), 0.0))

    assert wups(["box"], ["box"], 0.9, alike) == 1
    assert wups(["carton"], ["box"], 0.9, alike) == pytest.approx(0.95)
    assert wups(["bed"], ["box"], 0.9, alike) == pytest.approx(0.05)
    assert wups(["bed"], ["box"], 0.0, alike) == pytest.approx(0.5)
    assert wups(["carton", "bed"], ["box"], 0.9, alike) == pytest.approx(0.95 * 0.05)
    assert wups(["box"], ["box", "carton"], 0.9, alike) == pytest.approx(0.95)
    assert wups([], ["box"], 0.9, alike) == 0


def _with_wordnet(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """A nltk whose WordNet knows two nouns."""
    meaning = types.SimpleNamespace(wup_similarity=lambda other: 0.8)
    nouns = {"four": [meaning], "4": [meaning]}
    wordnet = types.SimpleNamespace(NOUN="n", synsets=lambda word, pos: nouns.get(word, []), ensure_loaded=loaded)
    corpus = types.ModuleType("nltk.corpus")
    corpus.wordnet = wordnet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


def test_wups_where_wordnet_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three are right, the third is 0.8 near; without the data, or without nltk, a warning says why there is no WUPS."""
    from vlprune.evals.wups import noun_similarity

    expected = LAYOUTS["daquar"](tmp_path)
    samples = load_samples(get_benchmark("daquar"), Source(tmp_path))
    noun_similarity.cache_clear()
    _with_wordnet(monkeypatch, lambda: None)
    found = summary_of("daquar", samples, [1, 1, 0], list(expected.said))
    assert found["WUPS 0.9 %"] == pytest.approx(100 * 2.08 / 3)
    assert found["WUPS 0.0 %"] == pytest.approx(100 * 2.8 / 3)
    noun_similarity.cache_clear()

    def absent() -> None:
        raise LookupError("Resource wordnet not found.")

    _with_wordnet(monkeypatch, absent)
    with pytest.warns(UserWarning, match="no WUPS in the tables.*data of nltk.*downloader wordnet"):
        assert set(summary_of("daquar", samples, [1, 1, 0], list(expected.said))) == {"exact match %"}
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.delitem(sys.modules, "nltk.corpus")
    with pytest.warns(UserWarning, match="nltk, which is not installed"):
        assert set(summary_of("daquar", samples, [1, 1, 0], list(expected.said))) == {"exact match %"}


# through datasets


def _cell(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def _rows_of(name: str, samples: list[Sample], cell: dict[str, Any]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """By configuration: the split's name on the hub and its rows, in the hub's columns."""
    tail = {"mme": "", "easy-vqa": "", "daquar": " Answer the question using a single word or phrase."}
    asked = [sample.question.removesuffix(tail.get(name, "\nAnswer the question using a single word or phrase.")) for sample in samples]
    pairs = list(zip(samples, asked, strict=True))
    if name == "gqa":
        rows = [{"id": one.id, "imageId": "n1", "question": text, "answer": one.answers[0], "types": {"structural": one.kind}} for one, text in pairs]
        return {"testdev_balanced_instructions": ("testdev", rows), "testdev_balanced_images": ("testdev", [{"id": "n1", "image": cell}])}
    if name == "pope":
        return {"default": ("test", [{"question_id": one.id.split("-")[1], "question": text, "answer": one.answers[0], "image_source": "COCO_val2014_1",
                                      "image": cell, "category": one.kind} for one, text in pairs])}  # fmt: skip
    if name == "mme":
        return {"default": ("test", [{"question_id": f"{one.facts['picture']}.png", "image": cell, "question": text, "answer": one.answers[0].capitalize(),
                                      "category": one.kind} for one, text in pairs])}  # fmt: skip
    if name == "textvqa":
        return {"default": ("validation", [{"image_id": "1", "question_id": int(one.id), "question": text, "image": cell, "answers": list(one.answers)}
                                           for one, text in pairs])}  # fmt: skip
    if name == "vqav2":
        return {"default": ("validation", [{"question_id": int(one.id), "image_id": 1, "question": text, "image": cell, "answer_type": one.kind,
                                            "answers": [{"answer": said, "answer_id": 1} for said in one.answers]} for one, text in pairs])}  # fmt: skip
    return {"default": ("test", [{"question": text, "answer": one.answers[0], "image": cell} for one, text in pairs])}


@pytest.mark.parametrize("name", ["gqa", "pope", "mme", "textvqa", "vqav2", "daquar", "easy-vqa"])
def test_through_datasets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, answers and groups from a data set in the hub's columns as from the official files."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    card, hub = get_benchmark(name), tmp_path / "hub"
    LAYOUTS[name](tmp_path / "files")
    wanted = load_samples(card, Source(tmp_path / "files"))
    head = ["---", "configs:"]
    for config, (split, rows) in _rows_of(name, wanted, _cell(picture(tmp_path / "a.jpg"))).items():
        (hub / config).mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        if "image" in rows[0]:
            kinds = datasets.Features({**datasets.Features.from_arrow_schema(table.schema), "image": datasets.Image()})
            table = table.replace_schema_metadata(kinds.arrow_schema.metadata)
        parquet.write_table(table, hub / config / f"{split}-00000.parquet")
        head += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}/{split}-*"]
    (hub / "README.md").write_text("\n".join([*head, "---", ""]))
    samples = load_samples(card, Source(hub=str(hub)))
    plain = [replace(sample, id="", pictures=(), facts={}) for sample in samples]
    assert plain == [replace(sample, id="", pictures=(), facts={}) for sample in wanted]
    assert [opened.size for opened in open_sample(samples[-1], Frames()).pictures] == [(16, 12)]
    if card.summary is not None:
        words = [sample.answers[0] for sample in wanted]
        assert summary_of(name, samples, [1] * len(words), words) == summary_of(name, wanted, [1] * len(words), words)
