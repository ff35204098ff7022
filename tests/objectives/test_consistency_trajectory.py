"""Consistency trajectory models: the path at the exact map, the gradient through the inner jump only, the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from layouts import random_batch, small_model
from small_network import gradient_error, network_call

from omni.objectives import consistency_trajectory
from omni.objectives.base import channel_error, jump
from omni.objectives.consistency_trajectory import ConsistencyTrajectory, InputGradient
from omni.objectives.flow_matching import FlowMatching
from omni.objectives.times import BatchNames
from omni.rng import Key


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map_on_the_path(distribution: Gaussian) -> None:
    items = gaussian_items(distribution)
    objective = ConsistencyTrajectory(velocity_weight=0.0)
    draw = objective.draw(items, Key(0))
    draw = replace(draw, x_u=distribution.map(draw.x, items.expand(draw.t), items.expand(draw.u)))
    exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.2))
    assert exact < 1e-8 < 1e-4 < wrong


@pytest.mark.parametrize("options", [{}, {"distance": "pseudo_huber", "velocity_weight": 0.0, "huber_c": 0.1}])
def test_gradient_equals_central_differences(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second jump evaluates fixed weights; only its input varies."""

    class Plain:
        @staticmethod
        def apply(call, x, t, s):  # noqa: ANN001, ANN205
            return call(x, t, s)

    monkeypatch.setattr(consistency_trajectory, "InputGradient", Plain)
    items = gaussian_items(PLANE, num=4)
    objective = ConsistencyTrajectory(**options)
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


def test_the_second_jump_passes_the_gradient_to_its_input_and_to_no_weight() -> None:
    """Trainable weights in both jumps: the gradient equals that with the second jump's fixed, and differs with none
    fixed."""
    items = gaussian_items(PLANE, num=4)
    call = network_call(items)
    leaky = replace(call, held=call.live)  # as in training without an average: the target is the network itself
    objective = ConsistencyTrajectory(velocity_weight=0.0)
    draw = objective.draw(items, Key(1))
    held = torch.autograd.grad(objective.loss(call, draw).sum, list(call.live.values()))
    live = torch.autograd.grad(objective.loss(leaky, draw).sum, list(call.live.values()))
    for a, b in zip(held, live, strict=True):
        assert float((a - b).abs().max()) < 1e-12 and float(a.abs().max()) > 1e-3
    y = jump(call, draw.x, draw.t, draw.s, items)
    whole = jump(call, y, draw.s, 0 * draw.s, items)
    goal = jump(call, jump(call, draw.x_u, draw.u, draw.s, items).detach(), draw.s, 0 * draw.s, items).detach()
    everything = items.terms(items.mean(channel_error(whole, goal)), 1.0).sum
    other = torch.autograd.grad(everything, list(call.live.values()))
    assert max(float((a - b).abs().max()) for a, b in zip(held, other, strict=True)) > 1e-3


def test_in_the_model_the_gradient_of_the_second_jump_reaches_x_only() -> None:
    from omni.losses import BatchFlowCall

    model = small_model(dtype=torch.float64)
    batch = random_batch(Key(1).fold("trajectory"))
    batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
    _, memory = model.context(batch)
    t = torch.full((batch.num_items,), 0.6, dtype=torch.float64)
    call = BatchFlowCall(model, batch, memory, torch.ones_like(t)).target(graph=True)
    x = Key(2).normal(tuple(batch.refine_latents.shape), torch.float64).requires_grad_()
    wanted = torch.autograd.grad(call(x, t, 0 * t).pow(2).sum(), x)[0]
    InputGradient.apply(call, x, t, 0 * t).pow(2).sum().backward()
    assert x.grad is not None and float((x.grad - wanted).abs().max()) < 1e-12
    assert all(parameter.grad is None for parameter in model.parameters())


def test_times_lie_on_the_grid_in_order() -> None:
    items = replace(gaussian_items(LINE, num=3000, size=1), names=BatchNames(3000))
    objective = ConsistencyTrajectory()
    draw = objective.draw(items, Key(0))
    assert bool((draw.s <= draw.u).all()) and bool((draw.u < draw.t).all())
    nodes = torch.unique(draw.t)
    assert len(nodes) == 39 and abs(float(nodes.max()) - 160 / 161) < 1e-6 and float(draw.s.min()) == 0.0
    grid = torch.cat([torch.zeros(1).double(), nodes])
    near = ConsistencyTrajectory(max_steps=3).draw(items, Key(0))
    steps = torch.searchsorted(grid, near.t) - torch.searchsorted(grid, near.u)
    assert torch.equal(torch.unique(steps), torch.tensor([1, 2, 3]))


def test_second_term_is_flow_matching_at_its_own_times() -> None:
    items = gaussian_items(PLANE, num=8)
    draw, call = ConsistencyTrajectory().draw(items, Key(0)), network_call(items)
    with_it, without = (ConsistencyTrajectory(velocity_weight=a).loss(call, draw).sum for a in (0.7, 0.0))
    t = draw.velocity_t
    wanted = 0.7 * FlowMatching().loss(call, replace(draw, x=items.interpolate(draw.noise, t), t=t, s=t)).sum
    assert abs(float((with_it - without - wanted).detach())) < 1e-9
    assert not torch.equal(t, draw.t)


def test_averaged_weights_make_both_jumps_to_time_zero() -> None:
    items = gaussian_items(PLANE, num=8)
    call = network_call(items)
    other = replace(call, held={name: 1.5 * value for name, value in call.held.items()})
    objective = ConsistencyTrajectory(velocity_weight=0.0)
    draw = objective.draw(items, Key(0))
    a, b = (float(objective.loss(c, draw).sum.detach()) for c in (call, other))
    assert abs(a - b) > 1e-3 and objective.target_decay == 0.999
