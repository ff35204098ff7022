"""One run on the plane: train an objective for a fixed number of evaluations, then sample with few.

The budget counts evaluations with a graph (see network.Count), so an objective that needs three a step has a third of
the steps. The result reports its other evaluations and its wall time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.plane.data import DATA_SETS, plane_items, sliced_wasserstein
from eval.experiments.plane.network import Count, PlaneCall, PlaneNetwork
from omni.config import Frozen
from omni.objectives import FlowObjective, build_objective
from omni.rng import Key
from omni.samplers import SAMPLERS, run_sampler, time_grid
from train.optim.ema import AveragedModel
from train.optim.optimiser import Optimiser
from train.optim.schedule import fall, rise_over
from train.optim.target import build_target

CHUNK = 1024  # points per batch of sampling: activations stay in the processor's cache


class Method(Frozen):
    """One line of the comparison: an objective with its options, its training and its sampling.

    trained_as: use the weights of another line instead of training (another sampler on the same network).
    evaluations: the numbers of evaluations, where not all of the run's apply (a generator has one).
    """

    objective: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    trained_as: str | None = None
    sampler: str = "flow_map"
    sampler_options: dict[str, Any] = Field(default_factory=dict)
    rate: float = Field(default=4e-3, gt=0)
    batch: int = Field(default=512, ge=2)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    evaluations: tuple[int, ...] | None = None

    def numbers(self, options: RunOptions) -> list[int]:
        """Numbers of evaluations, ascending."""
        return sorted(n for n in options.evaluations if self.evaluations is None or n in self.evaluations)


class RunOptions(Frozen):
    """budget: evaluations with a graph, in points. decay: per step, of the averaged weights, which are sampled.

    num_points: samples per number of evaluations, compared with as many of the data along `num_projections` directions.
    """

    budget: int = Field(default=768_000, ge=1)
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=3, ge=1)
    decay: float = Field(default=0.99, ge=0, lt=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    evaluations: tuple[int, ...] = (1, 2, 4, 8, 32)
    num_points: int = Field(default=20_000, ge=2)
    num_projections: int = Field(default=32, ge=1)


@dataclass(frozen=True)
class Run:
    """Result of one run: distance by number of evaluations, samples at the fewest, and costs."""

    distances: Mapping[int, float]
    points: Tensor  # (num_points, 2)
    steps: int
    count: Count
    seconds: float  # processor time of training


def run_methods(
    base: Method, members: Mapping[str, Method], data_set: str, options: RunOptions, key: Key
) -> dict[str, Run]:
    """Train `base`, then sample its network by the sampler of each of `members`. Depends on the arguments alone."""
    network, steps, count, seconds = train(base, data_set, options, key)
    runs = {}
    for name, method in members.items():
        clouds = {n: draw_points(network, method, n, options, key.fold("points")) for n in method.numbers(options)}
        wanted = DATA_SETS.get(data_set)(key.fold("reference"), options.num_points)
        distances = {
            n: sliced_wasserstein(points, wanted, key.fold("distance"), options.num_projections)
            for n, points in clouds.items()
        }
        runs[name] = Run(distances, clouds[min(clouds)], steps, count, seconds)
    return runs


def train(method: Method, data_set: str, options: RunOptions, key: Key) -> tuple[PlaneNetwork, int, Count, float]:
    """Train until the budget is spent. Returns the averaged network, steps, evaluations and processor seconds."""
    objective = build_objective(method.objective, **method.options)
    if not isinstance(objective, FlowObjective):
        raise ValueError(f"{method.objective!r} is not an objective on latents; the plane has nothing else")
    draw_data = DATA_SETS.get(data_set)
    network = PlaneNetwork(key.fold("network"), width=options.width, depth=options.depth)
    average, target = AveragedModel(network, options.decay), build_target(network, [objective])
    adam = torch.optim.Adam(network.parameters(), lr=method.rate, betas=(0.9, method.beta2), fused=True)
    optimiser = Optimiser({"adam": adam})
    count, steps, start = Count(), 0, time.process_time()
    while count.gradient < options.budget:
        fraction = count.gradient / options.budget
        drawn = key.fold("draw", steps)
        items = plane_items(draw_data(key.fold("data", steps), method.batch), fraction, objective.pairing)
        call = PlaneCall(network, items, None if target is None else target.model, count=count)
        terms = objective.loss(call, objective.draw(items, drawn))
        (terms.weight * terms.sum / terms.count).backward()
        optimiser.step(factor_at(fraction, options.warmup))
        optimiser.zero_grad()
        steps += 1
        average.update()
        if target is not None:
            target.update()
    return average.model, steps, count, time.process_time() - start


def factor_at(fraction: float, warmup: float) -> float:
    """Factor on the rate: up over the share `warmup` of the run, and down a cosine to a hundredth."""
    return rise_over(fraction, warmup) * fall(fraction, "cosine", min_factor=0.01)


@torch.no_grad()
def draw_points(network: PlaneNetwork, method: Method, steps: int, options: RunOptions, key: Key) -> Tensor:
    """(num_points, 2) float32 by the method's sampler in `steps` evaluations, from keyed noise."""
    sampler = SAMPLERS.get(method.sampler)
    out = []
    for index, start in enumerate(key.fold("start").normal((options.num_points, 2)).split(CHUNK)):
        call = PlaneCall(network, plane_items(start))

        def velocity(x: Tensor, t: float, s: float, call: PlaneCall = call) -> Tensor:
            return call(x[None], torch.full((len(x),), t), torch.full((len(x),), s))[0]

        def noise(step: int, index: int = index, shape: tuple[int, ...] = tuple(start.shape)) -> Tensor:
            return key.fold("renoise", index, step).normal(shape)

        states = run_sampler(sampler, velocity, start, time_grid(steps), noise, **method.sampler_options)
        out.append(list(states)[-1].x.float())
    return torch.cat(out)
