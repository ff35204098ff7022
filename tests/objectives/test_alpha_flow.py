"""alpha-Flow: between trajectory flow matching, shortcut models and MeanFlow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import NetworkCall, gradient_error, network_call
from torch import Tensor

from omni.objectives.alpha_flow import AlphaFlow
from omni.objectives.base import FlowObjective, squared_error
from omni.objectives.consistency import Consistency
from omni.objectives.mean_flow import MeanFlow
from omni.objectives.shortcut import Shortcut
from omni.objectives.target_guidance import GuidedDraw
from omni.rng import Key


def draw_of(distribution: Gaussian, num: int = 64, diagonal: float = 0.0) -> GuidedDraw:
    return AlphaFlow(diagonal=diagonal).draw(gaussian_items(distribution, num), Key(0))


def gradients(objective: FlowObjective, call: NetworkCall, draw: GuidedDraw) -> list[Tensor]:
    return list(torch.autograd.grad(objective.loss(call, draw).sum, list(call.live.values())))


@pytest.mark.parametrize("distribution", [LINE, PLANE])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9])
def test_residual_vanishes_at_the_exact_map(distribution: Gaussian, alpha: float) -> None:
    """alpha = 0 with the marginal velocity as tangent; alpha > 0 with the network's average velocity, so that z stays
    on the path."""
    draw = draw_of(distribution)
    draw = replace(draw, v=distribution.velocity(draw.x, draw.items.expand(draw.t)))
    objective = AlphaFlow(alpha=alpha, power=0.0, velocity="network" if alpha else "data")
    exact, wrong = (float(objective.loss(GaussianCall(draw.items, distribution, e), draw).sum) for e in (0.0, 0.1))
    assert exact < 1e-8 < 1e-5 < wrong


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("velocity", ["data", "network"])
def test_gradient_equals_central_differences(alpha: float, velocity: str) -> None:
    draw = draw_of(PLANE, num=3, diagonal=0.3)
    for power in (0.0, 1.0):
        objective = AlphaFlow(alpha=alpha, power=power, velocity=velocity)  # type: ignore[arg-type]
        call = network_call(draw.items)
        assert gradient_error(lambda call, o=objective: o.loss(call, draw).sum, call) < 1e-6


def test_alpha_one_is_trajectory_flow_matching() -> None:
    draw = draw_of(PLANE)
    call = network_call(draw.items)
    found = AlphaFlow(alpha=1.0, power=0.0).loss(call, draw)
    wanted = squared_error(call(draw.x, draw.t, draw.s), draw.v, draw.items, 1.0)
    assert abs(float((found.sum - wanted.sum).detach())) < 1e-9
    assert [kind for kind, *_ in call.log] == ["call", "call"]  # one forward each: no second one at alpha = 1


def test_alpha_to_zero_has_the_gradient_of_mean_flow() -> None:
    """First order in alpha; exact in the clamped branch."""
    draw = draw_of(PLANE)
    call = network_call(draw.items)
    wanted = gradients(MeanFlow(power=0.0), call, draw)
    size = max(float(g.abs().max()) for g in wanted)

    def error(alpha: float, clamp: float) -> float:
        found = gradients(AlphaFlow(alpha=alpha, power=0.0, clamp=clamp), call, draw)
        return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / size

    errors = [error(alpha, 0.0) for alpha in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.1 and all(5 < a / b < 20 for a, b in zip(errors, errors[1:], strict=False))
    assert error(1e-3, 5e-3) < 1e-12


def test_alpha_one_half_with_the_network_as_velocity_is_a_shortcut_model() -> None:
    """The same gradient and value, up to the factor 1 / alpha = 2. No clipping; jumps longer than the finest."""
    draw = draw_of(PLANE, diagonal=0.3)
    call = network_call(draw.items)
    shortcut = Shortcut(clip=None, num_levels=20)
    alpha = AlphaFlow(alpha=0.5, power=0.0, velocity="network")
    inner = draw.s < draw.t  # at s = t alpha-Flow's target is v / 2 + F / 2
    same = replace(draw, s=torch.where(inner, draw.s, 0.5 * draw.t))
    for a, b in zip(gradients(alpha, call, same), gradients(shortcut, call, same), strict=True):
        assert float((a - 2 * b).abs().max()) < 1e-9
    assert abs(float((alpha.loss(call, same).sum - 2 * shortcut.loss(call, same).sum).detach())) < 1e-9


def test_on_the_diagonal_the_gradient_is_flow_matching_for_every_alpha() -> None:
    draw = draw_of(PLANE, diagonal=1.0)
    call = network_call(draw.items)
    wanted = gradients(AlphaFlow(alpha=1.0, power=0.0), call, draw)
    for alpha in (0.0, 0.2, 0.7):
        found = gradients(AlphaFlow(alpha=alpha, power=0.0), call, draw)
        assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < 1e-9


def test_to_time_zero_it_is_discrete_consistency_training() -> None:
    """s = 0: (1/alpha) |F - target|^2 = |f_t - f_m|^2 / (t (t - m)), item by item."""
    items = gaussian_items(PLANE, num=1)
    for n in range(5):
        consistency = Consistency(distance="l2", clock="flow", min_gap=0.0)
        draw = consistency.draw(items, Key(n))
        t, alpha = float(draw.t), float(1 - draw.r / draw.t)
        call = network_call(items)
        found = AlphaFlow(alpha=alpha, power=0.0, clamp=0.0).loss(call, draw).sum
        wanted = consistency.loss(call, draw).sum / t
        assert abs(float((found - wanted).detach())) < 1e-9 * (1 + abs(float(found.detach())))


def test_adaptive_weight_is_alpha_over_the_error() -> None:
    draw = draw_of(PLANE, num=1)
    call = network_call(draw.items)
    e = float(AlphaFlow(alpha=0.3, power=0.0).loss(call, draw).sum.detach()) * 0.3 / 4  # 4 latents
    found = float(AlphaFlow(alpha=0.3, offset=0.02).loss(call, draw).sum.detach()) / 4
    assert abs(found - e / 0.3 * (0.3 / (e + 0.02))) < 1e-12


def test_schedule_is_a_clamped_sigmoid_of_progress() -> None:
    objective = AlphaFlow()
    values = [objective.alpha_at(p) for p in (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)]
    assert values[0] == 1.0 and values[-1] == 0.0 and values[3] == 0.5
    assert values == sorted(values, reverse=True)
    assert abs(values[2] - 1 / (1 + 2.718281828459045 ** (-2.5))) < 1e-12  # 25 (0.4 - 0.5)
    assert AlphaFlow(start=0.4, end=0.6).alpha_at(0.3) == 1.0 and AlphaFlow(alpha=0.2).alpha_at(0.9) == 0.2
    with pytest.raises(ValueError, match="start must be below end"):
        AlphaFlow(start=0.5, end=0.5)
    draw = draw_of(PLANE, num=4)
    at = [replace(draw, items=replace(draw.items, progress=p)) for p in (0.0, 0.5, 1.0)]
    losses = [float(objective.loss(network_call(draw.items), d).sum.detach()) for d in at]
    assert len(set(losses)) == 3
