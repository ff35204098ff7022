"""Rectified jumps: if lines do not cross, the loss is 0 at a map that is exact in one jump and in many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import PLANE, gaussian_items
from small_network import gradient_error, network_call

from omni.objectives.flow_matching import FlowMatching
from omni.objectives.rectified_jumps import JumpDraw, RectifiedJumps
from omni.objectives.weighting import adaptive
from omni.rng import Key
from omni.samplers import SAMPLERS, run_sampler, time_grid


class Line:
    """F of the lines from eps to a = M eps, as a function of x_t alone: x_t = ((1 - t) M + t) eps."""

    def __init__(self, M: torch.Tensor) -> None:
        self.M, self.eye = M, torch.eye(len(M)).double()

    def guided(self, beta: torch.Tensor) -> Line:
        return self

    def __call__(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        mixed = torch.stack([(1 - u) * self.M + u * self.eye for u in t])
        noise = torch.linalg.solve(mixed, x[0].unsqueeze(-1)).squeeze(-1)
        return (noise - noise @ self.M.T)[None]


def linear_draw(objective: RectifiedJumps, M: torch.Tensor) -> JumpDraw:
    """Items whose data is M times their noise: no lines cross."""
    items = gaussian_items(PLANE, num=64, size=1)
    items = replace(items, latents=items.noise(Key(2)) @ M.T)
    return objective.draw(items, Key(2))


def test_lines_without_crossings_are_exact_in_any_number_of_steps() -> None:
    M = torch.tensor([[0.5, 0.2], [0.2, 0.8]]).double()
    draw, line = linear_draw(RectifiedJumps(), M), Line(M)
    assert float(RectifiedJumps().loss(line, draw).sum) < 1e-20
    assert float(RectifiedJumps().loss(Line(M * 1.1), draw).sum) > 1e-2
    for steps in (1, 2, 4, 8):

        def velocity(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
            at = [torch.full((len(x),), time).double() for time in (t, s)]
            return line(x[None], *at)[0]

        states = list(run_sampler(SAMPLERS.get("flow_map"), velocity, draw.noise[0], time_grid(steps)))
        assert float((states[-1].x - draw.noise[0] @ M.T).abs().max()) < 1e-10


def test_times_are_of_whole_jumps_and_velocities_embed_no_guidance() -> None:
    items = gaussian_items(PLANE, num=400)
    draw = RectifiedJumps(jumps=(1, 4), shares=(3, 1), velocity=0.25, guidance_embedding=2.0).draw(items, Key(0))
    is_velocity = draw.t == draw.s
    assert 0.18 < float(is_velocity.float().mean()) < 0.32
    assert torch.equal(draw.beta, torch.where(is_velocity, 1.0, 0.5).double())
    length = (draw.t - draw.s)[~is_velocity]
    assert set(length.tolist()) == {0.25, 1.0} and 0.68 < float((length == 1).float().mean()) < 0.82
    quarters = draw.t[~is_velocity][length == 0.25]
    assert set(quarters.tolist()) == {0.25, 0.5, 0.75, 1.0}
    whole = RectifiedJumps(jumps=(1,), velocity=0.0).draw(items, Key(0))
    assert bool((whole.t == 1).all()) and bool((whole.s == 0).all()) and bool((whole.beta == 1).all())


def test_velocities_alone_are_flow_matching() -> None:
    items, call = gaussian_items(PLANE), network_call(gaussian_items(PLANE))
    straight, flow = RectifiedJumps(velocity=1.0), FlowMatching()
    draw = straight.draw(items, Key(0))
    assert torch.equal(draw.x, flow.draw(items, Key(0)).x)
    found, wanted = (objective.loss(call, draw).sum for objective in (straight, flow))
    assert abs(float((found - wanted).detach())) < 1e-12


def test_large_errors_of_jumps_weigh_less_and_of_velocities_do_not() -> None:
    """e (offset / (e + offset))^power for a jump; at an exact prediction it has the slope of the square."""
    M = torch.tensor([[0.5, 0.2], [0.2, 0.8]]).double()
    robust, plain = RectifiedJumps(power=1.0, offset=0.1, velocity=0.0), RectifiedJumps(velocity=0.0)
    draw = linear_draw(plain, M)
    for scale, low, high in ((1.001, 0.99, 1.0), (3.0, 0.0, 0.3)):
        call = Line(M * scale)
        ratio = float(robust.loss(call, draw).sum / plain.loss(call, draw).sum)
        assert low <= ratio <= high
    items = gaussian_items(PLANE, num=6)
    call = network_call(items)
    velocity = robust.model_copy(update={"velocity": 1.0})
    draw = velocity.draw(items, Key(0))
    assert float(velocity.loss(call, draw).sum) == pytest.approx(float(FlowMatching().loss(call, draw).sum))


def test_a_jump_predicts_the_likeliest_of_two_ends() -> None:
    """Ends 0 with odds 2 and 1 with odds 1: the optimum of the square is a third; that of the levelled loss is near
    0."""
    x = torch.linspace(0, 1, 1001).double().requires_grad_()
    best = []
    for power in (0.0, 1.0):
        slope = sum(
            odds * torch.autograd.grad(adaptive((x - end) ** 2, power, 0.1).sum(), x)[0]
            for odds, end in ((2, 0), (1, 1))
        )
        best.append(float(x.detach()[(slope > 0).nonzero()[0, 0]]))
    assert best[0] == pytest.approx(1 / 3, abs=2e-3) and best[1] < 0.07


def test_gradient_equals_central_differences() -> None:
    items = gaussian_items(PLANE, num=6)
    draw = RectifiedJumps().draw(items, Key(1))
    assert gradient_error(lambda call: RectifiedJumps().loss(call, draw).sum, network_call(items)) < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [({"jumps": ()}, "one or more counts"), ({"jumps": (0,)}, "at least 1"), ({"shares": (1.0,)}, "each of the 4")],
)
def test_invalid_jumps_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedJumps(**options)
