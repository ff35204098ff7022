"""Shortcut models: two halves of a jump at the exact map, the dyadic pairs, guidance at the finest level only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call

from omni.objectives.base import Draw
from omni.objectives.flow_matching import FlowMatching
from omni.objectives.shortcut import Shortcut
from omni.objectives.times import BatchNames
from omni.rng import Key


def at(draw: Draw, t: float, s: float) -> Draw:
    times = torch.full_like(draw.t, t), torch.full_like(draw.t, s)
    return replace(draw, x=draw.items.interpolate(draw.noise, times[0]), t=times[0], s=times[1])


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_residual_vanishes_at_the_exact_map(distribution: Gaussian) -> None:
    """All levels but the finest (sampled with one level fewer), whose halves are Euler steps."""
    items = gaussian_items(distribution, num=200, size=1)
    draw = Shortcut(num_levels=6, bootstrap=1.0).draw(items, Key(0))
    objective = Shortcut(num_levels=7, clip=None)
    exact, wrong = (float(objective.loss(GaussianCall(items, distribution, e), draw).sum) for e in (0.0, 0.1))
    assert exact < 1e-8 < 1e-4 < wrong


def test_the_finest_level_is_two_euler_steps() -> None:
    """Against the exact map its target has an error of O(d): the squared error falls four times when d halves."""
    items = gaussian_items(LINE, num=200, size=1)
    errors = []
    for levels in (4, 5, 6):
        objective = Shortcut(num_levels=levels, clip=None)
        draw = at(objective.draw(items, Key(0)), 0.5, 0.5 - objective.finest)
        errors.append(float(objective.loss(GaussianCall(items, LINE), draw).sum))
    assert errors[0] > 1e-8 and all(3 < a / b < 5.5 for a, b in zip(errors, errors[1:], strict=False))
    call = network_call(items)
    objective = Shortcut()
    objective.loss(call, at(objective.draw(items, Key(0)), 0.5, 0.5 - objective.finest))
    asked = [(round(float(t[0] * 128)), round(float(s[0] * 128))) for _, t, s, _ in call.log]
    assert asked == [(64, 64), (63, 63), (64, 62)]  # diagonal, diagonal, then the jump itself


@pytest.mark.parametrize("options", [{}, {"bootstrap": 1.0}, {"bootstrap": 1.0, "guidance_scale": 1.5, "clip": None}])
def test_gradient_equals_central_differences(options: dict) -> None:
    items = gaussian_items(PLANE, num=6)
    objective = Shortcut(**options)
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


def test_without_bootstrap_it_is_flow_matching() -> None:
    items = gaussian_items(PLANE)
    objective = Shortcut(bootstrap=0.0)
    draw = objective.draw(items, Key(0))
    call = network_call(items)
    found, wanted = objective.loss(call, draw), FlowMatching().loss(call, draw)
    assert torch.equal(draw.t, draw.s) and abs(float((found.sum - wanted.sum).detach())) < 1e-9


def test_pairs_are_dyadic_levels_equally_likely_and_a_share_is_bootstrapped() -> None:
    items = replace(gaussian_items(LINE, num=4000, size=1), names=BatchNames(4000))
    draw = Shortcut().draw(items, Key(0))
    jumps = draw.t > draw.s
    assert abs(float(jumps.double().mean()) - 1 / 8) < 0.02
    draw = Shortcut(bootstrap=1.0).draw(items, Key(0))
    d = draw.t - draw.s
    level = -torch.log2(d)
    assert torch.equal(level, level.round()) and torch.equal(draw.t / d, (draw.t / d).round())
    counts = torch.bincount(level.long(), minlength=7)
    assert len(counts) == 7 and float((counts / 4000 - 1 / 7).abs().max()) < 0.03
    assert float(draw.s.min()) == 0.0 and float(draw.t.max()) == 1.0
    free = Shortcut(bootstrap=1.0, dyadic=False).draw(items, Key(0))
    assert len(torch.unique(free.t - free.s)) > 3000


def test_guidance_at_the_finest_level_only_and_never_without_condition() -> None:
    items = gaussian_items(PLANE, num=8)
    plain, guided = Shortcut(clip=None), Shortcut(clip=None, guidance_scale=2.0)
    draw = plain.draw(items, Key(0))
    fine, coarse = at(draw, 0.5, 0.5 - plain.finest), at(draw, 0.5, 0.25)

    def difference(draw: Draw) -> float:
        call = network_call(draw.items)
        return abs(float((plain.loss(call, draw).sum - guided.loss(call, draw).sum).detach()))

    dropped = replace(fine, items=replace(items, is_null=torch.ones(len(items), dtype=torch.bool)))
    assert guided.needs_null and not plain.needs_null
    assert difference(fine) > 1e-2 and difference(coarse) == 0 and difference(dropped) == 0
    call = network_call(items)
    first = 2 * call(fine.x, fine.t, fine.t) - call.null()(fine.x, fine.t, fine.t)
    m = fine.t - plain.finest / 2
    x = fine.x - plain.finest / 2 * first
    wanted = (first + 2 * call(x, m, m) - call.null()(x, m, m)) / 2
    assert float((guided._two_halves(call, fine) - wanted).abs().max().detach()) < 1e-12


def test_guidance_embedding_separates_two_fields() -> None:
    """Jumps, in the loss and in the halves of coarse levels, embed beta = 1 / w; velocities and items without condition
    1."""
    dropped = torch.tensor([False, True] * 4)
    items = replace(gaussian_items(PLANE, num=8), is_null=dropped)
    objective = Shortcut(clip=None, num_levels=3, guidance_scale=2.0, embed_guidance=True)
    embedded, plain = torch.where(dropped, 1.0, 0.5).double(), torch.ones(8, dtype=torch.float64)
    draw = objective.draw(items, Key(0))
    for s, wanted in (
        (0.25, (plain, plain, embedded)),
        (0.0, (embedded, embedded, embedded)),
        (0.5, (plain, plain, plain)),
    ):
        call = network_call(items)
        objective.loss(call, at(draw, 0.5, s))
        own = [beta for kind, _, _, beta in call.log if kind == "call"]
        assert all(torch.equal(beta.double(), w) for beta, w in zip(own, wanted, strict=True)), s


def test_shares_of_levels() -> None:
    items = replace(gaussian_items(LINE, num=4000, size=1), names=BatchNames(4000))
    draw = Shortcut(num_levels=3, shares=(1.0, 0.0, 3.0), bootstrap=1.0).draw(items, Key(0))
    d = draw.t - draw.s
    assert sorted(set(d.tolist())) == [0.25, 1.0] and abs(float((d == 1).double().mean()) - 0.25) < 0.02
    with pytest.raises(ValueError, match="3 weights, one per level"):
        Shortcut(num_levels=3, shares=(1.0, 1.0))
    with pytest.raises(ValueError, match="embed_guidance has no effect"):
        Shortcut(embed_guidance=True)


def test_clip_bounds_the_midpoint_and_the_target() -> None:
    items = gaussian_items(LINE, num=8)
    draw = at(Shortcut().draw(items, Key(0)), 1.0, 0.5)
    far = replace(draw, x=draw.x + 30)
    call = GaussianCall(items, LINE, 1.0)
    assert float(Shortcut()._two_halves(call, far).abs().max()) == 4.0
    assert float(Shortcut(clip=None)._two_halves(call, far).abs().max()) > 10


def test_the_target_has_the_averaged_weights() -> None:
    items = gaussian_items(PLANE, num=8)
    call = network_call(items)
    other = replace(call, held={name: 1.5 * value for name, value in call.held.items()})
    draw = at(Shortcut().draw(items, Key(0)), 1.0, 0.5)
    a, b = (float(Shortcut().loss(c, draw).sum.detach()) for c in (call, other))
    assert abs(a - b) > 1e-3 and Shortcut().target_decay == 0.999
