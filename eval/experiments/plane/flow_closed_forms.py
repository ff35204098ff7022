"""Objectives and samplers on Gaussian data, whose exact flow map is known.

    flow_closed_forms   the methods of a table (eval/suites/flow_maps.toml) at the exact map and at a wrong one

Report rows, for the distributions `line` (one dimension) and `plane` (two, correlated), in float64:

    LAW_METHOD         residual: the loss at the exact map, which is 0
                       discrepancy: the loss at the exact map over that at the wrong one; Monte Carlo noise remains
    LAW_METHOD_wrong   the loss at the wrong map, which must not be 0
    error_SAMPLER      largest error of a sampler on the exact map, over numbers of steps
    order_SAMPLER      order of convergence of a sampler on the exact velocity alone
    one_step_SAMPLER   largest error of one evaluation
    law_SAMPLER        a sampler that adds noise: largest error of mean and covariance over numbers of steps

`largest_residual` and `smallest_wrong` are over the methods whose loss is a residual. A residual is 0 point by point
only on the exact path: the marginal velocity replaces the sample's v, and the image of x_t replaces points at a second
time (`velocity_at` and `on_path` of the table name the fields).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.plane.data import PlaneItems
from eval.experiments.plane.gaussian import LINE, PLANE, Gaussian, GaussianCall
from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.config import Frozen
from omni.objectives import FlowObjective, build_objective
from omni.objectives.base import Draw, Terms
from omni.objectives.times import BatchNames
from omni.rng import Key
from omni.samplers import SAMPLERS, adds_noise, run_sampler, time_grid

GAUSSIANS = {"line": LINE, "plane": PLANE}


class Check(Frozen):
    """An objective with the options under which its loss is 0 at the exact map.

    velocity_at: the fields of its Draw that hold the point and time of the velocity target. on_path: fields that hold
    points at a second time, each with the field that holds the time. error: the wrong map is F + error x t.
    """

    objective: str
    options: dict[str, Any] = Field(default_factory=dict)
    kind: Literal["residual", "discrepancy"] = "residual"
    velocity_at: tuple[str, str] = ("x", "t")
    on_path: dict[str, str] = Field(default_factory=dict)
    error: float = 0.1


class ClosedFormOptions(TaskOptions):
    """items: points per residual. particles: points per discrepancy. points: samples of samplers that add noise."""

    methods: dict[str, Check] = Field(default_factory=dict)
    items: int = Field(default=512, ge=1)
    particles: int = Field(default=2048, ge=2)
    points: int = Field(default=20_000, ge=2)


def closed_form_rows(options: ClosedFormOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    methods = [
        f"{gaussian}_{name}{end}" for gaussian in GAUSSIANS for name in options.methods for end in ("", "_wrong")
    ]
    ends = ("error", "order", "one_step", "distribution")
    samplers = [f"{end}_{name}" for end in ends for name in SAMPLERS.names()]
    return ["largest_residual", "smallest_wrong", *methods, *samplers]


@task("flow_closed_forms", ClosedFormOptions, rows=closed_form_rows)
def flow_closed_forms(context: Context, options: ClosedFormOptions) -> Outcome:
    """Residuals of all objectives at the exact map of a Gaussian, and errors of all samplers."""
    measures, residuals, wrongs = [], [0.0], [math.inf]
    for gaussian_name, gaussian in GAUSSIANS.items():
        for name, check in options.methods.items():
            exact, wrong = (at_map(check, gaussian, options, context.key(name), e) for e in (0.0, check.error))
            if check.kind == "residual":
                residuals.append(exact)
                wrongs.append(wrong)
            value, unit = (exact, "residual") if check.kind == "residual" else (exact / wrong, "of the wrong map's")
            measures.append(Measure(f"{gaussian_name}_{name}", value, unit))
            measures.append(Measure(f"{gaussian_name}_{name}_wrong", wrong, "loss"))
    measures.append(Measure("largest_residual", max(residuals), "residual"))
    measures.append(Measure("smallest_wrong", min(wrongs), "loss"))
    measures += [m for name in SAMPLERS.names() for m in sampler_measures(name, options.points, context.key("start"))]
    return Outcome(measures, notes=[f"{options.items} items, {options.particles} particles, float64"])


# ---- objectives ----------------------------------------------------------------------------------------------------


def at_map(check: Check, gaussian: Gaussian, options: ClosedFormOptions, key: Key, error: float) -> float:
    """The mean loss at the exact map (error 0) or a wrong one."""
    objective = build_objective(check.objective, **check.options)
    assert isinstance(objective, FlowObjective)
    num = options.items if check.kind == "residual" else options.particles
    points = gaussian.sample(key.fold("data"), 1, num)
    items = PlaneItems(points, torch.arange(num)[None], BatchNames(num))
    draw = objective.draw(items, key.fold("draw"))
    with torch.no_grad():
        if check.kind == "residual":
            draw = on_path(draw, gaussian, check)
        return mean(objective.loss(GaussianCall(items, gaussian, error), draw))


def on_path(draw: Draw, gaussian: Gaussian, check: Check) -> Draw:
    """The Draw with marginal velocities and points on one path of the flow."""
    expand = draw.items.expand
    x, t = (getattr(draw, field) for field in check.velocity_at)
    moved = {
        point: gaussian.map(draw.x, expand(draw.t), expand(getattr(draw, time)))
        for point, time in check.on_path.items()
    }
    return replace(draw, v=gaussian.velocity(x, expand(t)), **moved)


def mean(terms: Terms) -> float:
    """A loss over its count."""
    return float(terms.sum) / terms.count


# ---- samplers ------------------------------------------------------------------------------------------------------


def sampler_measures(name: str, points: int, key: Key) -> Iterator[Measure]:
    """Errors of a sampler on the exact F of the plane. A sampler with noise needs many `points`; others need few."""
    sampler = SAMPLERS.get(name)
    num = points if adds_noise(name) else 1000
    start = key.normal((num, 2), torch.float64)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def call(x: Tensor, t: float, s: float) -> Tensor:
        return PLANE.average(x, one * t, one * s)

    def noise(step: int) -> Tensor:
        return key.fold("renoise", step).normal((num, 2), torch.float64)

    def last(steps: int) -> Tensor:
        return list(run_sampler(sampler, call, start, time_grid(steps), noise))[-1].x

    def error(steps: int) -> float:
        return float((last(steps) - PLANE.map(start, one, zero)).abs().max())

    yield Measure(f"one_step_{name}", error(1), "absolute")
    if adds_noise(name):
        yield Measure(f"distribution_{name}", max(moment_error(last(n)) for n in (1, 2, 8)), "absolute")
        return
    errors = {n: error(n) for n in (2, 8, 32, 64)}
    if max(errors.values()) < 1e-6:
        yield Measure(f"error_{name}", max(errors.values()), "absolute")
    else:
        yield Measure(f"order_{name}", math.log2(errors[32] / errors[64]), "order")


def moment_error(x_N2: Tensor) -> float:
    """Largest error of mean and covariance."""
    mean, covariance = x_N2.mean(0) - PLANE.mean, torch.cov(x_N2.T) - PLANE.covariance
    return float(torch.cat([mean, covariance.flatten()]).abs().max())
