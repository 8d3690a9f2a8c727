"""Pictures show the right patches: pixels of kept ones are clear, those of dropped ones dim and grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlprune
from tests.tiny import families
from vlprune.draw import DIM, ROLE_COLOURS, draw_kept, side_by_side
from vlprune.errors import OptionError
from vlprune.tokens import VisualItem, raster_grid
from vlprune.trace import PointRecord


def record(kept: list[int], grid: torch.Tensor, point: str = "before_llm", roles: list[int] | None = None, modality: str = "image") -> PointRecord:
    item = VisualItem(0, torch.arange(len(grid)), modality, 0, grid)
    made = PointRecord(point, "test", len(grid))
    made.add(item, torch.tensor(kept), None if roles is None else torch.tensor(roles), ("anchor", "buffer", "register") if roles else ("kept",))
    return made


def picture(width: int = 80, height: int = 80) -> Image.Image:
    """Saturated orange, so that dim grey is easy to tell."""
    return Image.new("RGB", (width, height), (250, 120, 10))


def clear(drawn: Image.Image, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) bool: whether the middle of each patch kept its colour."""
    pixels = np.asarray(drawn).astype(int)
    y = ((np.arange(rows) + 0.5) * pixels.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.5) * pixels.shape[1] / columns).astype(int)
    middle = pixels[y][:, x]
    return middle[..., 0] - middle[..., 2] > 60


def bare(image: object, points: object, **options: object) -> Image.Image:
    return draw_kept(image, points, legend=False, title="", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "columns", "size"), [(4, 4, (80, 80)), (3, 5, (100, 60)), (16, 16, (128, 128)), (7, 2, (40, 140))])
def test_kept_patches_are_clear_and_the_others_dim(rows: int, columns: int, size: tuple[int, int]) -> None:
    """Square and rectangular grids, to the pixel of each patch's middle."""
    kept = [0, columns - 1, rows * columns // 2, rows * columns - 1]
    drawn = bare(picture(*size), record(sorted(set(kept)), raster_grid(1, rows, columns)), size=400)
    assert max(drawn.size) == 400
    assert abs(drawn.width / drawn.height - size[0] / size[1]) < 0.02
    expected = np.zeros(rows * columns, dtype=bool)
    expected[kept] = True
    assert np.array_equal(clear(drawn, rows, columns), expected.reshape(rows, columns))


def test_dropped_patches_are_grey() -> None:
    """No colour is left in them, and they are darker."""
    drawn = np.asarray(bare(picture(), record([0], raster_grid(1, 4, 4)), size=200)).astype(int)
    dropped = drawn[150, 150]
    assert dropped.max() - dropped.min() < 15
    assert dropped.max() < 250 * (DIM + 0.2)


def test_roles_colour_the_rims() -> None:
    """Anchor, buffer and register have outlines of their own colours."""
    drawn = np.asarray(bare(picture(), record([0, 5, 10], raster_grid(1, 4, 4), roles=[0, 1, 2]), size=400)).astype(int)
    for number, cell in enumerate([0, 1, 2]):
        edge = drawn[100 * cell + 50, 100 * cell + 1]
        wanted = np.array([int(ROLE_COLOURS[number][i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(edge - wanted).max() < 45


def test_stages_colour_by_where_a_token_left() -> None:
    """What stays to the end is clear; what left later is less dim than what left first."""
    grid = raster_grid(1, 2, 2)
    points = [record([0, 1, 2], grid, "llm:2"), record([0, 1], grid, "llm:4"), record([0], grid, "llm:6")]
    drawn = np.asarray(bare(picture(), points, size=200)).astype(int)
    stays, third, second, first = drawn[50, 50], drawn[50, 150], drawn[150, 50], drawn[150, 150]
    assert stays[0] > 220
    assert first.max() - first.min() < 15
    assert len({tuple(colour) for colour in (stays, third, second, first)}) == 4
    only_last = bare(picture(), points, by="role", size=200)
    assert np.array_equal(clear(only_last, 2, 2), [[True, False], [False, False]])


def test_legend_title_original_and_file(tmp_path: Path) -> None:
    """They add room, and the file holds the picture."""
    points = record([1, 2], raster_grid(1, 4, 4), roles=[0, 2])
    plain = bare(picture(), points, size=300)
    full = draw_kept(picture(), points, size=300, original=True, save=tmp_path / "new" / "kept.png")
    assert plain.size == (300, 300)
    assert full.width > 600
    assert full.height > 340
    with Image.open(tmp_path / "new" / "kept.png") as saved:
        assert saved.size == full.size
    assert side_by_side([plain, plain], gap=10).size == (610, 300)


def test_frames_of_a_video() -> None:
    """A contact sheet; frames that the model fused show their first one."""
    points = record([0, 7], raster_grid(2, 2, 2), modality="video")
    two = bare([picture(), picture()], points, size=100, columns=2)
    fused = bare([picture()] * 4, points, size=100, columns=2)
    assert two.size == fused.size
    left, right = two.crop((14, 14, 114, 114)), two.crop((124, 14, 224, 114))
    assert np.array_equal(clear(left, 2, 2), [[True, False], [False, False]])
    assert np.array_equal(clear(right, 2, 2), [[False, False], [False, True]])
    with pytest.raises(OptionError, match="tokens for 2 frames, but 3 pictures"):
        draw_kept([picture()] * 3, points)


def test_center_crop() -> None:
    """A model that looks at the middle square gets a square picture."""
    assert bare(picture(200, 100), record([0], raster_grid(1, 2, 2)), crop="center", size=120).size == (120, 120)
    assert bare(picture(200, 100), record([0], raster_grid(1, 2, 2)), size=120).size == (120, 60)


REAL = [("llava", "image"), ("llava_next", ("image", 2)), ("llava_onevision", "video"), ("qwen2_5_vl", ("image", 1)), ("qwen2_5_vl", "video")]


@pytest.mark.parametrize(("family", "part"), REAL)
def test_records_of_real_models(family: str, part: object) -> None:
    """Every family's grids can be drawn, tiles and newlines, merged patches and frames."""
    tiny = families()[family]
    model = tiny.build()
    with vlprune.apply(model, "hiprune", keep=0.4) as handle, torch.no_grad():
        model(**tiny.prompt([[3, part, 4]]))
        report = handle.report()
    item = report.points[0].items[0]
    assert item.grid is not None
    frames = int(item.grid[:, 0].max()) + 1
    drawn = draw_kept([picture()] * frames if item.modality == "video" else picture(), report)
    assert drawn.width > 200


def test_mistakes_are_told() -> None:
    """Each names what was given and what would do."""
    grid = raster_grid(1, 2, 2)
    with pytest.raises(OptionError, match="no pruning point to draw"):
        draw_kept(picture(), [])
    with pytest.raises(OptionError, match="items 0 to 0"):
        draw_kept(picture(), record([0], grid), item=3)
    with pytest.raises(OptionError, match="one image, but 2 pictures"):
        draw_kept([picture()] * 2, record([0], grid))
    with pytest.raises(OptionError, match="'auto', 'role' or 'stage'"):
        draw_kept(picture(), record([0], grid), by="colour")
    with pytest.raises(OptionError, match="'none' or 'center'"):
        draw_kept(picture(), record([0], grid), crop="left")
    blind = PointRecord("llm:1", "test", 4)
    blind.add(VisualItem(0, torch.arange(4)), torch.tensor([0]), None, ("kept",))
    with pytest.raises(OptionError, match="has no grid"):
        draw_kept(picture(), blind)
