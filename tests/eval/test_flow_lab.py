"""The flow-map experiments: distance, derivatives of the network, keyed samples, and both tasks at small size."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.experiments.plane.data import DATA_SETS, PlaneItems, plane_items, sliced_wasserstein
from eval.experiments.plane.flow_closed_forms import GAUSSIANS
from eval.experiments.plane.flow_plane import comparisons, plane_rows
from eval.experiments.plane.network import Count, PlaneCall, PlaneNetwork
from eval.experiments.plane.run import Run
from eval.plots import cloud
from eval.suite import load_suite, main
from omni.objectives import OBJECTIVES, FlowObjective
from omni.objectives.times import BatchNames, stratified_I, uniform_I
from omni.rng import Key

ROOT = Path(__file__).parents[2]
SUITE = str(ROOT / "eval" / "suites" / "flow_maps.toml")


# ---- the distance --------------------------------------------------------------------------------------------------


def test_sliced_wasserstein_is_the_best_matching_along_every_direction() -> None:
    """Against the direct computation: all matchings of five points, direction by direction."""
    a, b = Key(0).fold("a").normal((5, 2)), Key(0).fold("b").normal((5, 2))
    key, num = Key(1), 7
    found = sliced_wasserstein(a, b, key, num)
    offset = float(key.fold("directions").uniform(()))
    squares = []
    for n in range(num):
        angle = (n + offset) * math.pi / num
        u, v = (c @ torch.tensor([math.cos(angle), math.sin(angle)]) for c in (a, b))
        squares.append(min(float((u - v[list(order)]).pow(2).mean()) for order in itertools.permutations(range(5))))
    assert found == pytest.approx(math.sqrt(sum(squares) / num), rel=1e-5)


def test_sliced_wasserstein_of_a_shift_and_of_a_scale() -> None:
    """A shift by d is |d| / sqrt 2; standard normals against the same doubled are 1 apart."""
    a = Key(2).normal((20_000, 2))
    assert sliced_wasserstein(a, a + torch.tensor([0.3, -0.4]), Key(0)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)
    assert sliced_wasserstein(a, 2 * a, Key(0)) == pytest.approx(1.0, abs=0.02)
    assert sliced_wasserstein(a, a, Key(0)) == 0
    with pytest.raises(ValueError, match="one size"):
        sliced_wasserstein(a, a[:5], Key(0))


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_SETS.names())
def test_data_sets_are_keyed_and_of_unit_scale(name: str) -> None:
    points = DATA_SETS.get(name)(Key(3), 20_000)
    assert torch.equal(points, DATA_SETS.get(name)(Key(3), 20_000))
    assert not torch.equal(points, DATA_SETS.get(name)(Key(4), 20_000))
    assert float(points.mean(0).abs().max()) < 0.03 and float((points.std(0) - 1).abs().max()) < 0.05


def test_names_of_a_batch_are_keyed_and_stratified() -> None:
    names = BatchNames(8, copies=4)
    assert list(names) == [(n // 4, 0, n % 4) for n in range(8)]
    draws = stratified_I(names, Key(0), "time")
    assert torch.equal(draws, stratified_I(names, Key(0), "time"))
    assert not torch.equal(draws, stratified_I(names, Key(0), "end time"))
    for block in draws.view(2, 4):
        assert torch.allclose(block.sort().values.diff(), torch.full((3,), 0.25).double())
    many = uniform_I(BatchNames(10_000), Key(1), "time")
    assert float((many.sort().values - torch.linspace(0, 1, 10_000, dtype=torch.float64)).abs().max()) < 0.02
    items = plane_items(torch.zeros(4, 2))
    assert torch.equal(items.noise(Key(0)), items.noise(Key(0)))
    assert not torch.equal(items.noise(Key(0)), items.noise(Key(1)))


# ---- the network ---------------------------------------------------------------------------------------------------


def plane_call(num: int = 6) -> tuple[PlaneCall, Tensor, Tensor, Tensor]:
    network = PlaneNetwork(Key(5), width=16, depth=2).double()
    network.read.weight.detach().copy_(Key(6).normal((2, 16)))
    items = PlaneItems(torch.zeros(1, num, 2).double(), torch.arange(num)[None], BatchNames(num))
    t = 0.1 + 0.8 * Key(7).uniform((num,), torch.float64)
    return PlaneCall(network, items), Key(8).normal((1, num, 2), torch.float64), t, 0.4 * t


@pytest.mark.parametrize("direction", ["x", "t", "s", "all"])
def test_derivative_of_the_network_equals_central_differences(direction: str) -> None:
    call, x, t, s = plane_call()
    moves = {"x": (1, 0, 0), "t": (0, 1, 0), "s": (0, 0, 1), "all": (1, 0.7, -0.4)}[direction]
    dx, dt, ds = moves[0] * Key(9).normal((1, 6, 2), torch.float64), torch.full_like(t, moves[1]), t * moves[2]
    found, h = call.derivative(x, t, s, dx, dt, ds), 1e-5
    with torch.no_grad():
        wanted = (call(x + h * dx, t + h * dt, s + h * ds) - call(x - h * dx, t - h * dt, s - h * ds)) / (2 * h)
    assert float((found - wanted).abs().max()) < 1e-8 < float(wanted.abs().max())
    flow, rate = call.with_derivative(x, t, s, dx, dt, ds)
    assert torch.equal(rate.detach(), found) and torch.allclose(flow, call(x, t, s)) and not found.requires_grad
    weight = call.network.layers[0].weight
    [gradient] = torch.autograd.grad(rate.sum(), weight)
    with torch.no_grad():
        weight[3, 1] += h
        up = call.derivative(x, t, s, dx, dt, ds).sum()
        weight[3, 1] -= 2 * h
        down = call.derivative(x, t, s, dx, dt, ds).sum()
    assert float(gradient[3, 1]) == pytest.approx(float(up - down) / (2 * h), abs=1e-7)


def test_the_call_has_target_null_and_guidance_and_counts_evaluations() -> None:
    call, x, t, s = plane_call()
    other = PlaneNetwork(Key(10), width=16, depth=2).double()
    with_average = PlaneCall(call.network, call.items, other)
    plain = call(x, t, s)
    assert call.count == Count(gradient=6, plain=0) and plain.requires_grad
    assert torch.equal(call.target()(x, t, s), plain) and not call.target()(x, t, s).requires_grad
    assert call.target(graph=True)(x, t, s).requires_grad
    assert float(with_average.target()(x, t, s).abs().max()) == 0  # an untrained network starts at 0
    assert not torch.equal(call.null()(x, t, s), plain)
    assert torch.equal(call.guided(torch.ones(6))(x, t, s), plain)
    assert not torch.equal(call.guided(torch.full((6,), 0.5))(x, t, s), plain)
    assert torch.equal(call.guided(torch.full((6,), 0.5)).null()(x, t, s), call.null()(x, t, s))
    before = call.count.plain
    call.derivative(x, t, s, x, t, s)
    assert call.count.plain == before + 12


# ---- the tasks -----------------------------------------------------------------------------------------------------


def test_both_tables_have_the_same_flow_objectives() -> None:
    suite = load_suite(SUITE, [])
    """A new objective is measured when a row names it."""
    known = {name for name in OBJECTIVES.names() if issubclass(OBJECTIVES.get(name), FlowObjective)}
    tables = [suite.flow_closed_forms.methods, suite.flow_plane.methods]
    one, other = ({method.objective for method in table.values()} - {""} for table in tables)
    assert one == other and len(one) > 10 and one <= known


def test_closed_forms_hold_and_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def rows(*changes: str) -> dict[str, float]:
        main([SUITE, "tasks=flow_closed_forms", "flow_closed_forms.items=48", *changes, "--json", "rows.json"])
        return {row["name"].partition(".")[2]: row["value"] for row in json.loads(Path("rows.json").read_text())}

    right = rows("flow_closed_forms.particles=1024")
    assert right["largest_residual"] < 1e-8 < right["smallest_wrong"]
    assert right["line_mean_flow"] < 1e-20 and right["error_flow_map"] < 1e-12
    assert all(
        right[f"{gaussian}_{name}"] < 0.1 for gaussian in GAUSSIANS for name in ("moment_matching", "gmmn", "drifting")
    )
    assert 0.95 < right["order_euler"] < 1.05 and 1.9 < right["order_heun"] < 2.1
    assert right["one_step_euler"] == pytest.approx(right["one_step_ddim"])
    assert max(right["distribution_restart"], right["distribution_gamma"]) < 0.03
    off_path = "flow_closed_forms.methods.consistency_ect.on_path={}"
    assert rows("flow_closed_forms.particles=32", off_path)["largest_residual"] > 1e-8


def test_the_count_needs_a_small_distance_on_every_data_set() -> None:
    options = load_suite(SUITE, ['flow_plane.only=["flow_matching","shortcut","mean_flow"]'])
    plane = options.flow_plane  # type: ignore[attr-defined]
    first, second = plane.data_sets

    def run(one: float, many: float) -> list[Run]:
        return [Run({n: one if n == 1 else many for n in plane.run.evaluations}, torch.zeros(1, 2), 1, Count(), 1.0)]

    results = {(d, "flow_matching"): run(0.9, 0.1) for d in (first, second)}
    results |= {(first, "shortcut"): run(0.14, 0.1), (second, "shortcut"): run(0.2, 0.1)}
    results |= {(first, "mean_flow"): run(0.2, 0.1), (second, "mean_flow"): run(0.14, 0.1)}
    values = {measure.name: measure.value for measure in comparisons(results, plane)}
    assert values["objectives_within"] == 0
    assert values[f"objectives_within_{first}"] == values[f"objectives_within_{second}"] == 1


def test_a_tiny_run_of_the_plane_gives_all_rows_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [
        "tasks=flow_plane", "flow_plane.bars={}", "flow_plane.seeds=2", "flow_plane.workers=1",
        'flow_plane.data_sets=["mixture"]', "flow_plane.run.budget=1500", "flow_plane.run.width=16",
        "flow_plane.run.num_points=256", "flow_plane.run.evaluations=[1, 3]",
    ]  # fmt: skip
    assert main([SUITE, *changes, "--json", "rows.json"]) == 0
    rows = {row["name"].partition(".")[2]: row["value"] for row in json.loads(Path("rows.json").read_text())}
    assert list(rows) and set(rows) == set(plane_rows(load_suite(SUITE, changes).flow_plane))
    assert all(value is not None for value in rows.values())
    assert all(rows[f"mixture_ddim_{n}"] == pytest.approx(rows[f"mixture_flow_matching_{n}"], rel=1e-4) for n in (1, 3))
    for name in ("flow_maps_plane.png", "flow_maps_samples.png"):
        assert 500 < (tmp_path / "runs" / "eval" / name).stat().st_size < 200_000


def test_errors_of_the_table_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ('flow_plane.only=["mean_flo"]', "did you mean 'mean_flow'"),
        ("flow_plane.methods.ddim.objective=mean_flow", "or trained_as another"),
        ("flow_plane.methods.mean_flow.rat=1", "did you mean 'rate'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_suite(SUITE, [change])


def test_a_cloud_is_dark_where_points_are() -> None:
    picture = cloud(torch.tensor([[1.0, 1.0]]).expand(100, 2), size=8, reach=2.0)
    dark = (picture.sum(-1) < 3 * 255).nonzero().tolist()
    assert dark == [[1, 6]]  # right of the middle, and above it
