"""Tuning: never worse than the default, goes on after a kill as if nothing had happened, and the plan scores what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlprune
from tests.tiny import families
from vlprune.agreement import Agreement
from vlprune.api import build_method
from vlprune.cli import app, parse_keep
from vlprune.errors import AlreadyAppliedError, OptionError, UnknownNameError
from vlprune.method import MethodCard, ModelFacts
from vlprune.samples import digit_samples, read_samples
from vlprune.tune import measure, tune

pytest.importorskip("optuna")
CARD: MethodCard = vlprune.get_method("vflowopt")
FAMILY = families()["llava"]
KEEP, TRIALS = 0.4, 14                   # more than are drawn at random, so that TPE's own are compared, too


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.build()


def inputs(count: int = 3) -> list[dict[str, Any]]:
    return [FAMILY.prompt([[4, "image", 5]], seed=seed) for seed in range(count)]


def search(model: Any, out: Path | None = None, trials: int = TRIALS, card: MethodCard = CARD, **options: Any) -> Any:
    return tune(model, inputs(), card, KEEP, trials=trials, out=out, progress=False, **options)


def test_agreement_by_hand(model: Any) -> None:
    """Cosine of the states that the head gets, and KL of what it makes of them; both against formulas written out."""
    samples = inputs()

    def last(sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = model(**sample, output_hidden_states=True)
        return out.hidden_states[-1][0, -1], out.logits[0, -1]

    dense = [last(sample) for sample in samples]
    cosine, kl = Agreement(model, samples), Agreement(model, samples, "kl")
    assert cosine.score() == pytest.approx(1.0, abs=1e-6)
    assert kl.score() == pytest.approx(0.0, abs=1e-6)
    with vlprune.apply(model, "random", keep=0.3):
        pruned = [last(sample) for sample in samples]
        wanted = [float(a @ b / a.norm() / b.norm()) for (a, _), (b, _) in zip(dense, pruned, strict=True)]
        assert cosine.score() == pytest.approx(sum(wanted) / 3, abs=1e-5)
        assert min(wanted) < 0.999
        shares = [(a.softmax(0), b.softmax(0)) for (_, a), (_, b) in zip(dense, pruned, strict=True)]
        assert kl.score() == pytest.approx(-sum(float((p * (p / q).log()).sum()) for p, q in shares) / 3, abs=1e-5)
    batch = [FAMILY.prompt([[4, "image", 5], [9, "image", 2]])]
    alone = [FAMILY.prompt([row], row_numbers=[number]) for number, row in enumerate([[4, "image", 5], [9, "image", 2]])]
    both, single = Agreement(model, batch), Agreement(model, alone)
    with vlprune.apply(model, CARD, KEEP, t=1.2):
        assert both.score() == pytest.approx(single.score(), abs=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_agreement_says_what_is_wrong(model: Any) -> None:
    for samples, objective, says in (([], "cosine", "no samples"), (inputs(), "accuracy", "one of cosine, kl")):
        with pytest.raises(OptionError, match=says):
            Agreement(model, samples, objective)
    with pytest.raises(OptionError, match="pad on the left"):
        Agreement(model, [FAMILY.prompt([[4, "image", 5], [9, "image", 2]], padding="right")])
    with pytest.raises(OptionError, match=r"model.eval\(\)"):
        Agreement(FAMILY.build().train(), inputs())


@pytest.mark.parametrize("objective", ["cosine", "kl"])
def test_the_plan_scores_what_it_says_and_beats_the_default(model: Any, tmp_path: Path, objective: str) -> None:
    out = tmp_path / "plan.json"
    plan = search(model, out, objective=objective)
    agreement = Agreement(model, inputs(), objective)
    default, found = measure(agreement, CARD, KEEP, {}), measure(agreement, CARD, plan.keep, plan.options)
    assert plan.found["default"] == default
    assert plan.found["score"] == found
    assert found is not None
    assert default is not None
    assert found > default                                              # so it is not the default that was written
    with vlprune.apply(model, plan=out):
        assert agreement.score() == found
    assert not vlprune.apply(model, "dense").remove()


def test_same_average_as_the_default(model: Any) -> None:
    """The search may not buy agreement with more tokens: the average over layers stays ``keep``."""
    plan = search(model)
    stages = build_method(CARD, ModelFacts(4, 4, 2), plan.keep, {})[0].stages
    edges = [0, *(stage.point.layer for stage in stages[1:]), 4]
    shares = [stage.budget.keep for stage in stages]
    assert sum(share * (after - before) / 4 for share, before, after in zip(shares, edges, edges[1:], strict=False)) == pytest.approx(KEEP)
    assert shares == sorted(shares, reverse=True)


def test_nothing_better_is_the_default(model: Any, tmp_path: Path) -> None:
    """Worse numbers, refused ones and none at all: the plan holds the default, and says how many had no value."""
    turn = iter(range(100))

    def hopeless(facts: ModelFacts, keep: float, suggest: Any) -> Any:
        x, number = suggest("x", 0.0, 1.0), next(turn) % 3
        return None if number == 0 else (keep, {"cell": x - 2}) if number == 1 else (0.03, {})

    plan = search(model, tmp_path / "plan.json", 6, replace(CARD, search=hopeless))
    assert (plan.keep, plan.options) == (KEEP, {})
    assert plan.found["score"] == plan.found["default"]
    assert (plan.found["trials"], plan.found["refused"]) == (6, 4)


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import tests.test_tune as this
seen = []
def search(facts, keep, suggest):
    numbers = this.CARD.search(facts, keep, suggest)
    seen.append(1)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers
this.search(this.FAMILY.build(), Path(sys.argv[1]), card=replace(this.CARD, search=search))
"""


def test_killed_and_started_again_ends_where_it_would_have(model: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of a trial; the rest is run here. The plan is that of a search in one go."""
    out = tmp_path / "plan.json"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), "5"], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    drawn = []

    def counted(facts: ModelFacts, keep: float, suggest: Any) -> Any:
        assert CARD.search is not None
        drawn.append(CARD.search(facts, keep, suggest))
        return drawn[-1]

    resumed = search(model, out, card=replace(CARD, search=counted))
    assert len(drawn) == TRIALS - 4 + 1                                  # four were finished; the best is looked up once more
    in_one_go = search(model)
    assert resumed == in_one_go
    assert drawn[-1] == (in_one_go.keep, in_one_go.options)


def test_finished_goes_on_with_more_and_refuses_another_search(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    few = search(model, out, 3)
    assert search(model, out, 3) == few                                  # nothing is left to do
    more = search(model, out, 5)
    assert more.found["trials"] == 5
    assert more.found["score"] >= few.found["score"]
    for change, says in (({"seed": 1}, "seed 0, not 1"), ({"objective": "kl"}, "objective 'cosine', not 'kl'")):
        with pytest.raises(OptionError, match=says):
            search(model, out, 3, **change)
    with pytest.raises(OptionError, match=r"keep 0\.4, not 0\.5"):
        tune(model, inputs(), CARD, 0.5, trials=3, out=out, progress=False)
    with pytest.raises(OptionError, match="samples '"):
        tune(model, inputs(2), CARD, KEEP, trials=3, out=out, progress=False)
    with pytest.raises(OptionError, match=r"its default has 0\..* \(other weights"):
        search(FAMILY.build(seed=1), out, 3)


def test_mistakes(model: Any) -> None:
    for options, says in (({"method": "fastv"}, "these have: ftp, vflowopt"), ({"keep": 10}, "between 0 and 1"), ({"keep": 1.0}, "between 0 and 1")):
        with pytest.raises(OptionError, match=says):
            tune(model, inputs(), **{"method": "vflowopt", "progress": False, **options})
    with pytest.raises(OptionError, match="trials=0"):
        search(model, trials=0)
    with pytest.raises(UnknownNameError, match="vflowopt"):
        tune(model, inputs(), "vflowop")
    with vlprune.apply(model, "random"), pytest.raises(AlreadyAppliedError):
        search(model)


def test_search_space_meets_the_average_at_any_depth() -> None:
    """Corners and middles of the ranges, for every number of stages."""
    for depth in (1, 2, 3, 4, 10, 28, 32):
        facts = ModelFacts(depth, 4, 2, signals=frozenset({"pixels"}))
        for keep in (0.05, 0.25, 1 / 3, 0.9):
            met = 0
            for place in (0.0, 0.25, 0.5, 0.99):
                numbers = CARD.search(facts, keep, lambda name, low, high, place=place: low + place * (high - low))  # type: ignore[misc]
                if numbers is None:
                    continue
                met += 1
                shares, options = numbers
                assert set(options) == {"t", "cell", "alpha"}
                stages = CARD.build(facts, shares, **options).stages
                edges = [0, *(stage.point.layer for stage in stages[1:]), depth]
                assert math.isclose(sum(s * (b - a) / depth for s, a, b in zip(shares, edges, edges[1:], strict=False)), keep, rel_tol=1e-9)
            assert met > 1


def test_samples(tmp_path: Path) -> None:
    """Folders and lists, evenly spread; wrong ones are told with their line."""
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [sample.pictures[0].name for sample in read_samples(tmp_path, "what ?", 3)] == ["0.png", "2.png", "4.png"]
    assert len(read_samples(tmp_path, "what ?", 30)) == 6
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"image": "1.png", "question": "how many ?", "id": 7}\n\n{"images": ["0.png", "2.png"]}\n{"video": "a.mp4"}\n')
    one, two, three = read_samples(listed, "what ?", 30)
    assert (one.question, one.pictures, two.question, len(two.pictures), three.video) == (
        "how many ?", (tmp_path / "1.png",), "what ?", 2, tmp_path / "a.mp4",
    )  # fmt: skip
    wrong = {"{": ":1 is no JSON", '{"image": "a"}\n{"picture": "a"}': ":2: an object with one of", "\n": "is empty", '{"images": "a"}': "list of files"}
    for content, says in wrong.items():
        listed.write_text(content)
        with pytest.raises(OptionError, match=says):
            read_samples(listed, "what ?", 30)
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "empty", "no picture or video"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(OptionError, match=says):
            read_samples(path, "what ?", 30)
    scenes = digit_samples(4)
    assert len({sample.question for sample in scenes}) > 1
    assert scenes[0].pictures[0].tobytes() == digit_samples(1)[0].pictures[0].tobytes()


def test_command(tmp_path: Path) -> None:
    """With the embedded model; the plan it writes can be put on. Mistakes are one line."""
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["tune", "--keep", "1/3", "--trials", "2", "--most", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "cosine over 2 samples: default 0." in result.stdout
    assert "2/2" in result.stderr
    from vlprune.loading import load_embedded

    with vlprune.apply(load_embedded().model, plan=out) as handle:
        assert handle.method.name == "vflowopt"
    for arguments, says in (("--method fastv", "these have: ftp, vflowopt"), ("--model x", "give --samples"), ("--samples nowhere", "no such folder")):
        result = CliRunner().invoke(app, ["tune", *arguments.split()])
        assert result.exit_code == 2
        assert says in result.stderr


def test_fractions_on_the_command_line() -> None:
    assert parse_keep("1/3") == 1 / 3
    assert parse_keep("1/2,1/4") == [0.5, 0.25]
    assert parse_keep("1/0") == "1/0"
    assert type(parse_keep("64")) is int
