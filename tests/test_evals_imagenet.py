"""The table of in-tower methods on a few made pictures and tiny random models: what is in it, what is resumed, what is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.torchvision_stub import why_not
from vlprune.adapter import find_adapter
from vlprune.method import MethodCard, PruningMethod, Stage

pytest.importorskip("PIL", reason="pictures are read with pillow")

from vlprune.evals import imagenet, imagenet_results
from vlprune.evals.command import options_in

NUMBER = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the shared one: an archive of pictures, not in order, and a tiny classifier for transformers."""
    why_not("timm")                                                      # before transformers looks for torchvision
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("data")
    archive = folder / imagenet.ARCHIVE
    archive.parent.mkdir()
    generator = torch.Generator().manual_seed(0)
    with tarfile.open(archive, "w:xz") as tar:
        for number in (3, 1, 0, 5, 4, 2):
            pixels = torch.randint(256, (8, 10 + number, 3), generator=generator, dtype=torch.uint8)
            picture = Image.frombytes("RGB", (10 + number, 8), pixels.numpy().tobytes()).resize((300 + 10 * number, 260), Image.Resampling.NEAREST)
            data = io.BytesIO()
            picture.save(data, "JPEG")
            entry = tarfile.TarInfo(f"sample/n{number:04d}.jpg")
            entry.size = len(data.getvalue())
            tar.addfile(entry, io.BytesIO(data.getvalue()))
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, image_size=224, patch_size=32, num_labels=NUMBER)
    model = ViTForImageClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 * parameter.flatten(1).shape[1] ** -0.5)
    model.save_pretrained(folder / imagenet.WEIGHTS["hf"])
    return folder


def call(data: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run it, and what is in the results file then."""
    imagenet.main(["--data", str(data), "--out", str(out), "--keep", "0.5", *more])
    return json.loads((out / "results.json").read_text())


def test_pictures_are_read_in_the_order_of_their_names(data: Path) -> None:
    pictures, labels = imagenet.load_pictures(data / imagenet.ARCHIVE)
    assert pictures.shape == (NUMBER, 3, 224, 224)
    assert labels.tolist() == list(range(NUMBER))
    some, numbers = imagenet.load_pictures(data / imagenet.ARCHIVE, 3)
    assert numbers.tolist() == [0, 2, 4]
    assert torch.equal(some, pictures[[0, 2, 4]])
    with pytest.raises(SystemExit, match="--data"):
        imagenet.load_pictures(data / "nothing.tar.xz")


def test_a_row_says_what_a_plain_run_gives(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    known = call(data, tmp_path, "--methods", "cls_attention,skipvit,patchdropout,dynamicvit,stts,hiprune")
    rows = known["rows"]
    assert [row["method"] for row in rows] == ["dense", "random", "random", "cls_attention", "skipvit"]
    assert set(known["left_out"]["hf"]) == {"patchdropout", "dynamicvit", "stts", "hiprune"}
    assert "trained predictors" in known["left_out"]["hf"]["dynamicvit"]
    by_name = {row["method"]: row for row in rows}
    assert by_name["cls_attention"]["patches"] == round(49 * 0.125)
    assert by_name["cls_attention"]["points"] == ["vision:4", "vision:7", "vision:10"]
    counts = [50] * 4 + [1 + round(49 * 0.5)] * 3 + [1 + round(49 * 0.25)] * 3 + [1 + round(49 * 0.125)] * 2
    assert by_name["cls_attention"]["tokens"] == pytest.approx(sum(counts) / 12)
    assert by_name["skipvit"]["patches"] == by_name["dense"]["patches"] == 49
    assert by_name["dense"]["tokens"] == 50
    assert 0 < by_name["cls_attention"]["flops_share"] < by_name["skipvit"]["flops_share"] < 1
    model, predict, _ = imagenet.load_model("hf", data / imagenet.WEIGHTS["hf"])
    pictures, labels = imagenet.load_pictures(data / imagenet.ARCHIVE)
    with torch.no_grad(), vlprune.apply(model, "skipvit", keep=0.5):
        classes = predict((pictures / 255 - 0.5) / 0.5).argmax(dim=-1)
    with torch.no_grad():
        dense = predict((pictures / 255 - 0.5) / 0.5).argmax(dim=-1)
    assert by_name["dense"]["classes"] == dense.tolist()
    assert by_name["skipvit"]["right"] == "".join(str(int(hit)) for hit in classes == labels)
    assert by_name["skipvit"]["agreement"] == pytest.approx(float((classes == dense).float().mean()))
    share = float((classes == labels).float().mean())
    assert by_name["skipvit"]["error"] == pytest.approx((share * (1 - share) / NUMBER) ** 0.5)
    text = capsys.readouterr().out
    assert "| 0.5 | cls_attention | vision:4, vision:7, vision:10 | 6 |" in text
    assert "- patchdropout left out: acts in training only" in text
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "results.json", "results.md", "plot.png"}


def test_parts_that_are_put_together_have_rows_too(data: Path) -> None:
    model, predict, _ = imagenet.load_model("hf", data / imagenet.WEIGHTS["hf"])
    plans, left_out = imagenet.make_plans(model, [0.5], None, {})
    names = [plan.name for plan in plans]
    assert names[-len(imagenet.PARTS) :] == list(imagenet.PARTS)
    assert {"cls_attention", "aclip", "skipvit"} <= set(names)
    assert not set(names) & set(left_out)
    pictures, _ = imagenet.load_pictures(data / imagenet.ARCHIVE, 2)
    for plan in plans[-len(imagenet.PARTS) :]:
        with vlprune.apply(model, plan.method) as handle, torch.no_grad():
            predict(imagenet.normalised(pictures))
            assert [record.visual_kept // 2 for record in handle.report().points] == [kept for _, kept, _ in plan.places(49)]


def test_every_tower_method_has_a_row_or_a_reason(data: Path) -> None:
    model, _, _ = imagenet.load_model("hf", data / imagenet.WEIGHTS["hf"])
    plans, left_out = imagenet.make_plans(model, [0.5], None, {})
    inside = [name for name in vlprune.list_methods() if any("vision" in point for point in vlprune.get_method(name).points)]
    assert set(inside) == ({plan.name for plan in plans} | set(left_out)) - set(imagenet.PARTS)


class Killed(Exception):
    """The process is gone."""


class Mortal:
    """A scorer that counts the pictures it sees and dies at the last one if told to."""

    needs = ()

    def __init__(self) -> None:
        self.seen, self.dies = 0, False

    def __call__(self, inputs: Any) -> Tensor:
        self.seen += inputs.tokens.shape[0]
        if self.dies and self.seen == NUMBER:
            raise Killed
        return inputs.tokens.float().norm(dim=-1)


def test_a_killed_run_goes_on_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "BATCH", 2)
    monkeypatch.setattr(imagenet_results, "plot", lambda results, path: None)
    scorer = Mortal()

    def build(facts: Any, keep: Any = 0.5) -> PruningMethod:
        return PruningMethod("mortal", (Stage(vlprune.VisionLayer(4), scorer, imagenet.TopK(), imagenet.Drop(), vlprune.Budget(keep)),))

    vlprune.register(MethodCard("mortal", build, "for this test", points=("vision:K",)))
    try:
        reference = call(data, tmp_path / "whole", "--methods", "mortal")["rows"]
        scorer.seen, scorer.dies = 0, True
        with pytest.raises(Killed):
            call(data, tmp_path / "killed", "--methods", "mortal")
        known = json.loads((tmp_path / "killed" / "results.json").read_text())["rows"]
        assert [row["method"] for row in known] == ["dense"]             # a random that belongs to nothing yet is not shown
        (begun,) = json.loads((tmp_path / "killed" / "partial.json").read_text()).values()
        assert len(begun) == 4
        scorer.seen, scorer.dies = 0, False
        rows = call(data, tmp_path / "killed", "--methods", "mortal")["rows"]
        assert scorer.seen == 2 + 2 * (imagenet.TIMED + 1)               # the batch that was missing, and the timed ones
    finally:
        vlprune.unregister("mortal")
    assert not (tmp_path / "killed" / "partial.json").exists()
    assert [(row["method"], row["right"], row["places"]) for row in rows] == [(row["method"], row["right"], row["places"]) for row in reference]


def test_a_run_killed_behind_its_last_batch_asks_for_no_more() -> None:
    found = [3, 1, 2]
    assert imagenet.classify(lambda pixels: pytest.fail("asked again"), torch.zeros(3, 3, 8, 8, dtype=torch.uint8), found, lambda: None).tolist() == [3, 1, 2]


def test_rows_are_used_again_unless_something_else_was_measured(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_results, "plot", lambda results, path: None)
    measured: list[str] = []
    original = imagenet.measure

    def noted(model: Any, predict: Any, methods: Any, *rest: Any) -> Any:
        measured.append(methods[0].name)
        return original(model, predict, methods, *rest)

    monkeypatch.setattr(imagenet, "measure", noted)
    call(data, tmp_path, "--methods", "skipvit")
    assert measured == ["random", "skipvit"]
    call(data, tmp_path, "--methods", "skipvit,cls_attention")
    assert measured == ["random", "skipvit", "random", "cls_attention"]
    call(data, tmp_path, "--methods", "skipvit", "--option", "skipvit.back=9")
    assert measured[4:] == ["random", "skipvit"]
    call(data, tmp_path, "--methods", "skipvit", "--limit", "3")
    assert measured[6:] == ["random", "skipvit"]
    assert "not comparable" in (tmp_path / "results.md").read_text()
    call(data, tmp_path, "--methods", "skipvit", "--limit", "3", "--fresh")
    assert measured[8:] == ["random", "skipvit"]


def test_differences_are_taken_picture_by_picture() -> None:
    one, two = {"right": "1101", "draws": 1}, {"right": "3012", "draws": 3}
    gap, error = imagenet_results.ahead(one, two)
    values = torch.tensor([0.0, 1.0, -1 / 3, 1 / 3])
    assert gap == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std(correction=0)) / 2)


def test_given_weights_are_measured_against_random_in_their_places(data: Path) -> None:
    model, predict, _ = imagenet.load_model("hf", data / imagenet.WEIGHTS["hf"])
    card = vlprune.get_method("dyt")
    (plan,), _ = imagenet.make_plans(model, [0.5], ["dyt"], {"dyt": dict(card.test_options)})
    pictures, _ = imagenet.load_pictures(data / imagenet.ARCHIVE, 2)
    places = []
    for method in (plan.method, plan.random(0)):
        with vlprune.apply(model, method) as handle, torch.no_grad():
            predict(imagenet.normalised(pictures))
            places.append([(record.point, record.visual_kept // 2) for record in handle.report().points])
    assert places[0] == places[1] == [(f"vision_mlp:{block}", 24) for block in range(find_adapter(model).facts.vision_layers)]


def test_timm_takes_the_same_road(data: Path, tmp_path: Path) -> None:
    if why_not("timm"):
        pytest.skip(str(why_not("timm")))
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=NUMBER).state_dict(), tmp_path / "w.safetensors")
    rows = call(data, tmp_path / "out", "--library", "timm", "--weights", str(tmp_path / "w.safetensors"), "--methods", "cls_attention", "--limit", "2")["rows"]
    assert [(row["library"], row["method"], row["patches"]) for row in rows] == [("timm", "dense", 196), ("timm", "random", 24), ("timm", "cls_attention", 24)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--library", "jax"], "timm or hf"),
        (["--library", "timm,hf", "--weights", "x"], "without --weights"),
        (["--option", "dyt=3"], "METHOD.KEY=VALUE"),
    ],
)
def test_wrong_arguments_say_what_would_do(arguments: list[str], match: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=match):
        call(data, tmp_path, *arguments)


def test_options_are_json_where_they_can_be() -> None:
    assert options_in(["a.b=[1, 2]", "a.c=x.safetensors"]) == {"a": {"b": [1, 2], "c": "x.safetensors"}}
