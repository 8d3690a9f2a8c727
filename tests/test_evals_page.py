"""The plots and the page of a results folder."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

from vlprune.evals import gallery, page, pareto, plots
from vlprune.evals.asking import Frames
from vlprune.evals.benchmark import Benchmark, Sample, get_benchmark
from vlprune.evals.evaluate import Request, evaluate
from vlprune.evals.settings import Setting, make_settings
from vlprune.evals.worker import ModelSpec, Plan, Worker

EVIL = '<script>alert("1")</script> & \'co\''
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Reader(HTMLParser):
    """Complains about tags that do not close; collects what refers to something, the tags and the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for name, attrs in self.tags if name == tag and attribute in attrs]


def row(method: str, keep: str, place: int, measured: bool = True, draws: int = 1) -> dict[str, Any]:
    name = method if method == "dense" else f"{method}@{keep}"
    tokens = 256.0 if method == "dense" else round(256 * eval(keep))
    milliseconds = 20 + tokens / 8 + place
    return {
        "row": name, "method": method, "keep": keep, "draws": draws, "options": "", "score": 0.9 - 0.02 * place - 0.2 * (1 - tokens / 256), "error": 0.03,
        "count": 40, "failed": {}, "scores": "", "kinds": {"where": 0.5, "what": 0.75},
        **({} if method == "dense" else {"change": {"change": -0.1, "error": 0.02, "gained": 1, "lost": 5, "p": math.nan if draws > 1 else 0.2}}),
        "tokens": {"visual": 256.0, "mean": tokens, "median": tokens, "most": tokens, "as_asked": True, "not_as_asked": []},
        "flops": {"vision": 1e9, "scorer": 1e6, "decoder": 4e6 * tokens, "total": 1e9 + 4e6 * tokens, "share": 0.5}, "kv_bytes": 1e4 * tokens, "seconds": 0.1,
        "cost": {"ttft_ms": milliseconds, "decode_ms": 3.0, "per_second_1": 20.0, "per_second_8": 40.0, "peak_bytes": 3e6} if measured else {},
        **({"speedup": 52 / milliseconds, "slower_than_dense": method != "dense" and 52 / milliseconds < 0.98} if measured else {}),
    }  # fmt: skip


def made_up(methods: int, keeps: tuple[str, ...] = ("1/3", "1/9"), measured: bool = True, benchmarks: tuple[str, ...] = ("digits",)) -> dict[str, Any]:
    rows = [row("dense", "1", 0, measured)]
    for keep in keeps:
        rows += [row("random", keep, 2, measured, draws=2)] + [row(f"method{number}", keep, number % 7, measured) for number in range(methods)]
    one = {
        "title": "Digit scenes", "metric": "accuracy", "modality": "image", "source": "made", "samples": 41, "counted": 40, "failed": {"s9": EVIL},
        "rows": rows, "left_out": {"odd": f"needs {EVIL}"},
    }  # fmt: skip
    average = [{"row": entry["row"], "relative": entry["score"] / 0.9, "benchmarks": len(benchmarks)} for entry in rows]
    config = {"model": "a/model", "dtype": "auto", "device": "CPU", "frames": {"count": 8, "fps": None}, "vlprune": "0.1.0"}
    return {"command": f"vlprune eval {EVIL}", "config": config, "limit": 40, "benchmarks": dict.fromkeys(benchmarks, one), "average": average}


def request(out: Path, count: int = 0) -> Request:
    return Request(Plan(ModelSpec("embedded"), ("hiprune",), ("1/3", "1/9"), batch=6), ("digits",), out=out, limit=6, costs=False, gallery=count)


# plots


@pytest.mark.parametrize(
    ("methods", "keeps", "measured"), [(3, ("1/3", "1/9"), True), (12, ("1/3", "2/9", "1/9"), True), (12, ("1/9",), False), (0, ("1/9",), True)]
)
def test_plots_are_drawn(tmp_path: Path, methods: int, keeps: tuple[str, ...], measured: bool) -> None:
    found = made_up(methods, keeps, measured)
    plots.write(tmp_path, found)
    named = [file for file, _ in plots.files(found, "digits")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(named)
    for file in named:
        with Image.open(tmp_path / file) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10, f"{file} is blank"


def test_results_without_numbers_are_drawn(tmp_path: Path) -> None:
    """Nothing was counted, nothing measured."""
    found = made_up(2)
    for entry in found["benchmarks"]["digits"]["rows"]:
        entry.update(score=math.nan, error=math.nan, cost={}, failed={"s1": "broken"})
        entry.pop("flops"), entry.pop("tokens")
    plots.write(tmp_path, found)
    page.write(request(tmp_path), found, None, [get_benchmark("digits")], {"digits": []}, {"digits": ([], {})})  # type: ignore[arg-type]
    assert "failed on 1 samples" in Reader((tmp_path / "index.html").read_text()).text


def test_many_methods_get_a_panel_each_with_dense_and_random() -> None:
    table = plots.tables(made_up(12))["digits"]
    figure = plots.against_tokens(table, plots.View("accuracy", "accuracy, %", 1, True))
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert sorted(axis.get_title() for axis in panels) == sorted(table.methods)
    for axis in panels:
        assert {"dense", "random ± standard error"} <= set(axis.get_legend_handles_labels()[1])
    best = [sum(point.score for point in table.of(axis.get_title())) for axis in panels]
    assert best == sorted(best, reverse=True)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    words = [*(text for text in figure.texts if text is not figure._supxlabel), figure._supxlabel, figure.legends[0], *(axis.title for axis in panels)]
    boxes = [one.get_window_extent(renderer) for one in words]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    plots.pyplot().close(figure)


def test_latency_that_was_not_measured_is_flops_and_says_so() -> None:
    table = plots.tables(made_up(3, measured=False))["digits"]
    figure = plots.against_tokens(table, plots.View("FLOPs", table.cost_axis, -1, False))
    assert "FLOPs" in figure.axes[0].get_ylabel()
    assert "latency was not measured" in figure.axes[0].get_ylabel()
    assert table.points[0].cost == pytest.approx((1e9 + 4e6 * 256) / 1e9)
    plots.pyplot().close(figure)


def test_what_was_not_measured_is_named() -> None:
    found = made_up(3)
    found["benchmarks"]["digits"]["rows"][-1]["cost"] = {"failed": "batch 1: out of memory"}
    table = plots.tables(found)["digits"]
    figure = plots.against_tokens(table, plots.View("latency", table.cost_axis, -1, False))
    assert "not measured: method2@1/9" in figure.get_supxlabel()
    plots.pyplot().close(figure)


def point(cost: float, score: float) -> plots.Point:
    return plots.Point(f"{cost},{score}", "m", "1/3", 10, score, 1.0, cost)


def test_front_holds_what_nothing_beats() -> None:
    sound = [point(1, 50), point(2, 60), point(2, 55), point(3, 60), point(4, 59), point(5, 90), point(6, math.nan), point(math.nan, 99)]
    assert [(one.cost, one.score) for one in pareto.members(sound)] == [(1, 50), (2, 60), (5, 90)]
    assert pareto.members([]) == []


@pytest.mark.parametrize("name", ["a", "a_name_of_method", "a_name_that_is_longer_than_any_so_far"])
def test_names_on_the_front_do_not_overlap(name: str) -> None:
    """Also of neighbours that are nearly equal."""
    points = tuple(plots.Point(f"{name}{n}@1/9", f"a{n}", "1/9", 28, 80 + 0.1 * n, 1, 20 + 0.2 * n) for n in range(18))
    figure = pareto.front(plots.Table("T", "accuracy", "facts", True, (*points, plots.Point("dense", "dense", "1", 256, 99, 1, 60))))
    figure.canvas.draw()
    renderer, (axis, *_) = figure.canvas.get_renderer(), figure.axes
    names = [text for text in axis.texts if "@" in text.get_text()]
    assert len(names) == 18
    boxes = sorted((super(type(text), text).get_window_extent(renderer) for text in names), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 0.5 for below, above in itertools.pairwise(boxes))
    marks = axis.transData.transform([(one.cost, one.score) for one in points])
    assert max(box.x1 for box in boxes) < marks[:, 0].min(), "names run into the points"
    assert min(box.x0 for box in boxes) >= axis.bbox.x0
    assert max(box.y1 for box in boxes) <= axis.bbox.y1
    plots.pyplot().close(figure)


# the page


def test_page_is_whole_escaped_and_needs_nothing_else(tmp_path: Path) -> None:
    found = made_up(9, benchmarks=("digits", "again"))
    rows = found["benchmarks"]["digits"]["rows"]
    rows[3].update(options=EVIL, summary={EVIL: 12.5}, failed={"s1": EVIL})
    rows[4]["change"] = {"change": -0.25, "error": 0.02, "gained": 0, "lost": 9, "p": 0.004}
    rows[5]["tokens"].update(as_asked=False, not_as_asked=["s4", "s5"])
    rows[6].update(speedup=0.9, slower_than_dense=True)
    plots.write(tmp_path, found)
    cards = [get_benchmark("digits"), Benchmark("again", "Again", "image", lambda source: [], lambda sample, answer: 0.0, "made")]
    empty = {card.name: [] for card in cards}
    page.write(request(tmp_path), found, None, cards, empty, {card.name: ([], {}) for card in cards})  # type: ignore[arg-type]
    text = (tmp_path / "index.html").read_text()
    reader = Reader(text)
    assert "<script>alert" not in text
    assert reader.text.count(EVIL) >= 5                                   # command, options, failed to open, failed, left out
    assert all(reference.startswith(("data:", "#")) for reference in reader.references), reader.references
    assert "@import" not in text
    assert "url(" not in text
    assert reader.all("tr", "data-row") == [entry["row"] for entry in rows] * 2
    assert len([url for url in reader.all("img", "src") if url.startswith("data:image/png")]) == 6
    assert "not comparable with full runs" in reader.text
    assert "All together" in reader.text
    assert reader.text.count("slower than dense") == 2                       # the row is in both benchmarks
    assert any(attrs.get("class") == "worse" and attrs.get("data-v") == "-25.0" for tag, attrs in reader.tags if tag == "td")
    assert "was not left with the tokens asked for on s4, s5" in reader.text
    for words in ("change against dense", "samples/s at batch 8", "peak memory, MB", "By kind of question", "front"):
        assert words in reader.text


def test_plots_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_up(3)
    plots.write(tmp_path, found)
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    page.write(request(tmp_path), found, None, [get_benchmark("digits")], {"digits": []}, {"digits": ([], {})})  # type: ignore[arg-type]
    assert "see the file digits_pareto.png" in Reader((tmp_path / "index.html").read_text()).text


# chosen samples


def settings(*labels: str) -> list[Setting]:
    parts = [label.partition("@") for label in labels]
    return [Setting(method, keep or "1") for method, _, keep in parts]


def test_samples_on_which_settings_disagree_come_first() -> None:
    three = settings("dense", "random@1/3", "hiprune@1/3")
    samples = [Sample(str(n), "?", ("a",), kind=kind) for n, kind in enumerate("xxxyx")]
    scores = {"0": (1, 1, 1), "1": (1, 0, 1), "2": (0, 0, 1), "3": (1, 0, 0), "4": (1, 0, 1)}
    records = {(one.label, sample): {"score": score} for sample, given in scores.items() for one, score in zip(three, given, strict=True)}
    assert [sample.id for sample in gallery.choose_samples(samples, three, records, 9)] == ["1", "3", "4", "2", "0"]
    records["dense", "1"] = {"score": 0, "failed": "open"}
    assert [sample.id for sample in gallery.choose_samples(samples, three, records, 2)] == ["3", "4"]
    assert gallery.choose_samples(samples, three, {}, 2) == []


def test_settings_of_the_smallest_keep_are_shown(tmp_path: Path) -> None:
    every = settings("dense", "random@1/3", "a@1/3", "b@1/3", "c@1/3", "random@1/9", "a@1/9", "b@1/9", "c@1/9")
    rows = [{"row": one.row, "score": {"b": 0.9, "a": 0.5}.get(one.method, 0.1)} for one in every]
    shown, words = gallery.choose_settings(every, rows)
    assert (shown, words) == (every, "")
    shown, words = gallery.choose_settings(every, rows, 6)
    assert [one.label for one in shown] == ["dense", "random@1/9", "a@1/9", "b@1/9", "c@1/9"]
    assert words == "Keep 1/3 is not shown."
    shown, words = gallery.choose_settings(every, rows, 4)
    assert [one.label for one in shown] == ["dense", "random@1/9", "a@1/9", "b@1/9"]
    assert "not shown: c" in words


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Worker]:
    asked = request(tmp_path_factory.mktemp("eval"), 2)
    worker = Worker(asked.plan)
    return asked.out, evaluate(asked, worker=worker, command="vlprune eval"), worker


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_run_shows_its_samples(run: tuple[Path, dict[str, Any], Worker]) -> None:
    out, found, _ = run
    reader = Reader((out / "index.html").read_text())
    lines = [json.loads(line) for line in (out / "answers" / "digits.jsonl").read_text().splitlines()]
    samples = reader.all("article", "data-sample")
    assert len(samples) == 2
    drawn = [picture(url) for url in reader.all("img", "src") if url.startswith("data:image/jpeg")]
    labels = [entry["row"] for entry in found["benchmarks"]["digits"]["rows"]]
    assert len(labels) == 5
    assert [one.size for one in drawn] == [(224, 224)] * 2 * len(labels)
    for name in samples:
        for answer in {line["answer"] for line in lines if line["id"] == name}:
            assert f"“{answer}”" in reader.text
    assert "85 of 256, before_llm" in reader.text
    dense, pruned = (sum(one.convert("L").resize((1, 1)).getpixel((0, 0)) for one in drawn[place :: len(labels)]) for place in (0, 3))
    assert pruned < dense, "nothing is dim"


def test_a_model_that_breaks_loses_pictures_only(run: tuple[Path, dict[str, Any], Worker], tmp_path: Path) -> None:
    out, found, worker = run
    asked, card = request(tmp_path, 1), get_benchmark("digits")
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "digits.jsonl").write_text((out / "answers" / "digits.jsonl").read_text())
    known = {"digits": list(card.load(page_source(6)))}

    class Broken:
        plan, loaded = worker.plan, None

    page.write(asked, found, Broken(), [card], known, {"digits": worker.settings(card)})  # type: ignore[arg-type]
    reader = Reader((tmp_path / "index.html").read_text())
    assert "The pictures cannot be shown: AttributeError" in reader.text
    assert len(reader.all("article", "data-sample")) == 1
    assert "hiprune@1/9" in reader.text


def page_source(count: int) -> Any:
    from vlprune.evals.benchmark import Source

    return Source(count=count)


def test_an_album_stops_where_it_is_full() -> None:
    album = gallery.Album(3000)
    urls = [album.add(Image.new("RGB", (64, 64), "red")) for _ in range(9)]
    assert urls[0] is not None
    assert urls[-1] is None
    assert sum(len(url) for url in urls if url) <= 3000


def test_frames_of_a_clip_have_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.embedded_video import load_llava_video
    from vlprune.evals import moving_digits
    from vlprune.video import write_video

    pytest.importorskip("av")
    file = write_video(tmp_path / "clip.avi", list(moving_digits.clip("heldout", 2).frames), fps=2)
    worker = Worker(Plan(ModelSpec("embedded"), ("todre",), ("1/9",), frames=Frames(3)), load_llava_video())
    every, _ = make_settings(worker.loaded.model, ["todre"], ["1/9"], "video")
    sample = Sample("c", f"which digit moves ? {EVIL}", ("9",), video=file)
    records = {(one.label, "c"): {"score": float(one.method == "dense"), "answer": "9"} for one in every}
    card = Benchmark("clips", "Clips", "video", lambda source: [sample], lambda sample, answer: 1.0, "made")
    made = gallery.exhibit(worker, card, sample, every, records, gallery.Album(10**7), every)
    assert made.problem == ""
    assert [one.problem for one in made.shown] == [""] * 3
    assert [[caption for _, caption in one.pictures] for one in made.shown] == [["0.50 s", "1.50 s", "2.50 s"]] * 3
    assert {picture(url).size for one in made.shown for url, _ in one.pictures} == {(128, 128)}
    assert made.shown[1].count == "85 of 768"
    fused = [Image.new("RGB", (8, 8))] * 3                                # a model that fuses frames has fewer panels than frames
    monkeypatch.setattr(gallery, "look", lambda *given: type("Entry", (), {"panels": fused[:1], "count": "", "where": "", "keys": []}))
    merged = gallery.exhibit(worker, card, sample, every, records, gallery.Album(10**7), every)
    assert [[caption for _, caption in one.pictures] for one in merged.shown] == [["0.50 s"]] * 3
    gone = gallery.exhibit(worker, card, Sample("c", "?", ("9",), video=tmp_path / "none.mp4"), every, records, gallery.Album(10**7), every)
    assert "none.mp4" in gone.problem
