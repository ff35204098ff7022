"""Terminal Velocity Matching: exact at the exact map, its gradient, its formula recomputed, guidance, times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import NetworkCall, gradient_error, network_call
from torch import Tensor

from omni.objectives.base import Draw, Items
from omni.objectives.flow_matching import FlowMatching
from omni.objectives.terminal_velocity import TerminalDraw, TerminalVelocity
from omni.objectives.times import BatchNames, PairDistribution, TimeDistribution
from omni.rng import Key

VARIANTS = [
    {},
    {"detach_tangent": True},
    {"guidance_scale": 2.0},
    {"guidance_scale": 2.0, "scaled": True},
    {"guidance_range": (1.0, 4.0), "scaled": True},
]


def items_with_null(num: int = 6) -> Items:
    items = gaussian_items(PLANE, num=num)
    return replace(items, is_null=torch.arange(num) % 3 == 0)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map(distribution: Gaussian, detach: bool) -> None:
    """The terminal term as sampled; the flow term with the marginal velocity instead of the conditional one."""
    objective, items = TerminalVelocity(detach_tangent=detach), gaussian_items(distribution)
    draw = objective.draw(items, Key(0))
    draw = replace(draw, v=distribution.velocity(draw.flow_x, items.expand(draw.flow_t)))
    exact, wrong = GaussianCall(items, distribution), GaussianCall(items, distribution, 0.1)
    assert float(objective.terminal_error(exact, draw).max()) < 1e-8
    assert float(objective.terminal_error(wrong, draw).mean()) > 1e-4
    assert float(objective.loss(exact, draw).sum) < 1e-8 < 1e-2 < float(objective.loss(wrong, draw).sum)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradient_equals_central_differences(options: dict) -> None:
    objective, items = TerminalVelocity(**options), items_with_null()
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


def test_the_detached_tangent_has_the_value_but_not_the_gradient() -> None:
    items = gaussian_items(PLANE, num=6)
    call, found = network_call(items), []
    for detach in (False, True):
        objective = TerminalVelocity(detach_tangent=detach)
        value = objective.loss(call, objective.draw(items, Key(1))).sum
        found.append((value.detach(), *torch.autograd.grad(value, [call.live["w1"]])))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) > 1e-2


def computed_again(call: NetworkCall, draw: TerminalDraw, w: Tensor, scaled: bool) -> Tensor:
    """The loss from its formulas, with dF/ds by central differences: (I,)."""
    items, s, t, x, h = draw.items, draw.s, draw.t, draw.x, 1e-6
    call, factor = call.guided(1 / w), items.expand(w) if scaled else 1.0
    rate = (call(x, t, s + h) - call(x, t, s - h)) / (2 * h)
    F, gap = call(x, t, s), items.expand(s - t)
    landing = x + gap * factor * F
    terminal = factor * (F + gap * rate) - factor * call(landing, s, s)
    ww, fx, ft = items.expand(w), draw.flow_x, draw.flow_t
    flow = factor * call(fx, ft, ft) - (ww * draw.v + (1 - ww) * call.null()(fx, ft, ft))
    return items.mean((terminal.pow(2) + flow.pow(2)).mean(-1)) / w**2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"guidance_range": (1.0, 4.0)}])
def test_the_loss_is_its_formula(options: dict, scaled: bool) -> None:
    objective, items = TerminalVelocity(**options, scaled=scaled), items_with_null()
    draw, call = objective.draw(items, Key(2)), network_call(items)
    assert bool((draw.beta[items.is_null] == 1).all())
    with torch.no_grad():
        wanted = (computed_again(call, draw, 1 / draw.beta, scaled) * items.counts).sum()
        other = (computed_again(call, draw, 1.1 / draw.beta, scaled) * items.counts).sum()
    found = objective.loss(call, draw).sum.detach()
    assert float((found - wanted).abs() / wanted) < 1e-7 and float((found - other).abs() / wanted) > 1e-3


def test_without_jumps_it_is_flow_matching() -> None:
    """s = t for all: the terminal term is zero, and the rest is flow matching at s'."""
    items = gaussian_items(PLANE, num=20)
    objective = TerminalVelocity(pair=PairDistribution(kind="gap", diagonal=1.0))
    draw, call = objective.draw(items, Key(3)), network_call(items)
    plain = Draw(draw.flow_x, draw.v, draw.flow_t, draw.flow_t, items, draw.noise)
    a, b = objective.loss(call, draw), FlowMatching().loss(call, plain)
    jumps = TerminalVelocity().loss(call, TerminalVelocity().draw(items, Key(3)))
    assert a.count == b.count
    assert float((a.sum - b.sum).detach().abs()) < 1e-9 < float((jumps.sum - b.sum).detach().abs())


def test_null_contexts_are_needed_only_with_guidance() -> None:
    items = items_with_null()
    for objective in (TerminalVelocity(**options) for options in VARIANTS):
        call = network_call(items)
        objective.loss(call, objective.draw(items, Key(4)))
        null = [beta for kind, _, _, beta in call.log if kind == "null"]
        assert len(null) == (1 if objective.needs_null else 0) and null in ([], [None])
    betas = TerminalVelocity(guidance_range=(1.25, 4.0)).draw(gaussian_items(LINE, num=500), Key(5)).beta
    assert float(betas.min()) > 0.25 and float(betas.max()) < 0.8
    assert abs(float(betas.mean()) - 0.525) < 0.02  # uniform in beta, not in w
    with pytest.raises(ValueError, match="guidance_range must be"):
        TerminalVelocity(guidance_range=(3.0, 2.0))
    with pytest.raises(ValueError, match="not both"):
        TerminalVelocity(guidance_range=(1.0, 2.0), guidance_scale=2.0)


def test_the_target_is_the_target_network_at_the_end_of_the_jump() -> None:
    """One call at (s, s) with the same beta; no gradient reaches it or the end point."""
    items = gaussian_items(PLANE, num=6)
    objective, call = TerminalVelocity(guidance_scale=2.0), network_call(items)
    draw = objective.draw(items, Key(1))
    asked: list[Tensor] = []

    class Watched(NetworkCall):
        def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            if self.frozen and not self.is_null:
                asked.append(x)
                assert torch.equal(t, draw.s) and torch.equal(s, draw.s)
                assert self.beta is not None and bool((self.beta == 0.5).all())
            return super().__call__(x, t, s)

    objective.loss(Watched(items, call.live, call.held), draw)
    [landing] = asked
    with torch.no_grad():
        wanted = draw.x + items.expand(draw.s - draw.t) * call.guided(draw.beta)(draw.x, draw.t, draw.s)
    assert not landing.requires_grad and torch.allclose(landing, wanted, atol=1e-12)


def test_times_follow_the_paper() -> None:
    """gap = sigmoid(z - 0.8); s logit-normal(-0.4, 1) given s <= 1 - gap; t = s + gap; s' its own logit-normal."""
    n, objective = 4000, TerminalVelocity()
    names, density = BatchNames(n), TimeDistribution(mean=-0.4)
    t, s = objective.pair.draw(names, Key(6))
    own = objective.time.draw(names, Key(6), "flow time")
    gap = t - s
    assert float(gap.min()) > 0 and float(s.min()) > 0 and float(t.max()) <= 1

    def cdf(value: Tensor, mean: float) -> Tensor:
        return torch.special.ndtr(torch.logit(value) - mean)

    def from_uniform(u: Tensor) -> float:
        return float((u.sort().values - (torch.arange(n) + 0.5) / n).abs().max())

    shares = cdf(gap, -0.8), cdf(s, -0.4) / cdf(1 - gap, -0.4), cdf(own, -0.4)
    assert max(map(from_uniform, shares)) < 1.63 / n**0.5  # Kolmogorov-Smirnov at 1%
    assert from_uniform(cdf(s, -0.4)) > 0.05  # untruncated it would be uniform
    assert density == objective.time and abs(float(torch.corrcoef(torch.stack([*shares]))[0, 2])) < 0.05
