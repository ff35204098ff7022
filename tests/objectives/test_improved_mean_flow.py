"""Improved MeanFlow: its compound velocity at the exact map, its gradient, and its relation to MeanFlow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call
from torch import Tensor

from omni.objectives.flow_matching import FlowMatching
from omni.objectives.improved_mean_flow import ImprovedMeanFlow
from omni.objectives.mean_flow import MeanFlow
from omni.objectives.target_guidance import TargetGuidance
from omni.rng import Key


@dataclass(frozen=True)
class RightOnTheDiagonal(GaussianCall):
    """Wrong for s < t, exact at s = t."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        start, end = self.items.expand(t), self.items.expand(s)
        return self.gaussian.average(x, start, end) + self.error * x * (start - end)


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map(distribution: Gaussian) -> None:
    """Both terms, if v is the marginal velocity."""
    items = gaussian_items(distribution)
    objective = ImprovedMeanFlow(diagonal=0.0, power=0.0)
    draw = objective.draw(items, Key(0))
    draw = replace(draw, v=distribution.velocity(draw.x, items.expand(draw.t)))
    exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.1))
    assert exact < 1e-8 < 1e-4 < wrong


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_compound_velocity_needs_no_marginal_velocity_as_tangent(distribution: Gaussian) -> None:
    """MeanFlow's target has the noise of the sample's v in its tangent; V does not. At the exact map, V's error against
    the sample's v is the irreducible error of the diagonal, at every item."""
    items = gaussian_items(distribution)
    draw = ImprovedMeanFlow(diagonal=0.0).draw(items, Key(0))
    call = GaussianCall(items, distribution)
    least = FlowMatching().loss(call, draw)
    found = ImprovedMeanFlow(power=0.0, velocity_weight=0.0).loss(call, draw)
    assert abs(float(found.sum - least.sum)) < 1e-8
    assert abs(float(MeanFlow(power=0.0).loss(call, draw).sum - least.sum)) > 1e-2


@pytest.mark.parametrize("options", [{}, {"power": 0.0, "velocity_weight": 0.3}])
def test_gradient_equals_central_differences(options: dict) -> None:
    items = gaussian_items(PLANE, num=3)
    for guidance in (TargetGuidance(), TargetGuidance(max_scale=8.0, mix="inverse")):
        objective = ImprovedMeanFlow(guidance=guidance, **options)
        draw = objective.draw(items, Key(1))
        assert gradient_error(lambda call, o=objective, d=draw: o.loss(call, d).sum, network_call(items)) < 1e-6


def test_with_an_exact_diagonal_it_is_mean_flow() -> None:
    """A map exact on the diagonal and wrong off it, v the marginal velocity: the same value."""
    items = gaussian_items(PLANE)
    draw = ImprovedMeanFlow(diagonal=0.0).draw(items, Key(0))
    draw = replace(draw, v=PLANE.velocity(draw.x, items.expand(draw.t)))
    call = RightOnTheDiagonal(items, PLANE, 0.1)
    found, wanted = (o.loss(call, draw).sum for o in (ImprovedMeanFlow(power=0.0), MeanFlow(power=0.0)))
    assert float(wanted) > 1e-4
    assert abs(float(found - wanted)) < 1e-9


def test_the_papers_mix_is_the_default_of_any_guidance() -> None:
    for given, mix in (({"max_scale": 8.0}, "inverse"), ({"max_scale": 8.0, "mix": 0.0}, 0.0)):
        assert ImprovedMeanFlow(guidance=given).guidance.mix == mix  # type: ignore[arg-type]
    assert ImprovedMeanFlow(guidance=TargetGuidance(scale=2.0)).guidance.mix == 0.0  # a complete TargetGuidance


def test_at_s_equal_t_it_is_flow_matching_twice() -> None:
    items = gaussian_items(PLANE, num=8)
    draw = ImprovedMeanFlow(diagonal=1.0).draw(items, Key(0))
    call = network_call(items)
    found = ImprovedMeanFlow(power=0.0, velocity_weight=0.5).loss(call, draw)
    assert abs(float((found.sum - 1.5 * FlowMatching().loss(call, draw).sum).detach())) < 1e-9


def test_guidance_embedding_is_the_sampled_scale_except_in_the_null_branch() -> None:
    items = gaussian_items(PLANE, num=50)
    objective = ImprovedMeanFlow(guidance=TargetGuidance(max_scale=8.0, mix="inverse"))
    draw, call = objective.draw(items, Key(0)), network_call(items)
    objective.loss(call, draw)
    assert draw.scale is not None and float(draw.scale.max()) > 4
    for kind, _, _, beta in call.log:
        assert beta is None if kind == "null" else torch.equal(beta, 1 / draw.scale)
    assert {kind for kind, *_ in call.log} == {"null", "call", "derivative"}
