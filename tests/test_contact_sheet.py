"""The sheets: every method that fits is there with its count, the others are listed, patches are where the model saw them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from vlprune.cli import app
from vlprune.contact_sheet import MARGIN, Subject, compose, draw_sheet, dropping, embedded, legend, short, subject
from vlprune.draw import paint_kept
from vlprune.errors import OptionError
from vlprune.tokens import VisualItem, raster_grid
from vlprune.trace import PointRecord
from vlprune.video import write_video

pytest.importorskip("sklearn")
METHODS = "random,hiprune,pyramiddrop,cls_attention,evs,dynamicvit"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["draw", *map(str, arguments)])


def record(kept: list[int], point: str, names: tuple[str, ...] = ("kept",), roles: list[int] | None = None) -> PointRecord:
    grid = raster_grid(1, 2, 4)
    made = PointRecord(point, "test", 8)
    made.add(VisualItem(0, torch.arange(8), "image", 0, grid), torch.tensor(kept), None if roles is None else torch.tensor(roles), names)
    return made


def test_a_picture() -> None:
    """Counts, places and roles are those of the run; sections follow the places."""
    given = subject(None, None, False, 6)
    sheet = draw_sheet(embedded(given), given, METHODS.split(","), 2 / 9, given.question, size=64)
    found = {entry.name: entry for entry in sheet.entries}
    assert list(found) == ["random", "hiprune", "pyramiddrop", "cls_attention"]
    assert [entry.section for entry in sheet.entries] == [0, 2, 3, 1]
    assert found["hiprune"].count == "57 of 256"
    assert sum(key.count for key in found["hiprune"].keys) == 57
    assert [key.label for key in found["hiprune"].keys] == ["anchor", "buffer", "register"]
    assert sum(key.count for key in found["pyramiddrop"].keys) == 256
    assert found["pyramiddrop"].keys[0].label == "dropped at llm:3"
    assert found["cls_attention"].where == "vision:4"
    assert sheet.left_out["evs"] == "works on videos only"
    assert sheet.left_out["dynamicvit"].startswith("needs its trained predictors")
    assert all(panel.size == (64, 64) for entry in sheet.entries for panel in entry.panels)


def test_a_clip() -> None:
    """A panel for each frame; methods for videos are there, those inside the tower of pictures are not."""
    given = subject(None, None, True, 6)
    sheet = draw_sheet(embedded(given), given, ["uniform", "evs", "cls_attention"], 2 / 9, given.question, size=48)
    assert [entry.name for entry in sheet.entries] == ["uniform", "evs"]
    assert [len(entry.panels) for entry in sheet.entries] == [6, 6]
    assert sheet.entries[1].count == "341 of 1,536"
    assert sheet.left_out["cls_attention"] == "works on images only"
    first = np.asarray(sheet.entries[1].panels[0]).astype(int)
    later = np.asarray(sheet.entries[1].panels[3]).astype(int)
    assert np.ptp(first, axis=2).mean() > 4 * np.ptp(later, axis=2).mean()      # EVS keeps the first frame whole: it has its colours


def test_command(tmp_path: Path) -> None:
    """The file is written, and what does not fit is said."""
    result = run("--methods", METHODS, "--keep", "1/9", "--out", tmp_path / "new" / "sheet.png", "--size", 64)
    assert result.exit_code == 0, result.output
    assert "4 methods on a scene of digits" in result.output
    assert "not evs: works on videos only" in result.output
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width >= 720
        assert sheet.height > 4 * 64


def test_files(tmp_path: Path) -> None:
    """A wide picture and a video with wide frames: the model sees the middle, and so does the sheet."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "wide.png")
    video = write_video(tmp_path / "wide.avi", list(pixels), fps=4)
    for given, frames in ((subject(tmp_path / "wide.png", None, False, 6), 1), (subject(None, video, False, 3), 3)):
        sheet = draw_sheet(embedded(given), given, ["random"], 0.5, given.question, size=64)
        assert [panel.size for panel in sheet.entries[0].panels] == [(64, 64)] * frames
        assert sheet.entries[0].total == 256 * frames


def test_mistakes_are_told(tmp_path: Path) -> None:
    for arguments, said in (
        (("--methods", "hiprun"), "Did you mean 'hiprune'"),
        (("--image", tmp_path / "none.png"), "no picture file"),
        (("--video", tmp_path / "none.mp4"), "no video file"),
        (("--clip", "--image", "a.png"), "one of them"),
        (("--methods", "evs"), "nothing to draw: evs: works on videos only"),
        (("--methods", "dense"), "name a method that drops something"),
        (("--keep", "3/2"), "a share must lie in (0, 1]"),
    ):
        result = run(*arguments, "--out", tmp_path / "x.png")
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "x.png").exists()


def test_only_records_that_drop_are_drawn() -> None:
    """The LLM repeats what the tower dropped."""
    one, again, less = record([0, 1, 2], "vision:2"), record([0, 1, 2], "before_llm"), record([1], "llm:3")
    assert [entry.point for entry in dropping([one, again, less])] == ["vision:2", "llm:3"]


def test_legends() -> None:
    """One role needs none; roles without tokens are left out; points come in their order."""
    picture = Image.new("RGB", (40, 20), (200, 90, 20))
    assert legend(paint_kept([picture], record([0, 1], "llm:1"))[1]) == []
    roles = legend(paint_kept([picture], record([0, 1], "llm:1", ("a", "b", "c"), [0, 2]))[1])
    assert [(key.label, key.count) for key in roles] == [("a", 1), ("c", 1)]
    points = legend(paint_kept([picture], [record([0, 1, 2], "llm:1"), record([0], "llm:2")])[1])
    assert [(short(key), key.count) for key in points] == [("left at llm:1", 5), ("left at llm:2", 2), ("stay", 1)]


def test_pictures_stand_where_they_should() -> None:
    """The first picture of a sheet at its margin, unchanged; frames beside each other."""
    from vlprune.contact_sheet import GAP, LABEL, Entry

    red, blue = (Image.new("RGB", (50, 50), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    sheet = np.asarray(compose([Entry("a", [red], 1, 2), Entry("b", [blue], 1, 2)], [], "title", "", {"c": "no"}, 50))
    rows, columns = np.where((sheet == (250, 0, 0)).all(axis=2))
    assert (columns.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (MARGIN, 50, 50)
    assert np.where((sheet == (0, 0, 250)).all(axis=2))[1].min() == MARGIN + 50 + GAP
    sheet = np.asarray(compose([Entry("a", [red, blue], 1, 2)], ["0", "1"], "title", "", {}, 50))
    assert np.where((sheet == (250, 0, 0)).all(axis=2))[1].min() == MARGIN + LABEL
    assert np.where((sheet == (0, 0, 250)).all(axis=2))[1].min() == MARGIN + LABEL + 50 + GAP


def test_a_model_that_takes_no_videos_gets_pictures() -> None:
    """The frames of a clip one after another in one prompt."""
    from vlprune.loading import load_embedded

    given = subject(None, None, True, 6)
    two = Subject(given.name, given.pictures[:2], given.question, given.captions[:2])
    sheet = draw_sheet(load_embedded(), two, ["random"], 16, two.question, size=48)
    assert sheet.entries[0].count == "32 of 512"
    assert len(sheet.entries[0].panels) == 2
    with pytest.raises(OptionError, match="works on videos only"):
        draw_sheet(load_embedded(), two, ["evs"], 16, two.question, size=48)
