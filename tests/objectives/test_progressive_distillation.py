"""Progressive distillation: exact at the exact map, the path, its targets, and the guidance embedding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call

from omni.objectives.flow_matching import FlowMatching
from omni.objectives.progressive_distillation import ProgressiveDistillation
from omni.rng import Key


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map(distribution: Gaussian) -> None:
    items = gaussian_items(distribution, num=200, size=1)
    objective = ProgressiveDistillation(velocity_weight=0)
    draw = objective.draw(items, Key(0))
    exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.1))
    assert exact < 1e-8 < 1e-4 < wrong


def test_path_along_the_velocity_is_euler() -> None:
    """Its error decreases with the number of steps; it depends on the velocity only."""
    items = gaussian_items(LINE, num=200, size=1)
    errors = []
    for fine in (8, 16, 32):
        objective = ProgressiveDistillation(velocity_weight=0, fine=fine, walk="velocity", jumps=(1,))
        errors.append(float(objective.loss(GaussianCall(items, LINE), objective.draw(items, Key(0))).sum))
    assert errors[0] > 1e-6 and all(3 < a / b < 5.5 for a, b in zip(errors, errors[1:], strict=False))
    call = network_call(items)
    objective = ProgressiveDistillation(fine=4, walk="velocity", jumps=(2,), velocity_weight=0)
    objective.loss(call, objective.draw(items, Key(0)))
    asked = [(round(float(t[0]) * 4), round(float(s[0]) * 4)) for _, t, s, _ in call.log]
    assert asked == [(4, 4), (3, 3), (2, 2), (1, 1), (4, 2), (2, 0)]


def test_jumps_learn_the_states_of_the_path() -> None:
    """Against the path written out: two of four steps, from the state after two."""
    items = gaussian_items(PLANE, num=8)
    objective = ProgressiveDistillation(fine=4, jumps=(2,), velocity_weight=0)
    draw, call = objective.draw(items, Key(0)), network_call(items)
    ones, x, states = torch.ones(8, dtype=torch.float64), draw.noise, [draw.noise]
    for k in range(4):
        x = x - call(x, ones * (1 - k / 4), ones * (1 - (k + 1) / 4)).detach() / 4
        states.append(x)
    first = call(states[0], ones, ones / 2) - (states[0] - states[2]) * 2
    second = call(states[2], ones / 2, ones * 0) - (states[2] - states[4]) * 2
    wanted = (first.pow(2).mean(-1).sum() + second.pow(2).mean(-1).sum()) / 2
    assert abs(float((objective.loss(call, draw).sum - wanted).detach())) < 1e-10


def test_the_velocity_term_is_flow_matching() -> None:
    items = gaussian_items(PLANE)
    with_it, without = (ProgressiveDistillation(velocity_weight=w) for w in (2.0, 0.0))
    draw, call = with_it.draw(items, Key(0)), network_call(items)
    both, jumps, velocity = (o.loss(call, draw).sum for o in (with_it, without, FlowMatching()))
    assert abs(float((both - jumps - 2 * velocity).detach())) < 1e-9


def test_path_and_embedding_are_guided_except_for_items_without_condition() -> None:
    dropped = torch.tensor([False, True] * 4)
    items = replace(gaussian_items(PLANE, num=8), is_null=dropped)
    plain, guided = (ProgressiveDistillation(fine=4, jumps=(2,), guidance_scale=w) for w in (1.0, 2.0))
    assert guided.needs_null and not plain.needs_null
    draw, call = guided.draw(items, Key(0)), network_call(items)
    guided.loss(call, draw)
    betas = [beta for kind, t, s, beta in call.log if kind == "call" and float((t - s).max()) > 0.3]
    assert len(betas) == 2 and all(torch.equal(b.double(), torch.where(dropped, 1.0, 0.5).double()) for b in betas)
    assert all(beta is None for kind, t, s, beta in call.log if float((t - s).max()) < 0.3)
    ways = [objective._path(call, draw) for objective in (plain, guided)]
    moved = torch.stack([(a - b).abs().amax(-1) for a, b in zip(*ways, strict=True)]).amax(0)[0]
    of_item = dropped[items.item[0]]
    assert float(moved[of_item].max()) == 0 and float(moved[~of_item].min()) > 1e-3


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "walk": "velocity", "fine": 4, "jumps": [2, 1]}])
def test_gradient_equals_central_differences(options: dict) -> None:
    items = gaussian_items(PLANE, num=6)
    objective = ProgressiveDistillation(**options)
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


@pytest.mark.parametrize("jumps", [(), (8,), (3,), (0,)])
def test_jumps_divide_the_path(jumps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="divisors of fine = 8"):
        ProgressiveDistillation(jumps=jumps)
