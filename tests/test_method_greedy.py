"""Greedy selection and its methods: DivPrune, ZOO-Prune, CDPruner; DART; the projector's sensitivity. Worked out by hand or by plain loops."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vlprune
from tests.tiny import families
from vlprune.adapters._projector import sensitivity
from vlprune.errors import MissingSignalError, OptionError
from vlprune.kernels import greedy, greedy_triton
from vlprune.kernels import sensitivity as sensitivity_kernel
from vlprune.kernels.greedy import ISOLATED, Determinantal, MaxMin, MaxSum, Weighted, greedy_select, greedy_select_anew, uses_gram
from vlprune.kernels.groups import group_spans, shared_quotas
from vlprune.kernels.sensitivity import central_differences, mlp_sensitivity, projector_sensitivity
from vlprune.method import ModelFacts
from vlprune.methods.cdpruner import cdpruner
from vlprune.methods.dart import dart
from vlprune.methods.divprune import divprune
from vlprune.methods.zoo_prune import zoo_prune
from vlprune.protocols import ScoreInputs, Selection, Tap
from vlprune.scorers import SignalScore
from vlprune.scorers.relevance import TEXT, Relevance
from vlprune.scorers.scaled import Scaled
from vlprune.selectors.greedy import Greedy
from vlprune.selectors.unlike_pivots import UnlikePivots
from vlprune.tokens import raster_grid

ROOT = Path(__file__).parent.parent
RULES: dict[str, Any] = {"maxsum": MaxSum(), "maxmin": MaxMin(), "weighted": Weighted(), "determinantal": Determinantal()}
FACTS = ModelFacts(32, 24, 22, tuple(range(24)), True)
SIGNAL = Tap("sensitivity", 0, ("closed",))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def cloud(items: int, tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and worth."""
    generator = seeded(seed)
    return torch.randn(items, tokens, width, generator=generator), 0.1 + torch.rand(items, tokens, generator=generator)


def loop(features: torch.Tensor, worth: torch.Tensor, num_keep: int, rule: str, first: int) -> list[int]:
    """One item in double precision, every gain from its definition."""
    unit = nn.functional.normalize(features.double(), dim=-1)
    cosine, worth = unit @ unit.T, worth.double()
    kernel = worth[:, None] * worth * cosine
    picks = [first]

    def gain(token: int) -> float:
        near = cosine[token, picks]
        if rule == "maxsum":
            return -float(near.sum())
        if rule == "determinantal":
            among = [*picks, token]
            return float(torch.linalg.det(kernel[among][:, among]))
        return float((1 - near).min() * (worth[token] if rule == "weighted" else 1))

    while len(picks) < num_keep:
        picks.append(max((token for token in range(len(features)) if token not in picks), key=gain))
    return picks


class Watch(TorchDispatchMode):
    """Notes what would make the host wait, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1:2])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
            self.waits.append(name)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


# the kernel


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tokens", "num_keep", "width"), [(7, 7, 9), (40, 12, 16), (70, 5, 32), (150, 8, 12)])
def test_picks_are_those_of_the_definition(rule: str, tokens: int, num_keep: int, width: int) -> None:
    """With and without a Gram matrix: 5 of 70 and 8 of 150 go row by row."""
    assert uses_gram(tokens, num_keep, width) == (tokens < 70)
    features, worth = cloud(3, tokens, width, tokens)
    picks = greedy_select(features, num_keep, RULES[rule], torch.tensor([0, tokens - 1, 2]), weights=worth)
    assert picks.tolist() == [loop(features[item], worth[item], num_keep, rule, first) for item, first in enumerate((0, tokens - 1, 2))]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tokens", "num_keep"), [(500, 120), (900, 40)])
def test_picks_equal_the_loop_that_computes_similarities_anew(rule: str, tokens: int, num_keep: int, everything: bool) -> None:
    features, worth = cloud(1, tokens, 160, 5)
    first = torch.tensor([3])
    expected = greedy_select_anew(features, num_keep, RULES[rule], first, weights=worth, everything=everything)
    assert torch.equal(greedy_select(features, num_keep, RULES[rule], first, weights=worth), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tokens", "num_keep", "width", "panels"), [(37, 11, 5, 1), (203, 60, 33, 3), (203, 9, 33, 1), (450, 90, 64, 1), (450, 90, 64, 4)])
def test_an_item_has_the_same_bits_in_any_batch(rule: str, tokens: int, num_keep: int, width: int, panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains are compared exactly: many tokens are near copies, so that another rounding would pick others."""
    monkeypatch.setattr(greedy, "PRODUCTS", ((0, panels),))
    features, worth = cloud(5, tokens, width, 9)
    features[:, tokens // 2 :] = features[:, : tokens - tokens // 2] * (1 + 1e-6)
    together = greedy_select(features, num_keep, RULES[rule], weights=worth)
    for item in range(5):
        assert torch.equal(greedy_select(features[item : item + 1], num_keep, RULES[rule], weights=worth[item : item + 1])[0], together[item])
        assert torch.equal(greedy_select(features[item:], num_keep, RULES[rule], weights=worth[item:])[0], together[item])


@pytest.mark.parametrize("panels", [1, 2, 4, 6])
@pytest.mark.parametrize("tokens", [5, 33, 192, 401])
def test_gram_matrix_is_whole_and_symmetric(tokens: int, panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "PRODUCTS", ((0, panels),))
    unit = nn.functional.normalize(cloud(1, tokens, 48)[0][0], dim=-1)
    with FlopCounterMode(display=False) as counter:
        gram = greedy.gram_matrix(unit)
    torch.testing.assert_close(gram, unit @ unit.T, rtol=0, atol=2e-6)
    if panels > 1:
        height = -(-tokens // (16 * panels)) * 16
        assert all(torch.equal(gram[low : low + height, low + height :], gram[low + height :, low : low + height].T) for low in range(0, tokens, height))
        assert tokens < 192 or counter.get_total_flops() < 1.1 * (1 + 1 / panels) * tokens * tokens * 48


def test_a_gram_matrix_serves_where_it_pays() -> None:
    assert uses_gram(2880, 640, 4096)
    assert uses_gram(2880, 144, 4096)
    assert not uses_gram(2880, 143, 4096)
    assert uses_gram(1600, 200, 1024)
    assert not uses_gram(1600, 178, 1024)
    assert uses_gram(2880, 1, 4096, cuda=True)
    assert uses_gram(2880, 1, 4096, all_pairs=True)
    assert not uses_gram(8193, 8000, 4096, cuda=True)


def test_items_wait_for_each_other_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    features, worth = cloud(5, 60, 16)
    groups = (torch.arange(60) % 2).expand(5, -1)
    options: dict[str, Any] = {"weights": worth, "groups": groups, "quota": torch.full_like(groups, 10)}
    for first in (None, ISOLATED, torch.arange(5)):
        expected = greedy_select(features, 20, Weighted(), first, **options)
        for room in (60 * 60 * 4 * 2, 60 * 60 * 4):
            with monkeypatch.context() as patch:
                patch.setattr(greedy, "GRAM_BYTES", room)
                assert torch.equal(greedy_select(features, 20, Weighted(), first, **options), expected)
        with monkeypatch.context() as patch:
            patch.setattr(greedy, "GRAM_BYTES", 100)                    # not even one: row by row
            assert torch.equal(greedy_select(features, 20, Weighted(), first, **options), expected)


@pytest.mark.parametrize("rule", RULES)
def test_groups_pick_as_if_alone(rule: str) -> None:
    features, worth = cloud(2, 90, 24, 4)
    groups = torch.tensor([0] * 40 + [3] * 20 + [1] * 30).expand(2, -1)
    quota = torch.tensor([6] * 40 + [0] * 20 + [9] * 30).expand(2, -1)
    picks = greedy_select(features, 15, RULES[rule], weights=worth, groups=groups, quota=quota)
    for number, count in ((0, 6), (1, 9)):
        inside = (groups[0] == number).nonzero().flatten()
        alone = inside[greedy_select(features[:, inside], count, RULES[rule], weights=worth[:, inside])]
        mine = [[pick for pick in row if pick in inside] for row in picks.tolist()]
        assert mine == alone.tolist()


def test_the_most_isolated_token_by_hand() -> None:
    angles = torch.tensor([0.0, 15.0, 100.0, 250.0, 270.0]).deg2rad()
    fan = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    assert greedy_select(fan, 3, MaxMin(), ISOLATED).tolist() == [[2, 4, 0]]      # 100 is 85 away from any other; 270 is 170 from it; then 0 is 90 from both
    several = cloud(3, 600, 8)[0]
    cosine = nn.functional.normalize(several, dim=-1) @ nn.functional.normalize(several, dim=-1).mT
    nearest = (cosine - 9 * torch.eye(600)).amax(dim=-1)
    assert torch.equal(greedy_select(several, 2, MaxMin(), ISOLATED)[:, 0], nearest.argmin(dim=-1))


@pytest.mark.parametrize("first", [None, ISOLATED])
@pytest.mark.parametrize("rule", RULES)
def test_degenerate_tokens_still_give_k_different_ones(rule: str, first: str | None) -> None:
    """Zero vectors, exact copies, worth of zero, more picks than the space has directions."""
    generator = seeded(3)
    features = torch.randn(2, 30, 3, generator=generator)
    features[:, 5:9] = 0
    features[:, 10:20] = features[:, 9:10]
    worth = torch.rand(2, 30, generator=generator)
    worth[:, ::4] = 0
    for weights in (None, worth, torch.zeros_like(worth)):
        for num_keep in (1, 2, 12, 29, 30):
            picks = greedy_select(features, num_keep, RULES[rule], first, weights=weights)
            assert [len(set(row)) for row in picks.tolist()] == [num_keep] * 2
    assert greedy_select(features, 0, RULES[rule], first).shape == (2, 0)
    assert greedy_select(features[:0], 3, RULES[rule], first).shape == (0, 3)


def test_what_comes_after_the_space_is_spanned_goes_by_worth() -> None:
    """Three directions of full rank are picked; then every determinant is 0."""
    features, worth = cloud(1, 12, 3, 1)
    picks = greedy_select(features, 12, Determinantal(), weights=worth)[0]
    rest = worth[0, picks[3:]]
    assert torch.equal(rest, rest.sort(descending=True).values)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_keep", [20, 100])
def test_nothing_is_read_back_and_no_matrix_is_made_for_few_tokens(rule: str, num_keep: int) -> None:
    features, worth = cloud(2, 512, 16)
    groups = (torch.arange(512) % 2).expand(2, -1)
    for options in ({}, {"groups": groups, "quota": torch.full_like(groups, num_keep // 2)}):
        with Watch() as watch:
            greedy_select(features, num_keep, RULES[rule], weights=worth, **options)
        assert watch.waits == []
    assert (watch.largest >= 512 * 512) == (num_keep == 100)


def products(num_keep: int, rule: Any = MaxMin(), anew: bool = False, tokens: int = 600) -> int:  # noqa: B008
    """Multiplications and additions inside matrix products."""
    features, worth = cloud(1, tokens, 64)
    with FlopCounterMode(display=False) as counter:
        if anew:
            greedy_select_anew(features, num_keep, rule, torch.tensor([0]), weights=worth, everything=True)
        else:
            greedy_select(features, num_keep, rule, torch.tensor([0]), weights=worth)
    return counter.get_total_flops()


def test_cost_grows_with_k_at_most_and_not_at_all_with_a_gram_matrix() -> None:
    """The work, which does not depend on what else the machine does; times are `vlprune bench --parts`'s."""
    row = 2 * 600 * 64
    assert products(20) == 19 * row
    assert products(40) == 39 * row
    assert products(90) == products(200) == products(600) == 600 * row
    assert products(40, anew=True) > 19 * products(40)


def test_float16_tokens_are_compared_in_float32_also_under_autocast() -> None:
    features = cloud(2, 64, 24)[0].half()
    plain = greedy_select(features.float(), 20, MaxSum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(greedy_select(features, 20, MaxSum()), plain)


# Triton


INTERPRETED = """
import torch
from vlprune.kernels import greedy_triton
from vlprune.kernels.greedy import Determinantal, MaxMin, MaxSum, Problem, Weighted, _pick, _unit_length, gram_matrix
generator = torch.Generator().manual_seed(0)
for items, tokens, width, count in ((1, 5, 3, 5), (3, 70, 24, 30)):
    features, worth = torch.randn(items, tokens, width, generator=generator), torch.rand(items, tokens, generator=generator)
    unit, own = _unit_length(features)
    gram = torch.stack([gram_matrix(item) for item in unit])
    groups = (torch.arange(tokens) % 2).expand(items, -1)
    quota = torch.where(groups == 0, count - count // 2, count // 2)
    first = torch.arange(items) * 2
    for rule in (MaxSum(), MaxMin(), Weighted(), Determinantal()):
        assert greedy_triton.usable(rule)
        for problem in (Problem(own, worth, None, None), Problem(own, worth, groups, quota)):
            assert torch.equal(_pick(unit, gram, problem, count, rule, first), greedy_triton.greedy_loop(gram, problem, count, rule, first))
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlprune.kernels.greedy_loop import greedy_kernel
types = dict(gram="*fp32", own="*fp32", weights="*fp32", groups="*i32", quotas="*i32", first="*i64", factor="*fp32", picks="*i64")
types.update(count="i32", num_keep="i32", spent="fp32", RULE="constexpr", GROUPED="constexpr", BLOCK="constexpr")
for rule in range(4):
    source = ASTSource(greedy_kernel, signature=types, constexprs={"RULE": rule, "GROUPED": True, "BLOCK": 4096})
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 16}).asm["cubin"]
print("compiled")
"""


@pytest.mark.parametrize(("code", "interpret", "word"), [(INTERPRETED, "1", "equal"), (COMPILED, "0", "compiled")], ids=["interpreted", "compiled"])
def test_the_one_launch_loop(code: str, interpret: str, word: str) -> None:
    """In Triton's interpreter it picks as torch does; its compiler accepts it for a GPU that is not here."""
    pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch for CUDA)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": interpret})
    assert word in done.stdout, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_on_cuda(rule: str) -> None:
    features, worth = (x.cuda() for x in cloud(2, 700, 64))
    one_launch = greedy_select(features, 100, RULES[rule], weights=worth)
    expected = greedy_select(features.cpu(), 100, RULES[rule], weights=worth.cpu())
    assert torch.equal(one_launch.cpu(), expected)


def test_without_triton_or_a_kernel_the_loop_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(MaxSum):
        """A rule of somebody else's."""

    assert not greedy_triton.usable(Other())

    def missing(name: str) -> Any:
        raise ImportError(name)

    greedy_triton.kernel.cache_clear()
    monkeypatch.setattr(greedy_triton.importlib, "import_module", missing)
    try:
        assert not any(greedy_triton.usable(rule) for rule in RULES.values())
    finally:
        greedy_triton.kernel.cache_clear()


def test_triton_is_not_imported_before_it_is_used() -> None:
    code = "import sys, vlprune.kernels.greedy; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


# groups


def test_quotas_are_the_largest_remainders() -> None:
    generator = seeded(8)
    for _ in range(60):
        tokens = int(torch.randint(1, 40, (), generator=generator))
        group = torch.randint(-1, 5, (3, tokens), generator=generator)
        num_keep = int(torch.randint(0, tokens + 1, (), generator=generator))
        quota = shared_quotas(group, group >= 0, num_keep)
        start, size = group_spans(group)
        for row in range(3):
            members = group[row].tolist()
            sizes = {number: members.count(number) for number in sorted(set(members) - {-1})}
            shared = min(num_keep, sum(sizes.values()))
            exact = {number: divmod(shared * size, sum(sizes.values())) for number, size in sizes.items()}
            counts = {number: whole for number, (whole, _) in exact.items()}
            for number in sorted(sizes, key=lambda number: (-exact[number][1], number))[: shared - sum(counts.values())]:
                counts[number] += 1
            counts[-1] = num_keep - shared
            assert quota[row].tolist() == [counts[number] for number in members]
            assert sum(count for number, count in counts.items() if number in members) == num_keep
            assert start[row].tolist() == [sum(other < number for other in members) for number in members]
            assert size[row].tolist() == [members.count(number) for number in members]
        order = torch.randperm(tokens, generator=generator)
        assert torch.equal(shared_quotas(group[:, order], group[:, order] >= 0, num_keep), quota[:, order])


# sensitivity


def mlp(act: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), act or nn.GELU(), nn.Linear(20, 16))


def jacobian_sizes(module: nn.Module, features: torch.Tensor) -> torch.Tensor:
    jacobians = torch.func.vmap(torch.func.jacrev(module))(features.flatten(0, 1))
    return (jacobians.flatten(1).norm(dim=1) / features.shape[-1] ** 0.5).reshape(features.shape[:2])


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Identity()], ids=str)
def test_the_closed_form_is_the_size_of_the_jacobian(act: nn.Module) -> None:
    module, features = mlp(act), torch.randn(2, 9, 12, generator=seeded(1))
    found, flops = sensitivity(module, features, ("closed",))
    torch.testing.assert_close(found, jacobian_sizes(module, features))
    assert not found.requires_grad
    assert flops > 0
    with torch.inference_mode():
        assert torch.equal(sensitivity(module, features + 0, ("closed",))[0], found)


def test_many_directions_come_to_the_closed_form_in_rank_and_nearly_in_size() -> None:
    module, features = mlp(), torch.randn(2, 40, 12, generator=seeded(1))
    exact = sensitivity(module, features, ("closed",))[0]
    drawn = projector_sensitivity(module, features, 4000, 0.01, 0)
    ratio = drawn / exact                                                # a mean of sizes is below the root of the mean square
    assert 0.85 < float(ratio.min()) <= float(ratio.max()) < 1.0
    ranks = torch.stack([x[0].argsort().argsort().double() for x in (exact, drawn)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99


def test_the_estimate_steps_along_directions_of_length_one() -> None:
    """A linear projector moves by its column whatever the step."""
    weight = torch.randn(5, 3, generator=seeded(2))
    found = central_differences(lambda x: x @ weight.T, torch.randn(1, 4, 3), 7 * torch.eye(3)[:2], 0.5)
    torch.testing.assert_close(found, weight[:, :2].norm(dim=0).mean().expand(1, 4))


def test_the_estimate_is_seeded_and_takes_any_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 8))
    features = torch.randn(3, 30, 12, generator=seeded(1))
    found = sensitivity(module, features, ("monte_carlo", 64, 0.01, 3))[0]
    assert torch.equal(found, sensitivity(module, features, ("monte_carlo", 64, 0.01, 3))[0])
    assert not torch.equal(found, sensitivity(module, features, ("monte_carlo", 64, 0.01, 4))[0])
    with pytest.raises(MissingSignalError, match="monte_carlo"):
        sensitivity(module, features, ("closed",))
    half = sensitivity(module.half(), features.half(), ("monte_carlo", 64, 0.01, 3))[0]
    assert half.dtype == torch.float32
    assert module[1].weight.dtype == torch.float16
    torch.testing.assert_close(half, found, rtol=2e-2, atol=0)           # weights were rounded once, steps were not
    monkeypatch.setattr(sensitivity_kernel, "CHUNK", 1)
    torch.testing.assert_close(sensitivity(module.float(), features, ("monte_carlo", 64, 0.01, 3))[0], found, rtol=2e-2, atol=0)


@pytest.mark.parametrize("options", [("closed",), ("monte_carlo", 8, 0.01, 0)], ids=str)
def test_sensitivity_has_the_same_bits_in_any_batch(options: tuple[Any, ...]) -> None:
    module, features = mlp(), torch.randn(4, 13, 12, generator=seeded(1))
    together = sensitivity(module, features, options)[0]
    for item in range(4):
        assert torch.equal(sensitivity(module, features[item : item + 1], options)[0][0], together[item])


def test_what_is_known_of_the_weights_is_made_anew_when_they_change() -> None:
    module, features = mlp(), torch.randn(1, 6, 12, generator=seeded(1))
    before = sensitivity(module, features, ("closed",))[0]
    assert len(sensitivity_kernel._known) >= 1
    with FlopCounterMode(display=False) as counter:
        mlp_sensitivity(module[0].weight, module[0].bias, module[2].weight, torch.cos, features)
    assert counter.get_total_flops() == 2 * 6 * (12 * 20 + 20 * 20)      # not the weights' own products again
    with torch.no_grad():
        module[2].weight.mul_(2)
    torch.testing.assert_close(sensitivity(module, features, ("closed",))[0], 2 * before)
    module[2] = nn.Linear(20, 7)
    torch.testing.assert_close(sensitivity(module, features, ("closed",))[0], jacobian_sizes(module, features))
    known = len(sensitivity_kernel._known)
    del module
    assert len(sensitivity_kernel._known) < known


def test_closed_form_without_a_bias() -> None:
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
    features = torch.randn(1, 5, 4, generator=seeded(1))
    found = mlp_sensitivity(first.weight, None, second.weight, lambda x: 1 - x.tanh().square(), features)
    torch.testing.assert_close(found, jacobian_sizes(nn.Sequential(first, nn.Tanh(), second), features))


# ZOO-Prune


def scored(scores: torch.Tensor, tokens: torch.Tensor, num_keep: int, grid: torch.Tensor | None, tap: Tap = SIGNAL) -> ScoreInputs:
    return ScoreInputs(tokens, num_keep, None if grid is None else grid.expand(tokens.shape[0], -1, -1), signals={tap: scores})


def choose(stage: Any, inputs: ScoreInputs) -> Selection:
    return stage.selector(stage.scorer(inputs).float(), inputs)  # type: ignore[no-any-return]


def newlines(frames: int, rows: int, columns: int) -> torch.Tensor:
    """(N, 3) with a separator behind each row."""
    grid = [(frame, row, column) for frame in range(frames) for row in range(rows) for column in range(columns + 1)]
    return torch.tensor([(frame, row, column) if column < columns else (frame, -1, -1) for frame, row, column in grid])


def test_scaling_by_hand() -> None:
    grid = newlines(2, 1, 3)
    scores = torch.tensor([[1.0, 3.0, 2.0, -50.0, 7.0, 7.0, 7.0, -50.0]])
    inputs = scored(scores, torch.zeros(1, 8, 2), 4, grid)
    alone = Scaled(SignalScore(SIGNAL), apart=True)(inputs)
    torch.testing.assert_close(alone, torch.tensor([[0, 1, 0.5, 0, 1, 1, 1, 0]]))
    torch.testing.assert_close(Scaled(SignalScore(SIGNAL))(inputs), torch.tensor([[0, 1 / 3, 1 / 6, 0, 1, 1, 1, 0]]))
    lifted = Scaled(SignalScore(SIGNAL), lift=0.5, eps=1.0)(dataclasses.replace(inputs, grid=None))
    torch.testing.assert_close(lifted, (scores + 50.5) / 58)


@pytest.mark.parametrize("num_keep", [1, 2, 9, 23, 24, 27, 30])
def test_zoo_prune_tiles_pick_apart_and_newlines_come_last(num_keep: int) -> None:
    grid = newlines(2, 3, 4)                                             # 24 tokens, 6 newlines
    tokens, worth = cloud(2, 30, 12, 6)
    (stage,) = zoo_prune(FACTS, num_keep).stages
    inputs = scored(worth, tokens, num_keep, grid)
    keep = choose(stage, inputs).keep_indices
    frame, newline = grid[:, 0][keep], (grid[:, 1] < 0)[keep]
    assert newline.sum(dim=1).tolist() == [max(0, num_keep - 24)] * 2
    assert [((frame == number) & ~newline).sum(dim=1).tolist() for number in (0, 1)] == [[-(-min(num_keep, 24) // 2)] * 2, [min(num_keep, 24) // 2] * 2]
    if num_keep == 9:
        for number, count in ((0, 5), (1, 4)):
            inside = ((grid[:, 0] == number) & (grid[:, 1] >= 0)).nonzero().flatten()
            alone = choose(zoo_prune(FACTS, count).stages[0], scored(worth[:, inside], tokens[:, inside], count, None)).keep_indices
            assert inside[alone].tolist() == [[token for token in row if token in inside] for row in keep.tolist()]


def test_zoo_prune_starts_at_the_most_sensitive_and_multiplies() -> None:
    """From 0 degrees with worth 1: 90 degrees at worth 0.4 gives 0.4, 180 at 0.15 gives 0.3."""
    angles = torch.tensor([0.0, 90.0, 180.0, 45.0]).deg2rad()
    fan = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    inputs = scored(torch.tensor([[1.0, 0.4, 0.15, 0.0]]), fan, 2, None)
    for method in (zoo_prune(FACTS, 2), zoo_prune(FACTS, 2, tiles="together")):
        stage = method.stages[0]
        assert choose(stage, inputs).keep_indices.tolist() == [[0, 1]]
    by_distance = scored(torch.full((1, 4), 5.0), fan, 2, None)          # all alike: the first, then by distance
    assert choose(zoo_prune(FACTS, 2).stages[0], by_distance).keep_indices.tolist() == [[0, 2]]


def test_zoo_prune_asks_for_its_signal() -> None:
    assert zoo_prune(FACTS).stages[0].needs == (SIGNAL,)
    drawn = zoo_prune(FACTS, estimator="monte_carlo", directions=16, step=0.1, seed=5).stages[0]
    assert drawn.needs == (Tap("sensitivity", 0, ("monte_carlo", 16, 0.1, 5)),)
    assert drawn.budget.num_keep(576) == 192
    assert zoo_prune(FACTS, 0.1112).stages[0].budget.num_keep(576) == 64


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_zoo_prune_on_models(family: str, estimator: str) -> None:
    if family not in families():
        pytest.skip(f"no tiny {family}")
    tiny = families()[family]
    model, prompt = tiny.build(), tiny.prompt([[3, "image", 4], [2, "image", 5]])
    with torch.no_grad(), vlprune.apply(model, "zoo_prune", keep=0.4, estimator=estimator) as handle:
        model(**prompt)
        both = [kept.tolist() for kept in handle.trace.points[0].kept]
        model(**tiny.prompt([[2, "image", 5]], row_numbers=[1]))
        assert handle.trace.points[0].kept[0].tolist() == both[1]
    with torch.no_grad(), vlprune.apply(model, "random", keep=0.4) as handle:
        model(**prompt)
        assert [kept.tolist() for kept in handle.trace.points[0].kept] != both


# CDPruner


def with_text(tokens: torch.Tensor, text: torch.Tensor, valid: torch.Tensor, num_keep: int) -> ScoreInputs:
    return ScoreInputs(tokens, num_keep, signals={TEXT: text}, text_valid=valid)


def test_relevance_is_the_mean_cosine_with_the_text_that_counts() -> None:
    tokens, text = cloud(2, 6, 5)[0], cloud(2, 4, 5, 1)[0]
    valid = torch.tensor([[True, True, False, True], [False] * 4])
    found = Relevance()(with_text(tokens, text, valid, 3))
    cosine = nn.functional.cosine_similarity(tokens[0][:, None], text[0, [0, 1, 3]][None], dim=-1).mean(dim=1)
    torch.testing.assert_close(found, torch.stack((cosine, torch.zeros(6))))
    torch.testing.assert_close(Relevance(-1)(with_text(tokens, text, valid, 3)), -found)
    lengthened = with_text(tokens, torch.cat((text, torch.full((2, 3, 5), 7.0)), 1), torch.cat((valid, torch.zeros(2, 3).bool()), 1), 3)
    torch.testing.assert_close(Relevance()(lengthened), found)


def test_cdpruner_with_embeddings_of_the_users_own() -> None:
    """The tower's features through the user's function, the text asked anew at every choice, cosines with a minus."""
    features, (tokens, _) = cloud(2, 8, 6, 2)[0], cloud(2, 8, 12)
    project, given = torch.randn(6, 5, generator=seeded(1)), [torch.randn(3, 5, generator=seeded(4))]
    (stage,) = cdpruner(FACTS, 3, text_embeds=lambda: given[0], image_embeds=lambda x: x @ project).stages
    assert stage.needs == (Tap("vision_states", 22),)
    inputs = ScoreInputs(tokens, 3, signals={stage.needs[0]: features})
    for _ in range(2):
        cosine = torch.stack([nn.functional.cosine_similarity(features @ project, row.expand(2, 8, -1), dim=-1) for row in given[0]]).mean(dim=0)
        low, high = (-cosine).aminmax(dim=1, keepdim=True)
        torch.testing.assert_close(stage.scorer(inputs), (-cosine - low + 1e-6) / (high - low))
        given[0] = torch.randn(2, 5, generator=seeded(5))
    plain = cdpruner(FACTS, 3, text_embeds=given[0], image_embeds=lambda x: x @ project, variant="paper").stages[0].scorer
    assert plain.scorer.sign == 1  # type: ignore[attr-defined]
    given[0] = torch.randn(2, 4)
    with pytest.raises(OptionError, match="text_embeds"):
        stage.scorer(inputs)


def test_cdpruner_weighs_relevance_and_diversity() -> None:
    """Two copies of the best token: the second copy adds nothing, whatever its relevance. Without text only diversity counts."""
    tokens = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]]])
    text = torch.tensor([[[1.0, 0.1, 0]]])
    (stage,) = cdpruner(FACTS, 2).stages
    inputs = with_text(tokens, text, torch.tensor([[True]]), 2)
    assert choose(stage, inputs).keep_indices.tolist() == [[0, 2]]
    assert choose(stage, with_text(tokens, text, torch.tensor([[False]]), 2)).keep_indices.tolist() == [[0, 3]]
    assert cdpruner(FACTS).stages[0].scorer.scorer.sign == 1  # type: ignore[attr-defined]
    assert cdpruner(FACTS, variant="code").stages[0].scorer.scorer.sign == -1  # type: ignore[attr-defined]


def test_cdpruner_with_embeddings_on_a_model() -> None:
    tiny = families()["llava"]
    model, prompt = tiny.build(), tiny.prompt([[3, "image", 4]])
    shapes = []

    def image_embeds(states: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        return states[..., :10]

    text = torch.randn(2, 10, generator=seeded(1))
    kept = []
    for variant in ("code", "paper"):
        with torch.no_grad(), vlprune.apply(model, "cdpruner", keep=0.3, text_embeds=text, image_embeds=image_embeds, variant=variant) as handle:
            model(**prompt)
            kept.append(handle.trace.points[0].kept[0].tolist())
    assert shapes == [(1, 36, 32)] * 2
    assert kept[0] != kept[1]


# DART


def pivot_inputs(items: int, num_keep: int, text: int, valid: list[int], tokens: int = 30) -> ScoreInputs:
    generator = seeded(text + num_keep)
    signals = {
        Tap("key_l1", 1): torch.rand(items, tokens, generator=generator),
        Tap("normed", 0): torch.randn(items, tokens, 9, generator=generator),
        Tap("text_normed", 0): torch.randn(items, text, 9, generator=generator),
        Tap("text_key_l1", 1): torch.rand(items, text, generator=generator),
    }
    mask = torch.arange(text) < torch.tensor(valid)[:, None]
    return ScoreInputs(torch.zeros(items, tokens, 2), num_keep, signals=signals, text_valid=mask)


def pivot_loop(inputs: ScoreInputs, row: int, order: tuple[int, ...] | None = None) -> list[int]:
    """One item in plain Python."""
    norms, states, words, keys = (inputs.signals[tap][row] for tap in (Tap("key_l1", 1), Tap("normed", 0), Tap("text_normed", 0), Tap("text_key_l1", 1)))
    assert inputs.text_valid is not None
    there = [number for number in range(len(keys)) if inputs.text_valid[row, number]]
    image = sorted(range(len(norms)), key=lambda token: -float(norms[token]))[: min(4, inputs.num_keep)]
    text = sorted(there, key=lambda number: -float(keys[number]))[:4]
    directions = [states[token] for token in image] + [words[number] for number in text]
    directions += [states[image[number % len(image)]] for number in range(len(text), 4)]
    kept, left = list(image), [token for token in range(len(norms)) if token not in image]
    each, more = divmod(inputs.num_keep - len(image), 8)
    for turn, pivot in enumerate(order or range(8)):
        if each + more == 0:
            break
        left.sort(key=lambda token: float(torch.cosine_similarity(states[token], directions[pivot], dim=0)))
        kept += left[: each + (turn < more)]
        del left[: each + (turn < more)]
    return sorted(kept)


@pytest.mark.parametrize("order", [None, (3, 7, 0, 6, 5, 1, 2, 4)])
@pytest.mark.parametrize("num_keep", [1, 3, 4, 5, 12, 13, 29, 30])
@pytest.mark.parametrize(("text", "valid"), [(6, [6, 4, 2, 0]), (2, [2, 1, 0, 2]), (0, [0] * 4)])
def test_dart_equals_plain_loops(num_keep: int, text: int, valid: list[int], order: tuple[int, ...] | None) -> None:
    inputs = pivot_inputs(4, num_keep, text, valid)
    (stage,) = dart(FACTS, num_keep, order=order).stages
    with Watch() as watch:
        selection = choose(stage, inputs)
    assert watch.waits == []
    assert selection.keep_indices.tolist() == [pivot_loop(inputs, row, order) for row in range(4)]
    assert selection.roles is not None
    assert (selection.roles == 0).sum(dim=1).tolist() == [min(4, num_keep)] * 4
    for row in range(4):
        one = dataclasses.replace(
            inputs, tokens=inputs.tokens[row : row + 1], text_valid=inputs.text_valid[row : row + 1],  # type: ignore[index]
            signals={tap: x[row : row + 1] for tap, x in inputs.signals.items()},
        )  # fmt: skip
        assert torch.equal(choose(stage, one).keep_indices[0], selection.keep_indices[row])


def test_dart_reads_the_layer_before_and_needs_no_text_without_text_pivots() -> None:
    (stage,) = dart(FACTS).stages
    assert (stage.point.layer, stage.budget.num_keep(576)) == (2, 128)
    assert set(stage.needs) == {Tap("key_l1", 1), Tap("normed", 0), Tap("text_normed", 0), Tap("text_key_l1", 1)}
    assert dart(ModelFacts(decoder_layers=2)).stages[0].point.layer == 1
    (stage,) = dart(FACTS, 5, layer=5, text_pivots=0, image_pivots=2).stages
    assert set(stage.needs) == {Tap("key_l1", 4), Tap("normed", 0)}
    selector: Any = stage.selector
    assert selector == UnlikePivots(Tap("normed", 0), Tap("text_normed", 0), Tap("text_key_l1", 4), 2, 0)


# options


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (divprune, {"keep": 0.0}, "share"),
        (zoo_prune, {"estimator": "mc"}, "'exact', 'monte_carlo'"),
        (zoo_prune, {"tiles": True}, "'apart', 'together'"),
        (zoo_prune, {"directions": 0}, "from 1"),
        (zoo_prune, {"directions": 8.0}, "from 1"),
        (zoo_prune, {"seed": -1}, "from 0"),
        (zoo_prune, {"step": 0}, "above 0"),
        (zoo_prune, {"step": float("inf")}, "above 0"),
        (cdpruner, {"variant": "clip"}, "'code', 'paper'"),
        (cdpruner, {"tiles": "some"}, "'apart', 'together'"),
        (cdpruner, {"text_embeds": torch.zeros(2, 3)}, "belong together"),
        (cdpruner, {"image_embeds": torch.relu}, "belong together"),
        (cdpruner, {"text_embeds": torch.zeros(3), "image_embeds": torch.relu}, "one row a piece"),
        (cdpruner, {"text_embeds": [1.0], "image_embeds": torch.relu}, "one row a piece"),
        (cdpruner, {"text_embeds": torch.zeros(2, 3), "image_embeds": torch.zeros(2, 3)}, "a function"),
        (dart, {"layer": 0}, "from 1"),
        (dart, {"layer": 32}, "to 31"),
        (dart, {"image_pivots": 0}, "from 1"),
        (dart, {"text_pivots": -1}, "from 0"),
        (dart, {"order": (0, 1)}, "every number from 0 to 7"),
    ],
)
def test_an_option_that_cannot_work_is_an_error(build: Any, options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build(FACTS, **options)


# all of them


@pytest.mark.parametrize("num_keep", [1, 2, 7, 23, 24])
@pytest.mark.parametrize("name", ["divprune", "zoo_prune", "cdpruner"])
def test_exactly_k_in_rising_order_in_any_batch_and_any_order(name: str, num_keep: int) -> None:
    (stage,) = vlprune.get_method(name).build(FACTS, num_keep).stages
    tokens, worth = cloud(3, 24, 10, 11)
    text = {TEXT: cloud(3, 4, 10, 12)[0]}
    order = torch.randperm(24, generator=seeded(1))
    for grid in (raster_grid(1, 4, 6), raster_grid(3, 2, 4), newlines(2, 3, 3)):
        inputs = ScoreInputs(tokens, num_keep, grid.expand(3, -1, -1), signals={SIGNAL: worth, **text})
        keep = choose(stage, inputs).keep_indices
        assert keep.shape == (3, num_keep)
        assert bool((keep.diff(dim=1) > 0).all())
        for row in range(3):
            one = dataclasses.replace(
                inputs, tokens=tokens[row : row + 1], grid=grid[None], signals={tap: x[row : row + 1] for tap, x in inputs.signals.items()}
            )
            assert torch.equal(choose(stage, one).keep_indices[0], keep[row])
        if num_keep > int((grid[:, 1] >= 0).sum()):
            continue                                                     # which separators stay, all worth nothing, is a matter of place
        moved = dataclasses.replace(inputs, tokens=tokens[:, order], grid=grid[order].expand(3, -1, -1), signals={SIGNAL: worth[:, order], **text})
        assert torch.equal(order[choose(stage, moved).keep_indices].sort(dim=1).values, keep)
    assert isinstance(stage.selector, Greedy)
