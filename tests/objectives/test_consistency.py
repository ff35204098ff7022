"""Discrete consistency training: on the path at the exact map, schedules against the published ones, weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call

from omni.config import build
from omni.objectives.base import channel_error
from omni.objectives.consistency import Consistency, ConsistencyDraw
from omni.objectives.consistency_schedule import EasySchedule, ImprovedSchedule
from omni.objectives.mean_flow import MeanFlow
from omni.objectives.target_guidance import TargetGuidance
from omni.objectives.times import BatchNames, TimeDistribution
from omni.rng import Key

TIME = Consistency().time


def on_path(draw: ConsistencyDraw, distribution: Gaussian) -> ConsistencyDraw:
    """x_r on the path of the flow instead of the sample's line."""
    items = draw.items
    return replace(draw, x_r=distribution.map(draw.x, items.expand(draw.t), items.expand(draw.r)))


@pytest.mark.parametrize("distribution", [LINE, PLANE])
@pytest.mark.parametrize("schedule", ["ect", "ict"])
def test_residual_vanishes_at_the_exact_map_on_the_path(distribution: Gaussian, schedule: str) -> None:
    for progress in (0.0, 0.5):
        items = replace(gaussian_items(distribution), progress=progress)
        objective = Consistency(schedule=schedule, distance="l2", clock="flow")  # type: ignore[arg-type]
        draw = on_path(objective.draw(items, Key(0)), distribution)
        exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.2))
        assert exact < 1e-8 < 1e-4 < wrong


@pytest.mark.parametrize("schedule", ["ect", "ict"])
@pytest.mark.parametrize("distance", [None, "l2"])
@pytest.mark.parametrize("progress", [0.3, 1.0])
def test_gradient_equals_central_differences(schedule: str, distance: str | None, progress: float) -> None:
    """Steps are small: late in training the root of the error curves at the scale of the gap t - r."""
    items = replace(gaussian_items(PLANE, num=3), progress=progress)
    for guidance in (TargetGuidance(), TargetGuidance(scale=2.0)):
        objective = Consistency(schedule=schedule, distance=distance, guidance=guidance)  # type: ignore[arg-type]
        draw = objective.draw(items, Key(1))
        call = network_call(items)
        assert gradient_error(lambda call, o=objective, d=draw: o.loss(call, d).sum, call, h=1e-7) < 1e-6


def test_ect_pairs_are_the_published_ones() -> None:
    """sigma = exp(2 z - 1.1) of data of deviation 0.5, r = max(0, sigma (1 - q^-(stage+1) (1 + 8 sigmoid(-sigma))))."""
    names = BatchNames(5000)
    for stage in (0, 3, 7):
        t, r = EasySchedule(stage=stage).draw(TIME, names, Key(0), 0.0)
        sigma, sigma_r = (0.5 * time / (1 - time) for time in (t, r))
        wanted = sigma * (1 - (1 + 8 / (1 + sigma.exp())) / 2 ** (stage + 1))
        assert float((sigma_r - wanted.clamp(min=0)).abs().max() / sigma.max()) < 1e-12
        assert abs(float(sigma.log().mean()) + 1.1) < 0.05 and abs(float(sigma.log().std()) - 2.0) < 0.05
        assert bool((r >= 0).all()) and bool((r < t).all())
    assert float((EasySchedule(stage=0).draw(TIME, names, Key(0), 0.0)[1] == 0).double().mean()) > 0.4
    assert [EasySchedule().stage_at(p) for p in (0.0, 0.2, 0.99, 1.0)] == [0, 1, 7, 7]


def test_ict_pairs_are_neighbours_with_the_published_density() -> None:
    schedule = ImprovedSchedule()
    assert [schedule.num_nodes(p) for p in (0.0, 0.13, 0.5, 0.99, 1.0)] == [11, 21, 161, 1281, 1281]
    num, low, high = 11, 0.002, 80.0
    grid = torch.tensor([(low ** (1 / 7) + i / 10 * (high ** (1 / 7) - low ** (1 / 7))) ** 7 for i in range(num)])
    grid = grid.double()
    edges = torch.special.erf((grid.log() + 1.1) / (2.0 * math.sqrt(2)))
    mass = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    t, r = schedule.draw(TIME, BatchNames(20000), Key(0), 0.0)
    sigma, sigma_r = (0.5 * time / (1 - time) for time in (t, r))
    cell = torch.searchsorted(grid * 0.999, sigma, right=True) - 1
    assert float((sigma - grid[cell]).abs().max()) < 1e-4  # float32 grid of this test
    lower = torch.where(cell == 1, torch.zeros(()).double(), grid[cell - 1])
    assert float((sigma_r - lower).abs().max()) < 1e-4
    found = torch.bincount(cell - 1, minlength=10) / 20000
    assert float((found - mass).abs().max()) < 0.012


def test_where_r_is_zero_the_target_is_the_data() -> None:
    items = gaussian_items(PLANE)
    objective = Consistency(schedule={"kind": "ect", "stage": 0}, distance="l2", clock="flow")  # type: ignore[arg-type]
    draw = objective.draw(items, Key(0))
    zero = replace(draw, r=torch.zeros_like(draw.r), x_r=items.latents)
    call = network_call(items)
    f = draw.x - items.expand(draw.t) * call(draw.x, draw.t, draw.s)
    wanted = (items.mean(channel_error(f, items.latents)) / draw.t * items.counts).sum()
    assert abs(float((objective.loss(call, zero).sum - wanted).detach())) < 1e-9
    assert bool((draw.r == 0).any()) and bool((draw.r > 0).any())


def test_weights_are_one_over_the_gap_in_either_clock() -> None:
    t, r = torch.tensor([0.5, 0.9]).double(), torch.tensor([0.4, 0.0]).double()
    flow, ve = (Consistency(clock=clock).gap_weight(t, r) for clock in ("flow", "ve"))  # type: ignore[arg-type]
    assert torch.allclose(flow, 1 / (t - r), atol=1e-12)
    assert torch.allclose(ve, 1 / (t / (1 - t) - r / (1 - r)), atol=1e-12)
    edge = Consistency().gap_weight(torch.ones(1), torch.ones(1))
    assert torch.isfinite(edge).all()


def test_gaps_are_at_least_min_gap() -> None:
    items = gaussian_items(PLANE, num=500, size=1)
    for gap in (0.0, 1e-4, 1e-2):
        draw = Consistency(min_gap=gap, schedule={"kind": "ect", "stage": 18}).draw(items, Key(0))  # type: ignore[arg-type]
        width = (draw.t - draw.r)[draw.r > 0]
        assert float(width.min()) > gap - 1e-9
        assert gap > 0 or float(width.min()) < 1e-6


def test_closing_the_gap_gives_mean_flow_at_time_zero() -> None:
    """|f_t - f_r|^2 / (t - r)^2 -> |df/dt|^2, MeanFlow's square residual at s = 0, to first order in the gap."""
    items = gaussian_items(PLANE, num=8)
    objective = Consistency(distance="l2", clock="flow", min_gap=0.0)
    draw, call = objective.draw(items, Key(0)), network_call(items)
    wanted = float(MeanFlow(power=0.0).loss(call, draw).sum.detach())
    errors = []
    for gap in (1e-4, 1e-5):
        r = draw.t - gap
        near = replace(draw, r=r, x_r=items.interpolate(draw.noise, r))
        errors.append(abs(float(objective.loss(call, near).sum.detach()) / gap - wanted) / wanted)
    assert errors[0] < 1e-2 and 5 < errors[0] / errors[1] < 20


def test_distances() -> None:
    items = gaussian_items(PLANE, num=1)
    draw, call = Consistency().draw(items, Key(0)), network_call(items)

    def value(**options: object) -> float:
        return float(Consistency(clock="flow", **options).loss(call, draw).sum.detach()) / 4  # type: ignore[arg-type]

    w = 1 / float(draw.t - draw.r)
    e = value(distance="l2") / w
    assert abs(value() - w * e**0.5) < 1e-9 and abs(value(distance="norm") - w * e**0.5) < 1e-9
    assert abs(value(schedule="ict") - w * ((e + 0.00054**2) ** 0.5 - 0.00054)) < 1e-9
    assert abs(value(distance="pseudo_huber", huber_c=0.1) - w * ((e + 0.01) ** 0.5 - 0.1)) < 1e-9


def test_schedule_options_are_checked_by_kind() -> None:
    assert build({"schedule": "ict"}, Consistency, "recipe").schedule == ImprovedSchedule()
    assert build({"schedule": {"kind": "ect", "q": 256.0, "num_stages": 1}}, Consistency, "recipe").schedule.q == 256
    with pytest.raises(ValueError, match="last"):
        build({"schedule": {"kind": "ect", "last": 640}}, Consistency, "recipe")
    u = torch.linspace(0.01, 0.99, 9).double()
    for time in (TIME, TimeDistribution(kind="uniform", shift=3.0), TimeDistribution(mean=-0.4)):
        assert float((time.cumulative(time.quantile(u)) - u).abs().max()) < 1e-9
