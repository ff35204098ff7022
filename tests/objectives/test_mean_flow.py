"""MeanFlow: its identity at the exact map, its gradient, and its special cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call
from torch import Tensor

from omni.objectives.base import jump
from omni.objectives.flow_matching import FlowMatching
from omni.objectives.mean_flow import MeanFlow
from omni.objectives.target_guidance import TargetGuidance
from omni.objectives.times import BatchNames, TimeDistribution
from omni.rng import Key


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map_with_the_marginal_velocity(distribution: Gaussian) -> None:
    items = gaussian_items(distribution)
    objective = MeanFlow(diagonal=0.0, power=0.0)
    draw = objective.draw(items, Key(0))
    draw = replace(draw, v=distribution.velocity(draw.x, items.expand(draw.t)))
    exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.1))
    assert exact < 1e-8 < 1e-4 < wrong


@pytest.mark.parametrize("options", [{}, {"power": 0.0}, {"power": 0.75, "diagonal": 0.0}])
def test_gradient_equals_central_differences(options: dict) -> None:
    items = gaussian_items(PLANE, num=3)
    for guidance in (TargetGuidance(), TargetGuidance(scale=2.0, mix=0.5)):
        objective = MeanFlow(guidance=guidance, **options)
        draw = objective.draw(items, Key(1))
        assert gradient_error(lambda call, o=objective, d=draw: o.loss(call, d).sum, network_call(items)) < 1e-6


def test_the_harness_detects_a_missing_stop_gradient() -> None:
    """Control of the test above: it detects a loss whose gradient omits a varying part."""
    items = gaussian_items(PLANE, num=3)
    draw = MeanFlow().draw(items, Key(1))

    def leaky(call) -> Tensor:  # noqa: ANN001
        flow = call(draw.x, draw.t, draw.s)
        return (flow.data * flow).sum()  # `.data` stops the gradient but varies

    assert gradient_error(leaky, network_call(items)) > 1e-3


def test_residual_is_minus_the_derivative_of_the_map_along_the_line() -> None:
    """Identity of the Eulerian family: d/dt f(x_t, t, s) along (v, 1, 0) = -(F - target)."""
    items = gaussian_items(PLANE, num=8)
    call = network_call(items)
    draw = MeanFlow(diagonal=0.0).draw(items, Key(0))
    x, t, s = draw.x, draw.t, draw.s
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    with torch.no_grad():
        _, rate = torch.func.jvp(lambda x, t: jump(call, x, t, s, items), (x, t), (draw.v, one))
        target = draw.v - items.expand(t - s) * call.derivative(x, t, s, draw.v, one, zero)
        assert float((rate + call(x, t, s) - target).abs().max()) < 1e-12


def test_on_the_diagonal_it_is_flow_matching() -> None:
    items = gaussian_items(PLANE, num=8)
    draw = MeanFlow(diagonal=1.0).draw(items, Key(0))
    call = network_call(items)
    found, wanted = MeanFlow(power=0.0).loss(call, draw), FlowMatching().loss(call, draw)
    assert abs(float((found.sum - wanted.sum).detach())) < 1e-9
    assert torch.equal(draw.t, draw.s)


def test_times_may_have_two_densities_and_a_share_on_the_diagonal() -> None:
    items = replace(gaussian_items(PLANE, num=2000, size=1), names=BatchNames(2000))
    end = TimeDistribution(mean=-4.0, std=1.6)
    t, s = MeanFlow(time=TimeDistribution(mean=-0.6, std=1.6), end=end, diagonal=0.0).times(items, Key(0))
    assert bool((s <= t).all()) and float(s.median()) < 0.05 < 0.3 < float(t.median())
    t, s = MeanFlow(diagonal=0.75).times(items, Key(0))
    assert abs(float((t == s).double().mean()) - 0.75) < 0.03


def test_guidance_enters_the_tangent_as_well_as_the_target() -> None:
    """With the guided velocity, the residual of an exact unguided map is the guided one, not zero."""
    items = gaussian_items(PLANE)
    objective = MeanFlow(diagonal=0.0, power=0.0, guidance=TargetGuidance(scale=2.0))
    draw = objective.draw(items, Key(0))
    embedded, v = objective.guidance.apply(network_call(items), draw)
    plain = MeanFlow(diagonal=0.0, power=0.0)
    wanted = plain.loss(embedded, replace(draw, v=v, scale=None))
    found = objective.loss(network_call(items), draw)
    assert abs(float((found.sum - wanted.sum).detach())) < 1e-9
    assert abs(float((found.sum - plain.loss(embedded, replace(draw, scale=None)).sum).detach())) > 1e-3
