"""Guidance in training: one formula; the plain velocity where required; no effect at scale 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import PLANE, gaussian_items
from layouts import random_batch, small_model
from small_network import NetworkCall, network_call

from omni.objectives import build_objective
from omni.objectives.base import FlowObjective
from omni.objectives.target_guidance import TargetGuidance, guided_velocity
from omni.objectives.times import BatchNames
from omni.rng import Key

GUIDED = ["mean_flow", "improved_mean_flow", "alpha_flow", "consistency", "continuous_consistency"]


class NoNull(NetworkCall):
    def null(self) -> NetworkCall:
        raise ValueError("this batch has no null contexts")


@pytest.mark.parametrize("mix", [0.0, 0.92, "inverse"])
def test_every_mix_has_the_same_fixed_point(mix: float | str) -> None:
    """If the network equals w a + (1 - w) b, with a the true velocity and b the null one, v_g equals it too."""
    a, b = (Key(0).fold(n).normal((5, 2), torch.float64) for n in "ab")
    for w in (1.0, 1.5, 7.0):
        wanted = w * a + (1 - w) * b
        k = 1 - 1 / w if mix == "inverse" else float(mix)
        assert float((guided_velocity(a, wanted, b, w, k) - wanted).abs().max()) < 1e-12
        if k > 0 and w > 1:  # at w = 1 the three velocities sum to a
            assert float((guided_velocity(a, a, b, w, k) - wanted).abs().max()) > 1e-2 * (w - 1)


@pytest.mark.parametrize("name", GUIDED)
def test_scale_one_needs_no_null_context_and_changes_nothing(name: str) -> None:
    items = gaussian_items(PLANE, num=4)
    call = network_call(items)
    off = build_objective(name)
    on = build_objective(name, guidance={"scale": 2.0})
    assert isinstance(off, FlowObjective) and isinstance(on, FlowObjective)
    assert on.needs_null and not off.needs_null
    without = NoNull(**vars(call))
    assert torch.isfinite(off.loss(without, off.draw(items, Key(1))).sum)
    with pytest.raises(ValueError, match="no null contexts"):
        on.loss(without, on.draw(items, Key(1)))
    assert not torch.equal(on.loss(call, on.draw(items, Key(1))).sum, off.loss(call, off.draw(items, Key(1))).sum)


@pytest.mark.parametrize("name", GUIDED)
def test_dropped_items_train_as_without_guidance(name: str) -> None:
    """No item has its condition: beta = 1 and plain v, the loss without guidance."""
    items = gaussian_items(PLANE, num=4)
    dropped = replace(items, is_null=torch.ones(len(items), dtype=torch.bool))
    kept = replace(items, is_null=torch.zeros(len(items), dtype=torch.bool))
    plain = build_objective(name)
    guided = build_objective(name, guidance={"scale": 2.0})
    assert isinstance(plain, FlowObjective) and isinstance(guided, FlowObjective)
    wanted = float(plain.loss(network_call(items), plain.draw(items, Key(1))).sum.detach())
    losses = [float(guided.loss(network_call(i), guided.draw(i, Key(1))).sum.detach()) for i in (dropped, kept)]
    assert abs(losses[0] - wanted) < 1e-12 * abs(wanted)
    assert abs(losses[1] - wanted) > 1e-5 * abs(wanted)  # the adaptive weight hides differences


def test_outside_the_interval_the_velocity_is_plain_and_the_embedding_unchanged() -> None:
    items = gaussian_items(PLANE, num=200, size=1)
    objective = build_objective("mean_flow", guidance={"scale": 2.5, "mix": 0.92, "low": 0.3, "high": 0.8})
    draw = objective.draw(items, Key(1))
    call = network_call(items)
    embedded, v = objective.guidance.apply(call, draw)
    inside = ((draw.t >= 0.3) & (draw.t <= 0.8))[items.item[0]]
    assert 50 < int(inside.sum()) < 190
    moved = (v != draw.v).any(-1)[0]
    assert torch.equal(moved, inside)
    assert torch.equal(embedded.beta, torch.full_like(draw.t, 1 / 2.5))
    null, own = (c(draw.x, draw.t, draw.t).detach() for c in (call.null(), embedded))
    wanted = 0.2 * draw.v + (1 - 0.2 - 0.92) * null + 0.92 * own  # the paper's omega = 0.2, kappa = 0.92
    assert float((v - wanted)[:, inside].abs().max()) < 1e-12
    assert not v.requires_grad


def test_sampled_scales_have_the_density_w_to_minus_power() -> None:
    items = replace(gaussian_items(PLANE, num=2000, size=1), names=BatchNames(2000))
    for power in (0.0, 1.0, 2.0):
        w = TargetGuidance(max_scale=8.0, power=power).draw(items, Key(0))
        assert w is not None and float(w.min()) >= 1 and float(w.max()) <= 8
        share = float((w < 2).double().mean())
        cut = {0.0: 1 / 7, 1.0: 1 / 3, 2.0: 4 / 7}[power]
        assert abs(share - cut) < 0.04


def test_averaged_velocities_come_from_the_averaged_network() -> None:
    items = gaussian_items(PLANE, num=4)
    call = network_call(items)
    other = replace(call, held={name: 1.5 * value for name, value in call.held.items()})
    objective = build_objective("mean_flow", guidance={"scale": 2.0, "averaged": True})
    draw = objective.draw(items, Key(1))
    velocities = [objective.guidance.apply(c, draw)[1] for c in (call, other)]
    assert float((velocities[0] - velocities[1]).abs().max()) > 1e-3


def test_bad_options_are_refused() -> None:
    for options, match in [
        ({"scale": 2.0, "max_scale": 1.5}, "max_scale must be above scale"),
        ({"mix": 1.0}, "mix must be in"),
        ({"low": 0.8, "high": 0.3}, "low must be below high"),
    ]:
        with pytest.raises(ValueError, match=match):
            TargetGuidance(**options)


@pytest.mark.parametrize("name", [*GUIDED, "shortcut"])
def test_guidance_runs_in_the_model(name: str) -> None:
    """With Omni's own null contexts (here the batch itself); without them the error names the way out."""
    model = small_model().train()
    batch = random_batch(Key(2).fold("guided"))
    options = {"guidance_scale": 1.5, "bootstrap": 0.5} if name == "shortcut" else {"guidance": {"max_scale": 8.0}}
    objective = build_objective(name, **options)
    term = model(replace(batch, null=batch), [objective], Key(3))[type(objective).__name__]
    term.sum.backward()
    assert torch.isfinite(term.sum) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="null_contexts=True"):
        model(batch, [objective], Key(3))
