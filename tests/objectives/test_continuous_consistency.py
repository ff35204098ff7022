"""sCM in Omni's coordinates: its tangent against its own definition on the circle, and against MeanFlow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import NetworkCall, gradient_error, network_call
from torch import Tensor

from omni.objectives.continuous_consistency import ContinuousConsistency
from omni.objectives.mean_flow import MeanFlow
from omni.objectives.target_guidance import GuidedDraw, TargetGuidance
from omni.rng import Key


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map_with_the_marginal_velocity(distribution: Gaussian) -> None:
    items = gaussian_items(distribution)
    for normalise in ("none", "rms", "norm"):
        objective = ContinuousConsistency(normalise=normalise)
        draw = objective.draw(items, Key(0))
        draw = replace(draw, v=distribution.velocity(draw.x, items.expand(draw.t)))
        exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.1))
        assert exact < 1e-8 < 1e-4 < wrong


@pytest.mark.parametrize("options", [{}, {"normalise": "norm"}, {"normalise": "none", "power": 1.0}])
def test_gradient_equals_central_differences(options: dict) -> None:
    items = gaussian_items(PLANE, num=3)
    for guidance in (TargetGuidance(), TargetGuidance(scale=2.0)):
        objective = ContinuousConsistency(guidance=guidance, **options)
        draw = objective.draw(items, Key(1))
        assert gradient_error(lambda call, o=objective, d=draw: o.loss(call, d).sum, network_call(items)) < 1e-6


def trigonometric_tangent(call: NetworkCall, draw: GuidedDraw, r: float) -> Tensor:
    """g as sCM defines it (Algorithm 1, sigma_d = 1), on the circle, from a network of the circle's own variables:

    g = -cos^2 (F' - dx) - r cos sin (x + dF'/dtau), where F' is sCM's network and dx = cos eps - sin x0.
    """
    items = draw.items

    def network(x: Tensor, tau: Tensor) -> Tensor:
        c, s = items.expand(tau.cos()), items.expand(tau.sin())
        t = tau.sin() / (tau.sin() + tau.cos())
        house = x / (c + s)
        x0 = house - items.expand(t) * call(house, t, torch.zeros_like(t))
        return (c * x - x0) / s

    tau = torch.atan2(draw.t, 1 - draw.t)
    c, s = items.expand(tau.cos()), items.expand(tau.sin())
    x, dx = c * items.latents + s * draw.noise, c * draw.noise - s * items.latents
    value, rate = torch.func.jvp(network, (x, tau), (dx, torch.ones_like(tau)))
    return -(c**2) * (value - dx) - r * c * s * (x + rate)


@pytest.mark.parametrize("progress", [0.0, 0.03, 0.1, 1.0])
def test_tangent_is_that_of_trigflow(progress: float) -> None:
    items = replace(gaussian_items(PLANE, num=16), progress=progress)
    objective = ContinuousConsistency()
    draw, call = objective.draw(items, Key(0)), network_call(items)
    with torch.no_grad():
        found = objective.tangent(call, draw, draw.v, call(draw.x, draw.t, draw.s))
        wanted = trigonometric_tangent(call, draw, min(1.0, progress / 0.1))
        assert float((found - wanted).abs().max()) < 1e-9
        assert float((found - trigonometric_tangent(call, draw, 0.5)).abs().max()) > 1e-3


def test_it_is_mean_flow_at_time_zero_up_to_a_weight() -> None:
    """Without normalisation the loss is (1 - t)^2 n^2 and its gradient (1 - t) n^2 times MeanFlow's at s = 0."""
    items = gaussian_items(PLANE, num=1)
    for n in range(5):
        objective, mean_flow = ContinuousConsistency(normalise="none"), MeanFlow(power=0.0)
        draw, call = objective.draw(items, Key(n)), network_call(items)
        a, b = objective.loss(call, draw).sum, mean_flow.loss(call, draw).sum
        t = float(draw.t)
        square = (1 - t) ** 2 + t**2
        assert abs(float(a.detach()) - (1 - t) ** 2 * square * float(b.detach())) < 1e-9
        for g, h in zip(*(torch.autograd.grad(e, list(call.live.values())) for e in (a, b)), strict=True):
            assert float((g - (1 - t) * square * h).abs().max()) < 1e-9
            assert float(g.abs().max()) > 1e-4


def test_normalised_tangents_have_the_published_size() -> None:
    """A block's loss is (|g| / (|g| + c))^2 / D, in the norm; without the 1 / D in root mean squares."""
    items = gaussian_items(PLANE, num=1)
    draw = ContinuousConsistency().draw(items, Key(0))
    call = network_call(items)
    g = float(ContinuousConsistency(normalise="none").loss(call, draw).sum.detach()) / 4  # 4 latents; mean square
    for normalise, size in (("norm", (g * 8) ** 0.5), ("rms", g**0.5)):
        found = float(ContinuousConsistency(normalise=normalise).loss(call, draw).sum.detach()) / 4  # type: ignore[arg-type]
        wanted = (size / (size + 0.1)) ** 2 / (8 if normalise == "norm" else 1)
        assert abs(found - wanted) < 1e-12


def test_nothing_overflows_near_noise() -> None:
    """The direction of the derivative vanishes at t = 1 and t = 0."""
    items = gaussian_items(PLANE, num=4)
    objective = ContinuousConsistency()
    draw = objective.draw(items, Key(0))
    for t in (0.0, 1.0):
        times = torch.full_like(draw.t, t)
        edge = replace(draw, t=times, x=items.interpolate(draw.noise, times))
        call = network_call(items)
        with torch.no_grad():
            g = objective.tangent(call, edge, edge.v, call(edge.x, times, edge.s))
            first = (1 - t) ** 2 * (edge.v - call(edge.x, times, edge.s))
        assert float((g - first).abs().max()) < 1e-12
