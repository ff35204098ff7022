"""Generative drifting: the field, the released loss and its constants, guidance, features, gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from clouds import cloud, standard_errors
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from small_network import gradient_error, network_call
from torch import Tensor

from omni.objectives.base import Items
from omni.objectives.drift_field import Affinity, Targets, distances, drift
from omni.objectives.drifting import DriftDraw, Drifting, SampleGuidance
from omni.objectives.features import FEATURES
from omni.objectives.particles import gather, jump_in_float32
from omni.rng import Key

DOUBLE = torch.float64
FIELD = {"affinity": "row", "unit_force": False, "temperatures": (0.3,)}  # the paper's, at one temperature
KINDS: list[Affinity] = ["joint", "row"]


def random_targets(num: int = 5, positives: int = 4, negatives: int = 6, groups: int = 2) -> tuple[Tensor, Targets]:
    """Particles distinct from their negatives: none is its own target."""
    x = Key(0).normal((groups, num, 3), DOUBLE)
    vectors = Key(1).normal((groups, negatives + positives, 3), DOUBLE)
    weight = 0.5 + Key(2).uniform((groups, negatives + positives), DOUBLE)
    return x, Targets(vectors, negatives, weight, torch.zeros(num, negatives + positives, dtype=torch.bool))


# ---- the field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_field_changes_sign_with_its_targets(kind: Affinity) -> None:
    x, targets = random_targets()
    fields = []
    for one in (targets, targets.swapped()):
        distance, mean = distances(x, one, per_group=True)
        fields.append(drift(x, one, distance / mean / 0.3, kind, 1e-6))
    assert float((fields[0] + fields[1]).abs().max()) < 1e-12 < 1e-2 < float(fields[0].abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_field_vanishes_where_targets_are_the_same(kind: Affinity) -> None:
    x, targets = random_targets(positives=6)
    k = targets.num_negatives
    same = replace(
        targets, vectors=torch.cat([targets.vectors[:, :k]] * 2, 1), weight=torch.cat([targets.weight[:, :k]] * 2, 1)
    )
    distance, _ = distances(x, same, per_group=True)
    assert float(drift(x, same, distance / 0.3, kind, 1e-6).abs().max()) < 1e-12


def test_the_papers_field_is_two_mean_shifts() -> None:
    x, targets = random_targets(groups=1)
    k, tau = targets.num_negatives, 0.7
    distance, _ = distances(x, targets, per_group=True)
    found = drift(x, targets, distance / tau, "row", 0.0)
    for j in range(x.shape[1]):
        shifts = []
        for place in (slice(k, None), slice(0, k)):
            total, mass = torch.zeros(3, dtype=DOUBLE), 0.0
            for y, w in zip(targets.vectors[0, place], targets.weight[0, place], strict=True):
                kernel = float(w) * math.exp(-float((y - x[0, j]).pow(2).sum().sqrt()) / tau)
                total, mass = total + kernel * (y - x[0, j]), mass + kernel
            shifts.append(total / mass)
        assert torch.allclose(found[0, j], shifts[0] - shifts[1], rtol=1e-10)


def released(x: Tensor, extra: Tensor, y: Tensor, extra_weight: float, taus: tuple[float, ...]) -> tuple[float, Tensor]:
    """(loss, V) of one group by the released code, number by number: x (M, D), extra (K, D), y (P, D)."""
    targets = [*x, *extra, *y]
    weight = [1.0] * len(x) + [extra_weight] * len(extra) + [1.0] * len(y)
    M, T, D, split = len(x), len(targets), x.shape[1], len(x) + len(extra)
    d = [[float((x[j] - targets[n]).pow(2).sum().sqrt()) for n in range(T)] for j in range(M)]
    mean = sum(weight[n] * d[j][n] for j in range(M) for n in range(T)) / (M * T) / (sum(weight) / T)
    c = mean / math.sqrt(D)
    logit = lambda j, n, tau: -(d[j][n] / mean + (100 if j == n else 0)) / tau  # noqa: E731
    V = torch.zeros(M, D, dtype=DOUBLE)
    for tau in taus:
        rows = [torch.tensor([logit(j, n, tau) for n in range(T)], dtype=DOUBLE).softmax(0) for j in range(M)]
        columns = [torch.tensor([logit(j, n, tau) for j in range(M)], dtype=DOUBLE).softmax(0) for n in range(T)]
        force = torch.zeros(M, D, dtype=DOUBLE)
        for j in range(M):
            a = [math.sqrt(max(float(rows[j][n] * columns[n][j]), 1e-6)) * weight[n] for n in range(T)]
            for n in range(T):
                factor = -a[n] * sum(a[split:]) if n < split else a[n] * sum(a[:split])
                force[j] += factor * (targets[n] - x[j]) / c
        V += force / force.pow(2).mean().sqrt()
    return float(V.pow(2).mean()), V


@pytest.mark.parametrize("taus", [(0.02, 0.05, 0.2), (0.2,)])
def test_the_loss_is_the_released_one(taus: tuple[float, ...]) -> None:
    """t = 1, s = 0, one group of 6 with two items without condition, alpha > 1; written as a loop."""
    items = replace(gaussian_items(PLANE, num=6, size=2), is_null=torch.tensor([0, 0, 1, 0, 1, 0]).bool())
    guidance = SampleGuidance(max_scale=4.0, plain=0.0)
    objective = Drifting(temperatures=taus, guidance=guidance)
    draw, call = objective.draw(items, Key(0)), network_call(items)
    alpha = float(draw.alpha[0])
    assert 1 < alpha < 4 and draw.alpha.tolist() == [alpha, alpha, 1, alpha, 1, alpha]
    with torch.no_grad():
        y = items.flat(jump_in_float32(call.guided(1 / draw.alpha), draw.x, draw.t, draw.s, items)).flatten(1)
    data = items.flat(items.latents).flatten(1)
    plain, null = torch.tensor([0, 1, 3, 5]), torch.tensor([2, 4])
    first, _ = released(y[plain], data[null], data[plain], (alpha - 1) * 3 / 2, taus)
    second, _ = released(y[null], data[:0], data[null], 0.0, taus)
    terms = objective.loss(call, draw)
    wanted = (4 * first + 2 * second) / 6
    assert abs(float(terms.sum.detach()) / terms.count - wanted) < 1e-9 * wanted
    assert torch.equal(call.log[-1][3], 1 / draw.alpha)  # type: ignore[arg-type]  (the network reads it)


def test_one_temperature_makes_the_loss_constant_but_not_the_force() -> None:
    """V over its root mean square has mean square 1 for every network; with three temperatures it varies."""
    items = cloud(PLANE, 800)
    values, forces, three = [], [], []
    for error in (0.0, 0.3, 0.9):
        call, key = GaussianCall(items, PLANE, error), Key(0)
        objective = Drifting(particles=200, temperatures=(0.2,))
        terms = objective.loss(call, objective.draw(items, key))
        values.append(float(terms.sum) / terms.count)
        reported = Drifting(particles=200, temperatures=(0.2,), report="force")
        embedded = reported.loss(call, reported.draw(items, key))
        forces.append(float(embedded.sum) / embedded.count)
        assert abs(forces[-1] - float(objective.force(call, objective.draw(items, key)).mean())) < 1e-12
        several = Drifting().loss(call, Drifting().draw(items, key))
        three.append(float(several.sum) / several.count)
    assert all(abs(value - 1) < 1e-9 for value in values)
    assert forces[0] < forces[1] < forces[2] and max(three) - min(three) > 0.01


def test_report_does_not_change_the_gradient() -> None:
    items = gaussian_items(PLANE, num=8)
    gradients = []
    for report in ("loss", "force"):
        objective, call = Drifting(report=report), network_call(items)  # type: ignore[arg-type]
        loss = objective.loss(call, objective.draw(items, Key(0))).sum
        gradients.append(torch.autograd.grad(loss, call.live["w1"])[0])
    assert torch.allclose(*gradients, rtol=1e-12)


# ---- the population ------------------------------------------------------------------------------------------------

NUMBERS = [pytest.param(20_000, id="20k"), pytest.param(100_000, id="100k", marks=pytest.mark.slow)]


def products(distribution: Gaussian, num: int, error: float, **options: object) -> Tensor:
    """V . V' at fixed points, mean over points, for pairs of independent groups of 100: |E V|^2 without bias."""
    objective = Drifting(particles=100, **FIELD, **options)  # type: ignore[arg-type]
    points = distribution.sample(Key(9), 1, 20)
    found = []
    for chunk in range(num // 10_000):
        items = cloud(distribution, 10_000, key=Key(chunk).fold("data"))
        draw = objective.draw(items, Key(chunk))
        y = jump_in_float32(GaussianCall(items, distribution, error), draw.x, draw.t, draw.s, items)
        for value in fields(objective, draw, items, y, points):
            pairs = value.unflatten(0, (-1, 2))
            found.append((pairs[:, 0] * pairs[:, 1]).mean((1, 2)))
    return torch.cat(found)


def fields(objective: Drifting, draw: DriftDraw, items: Items, y: Tensor, points: Tensor) -> Iterator[Tensor]:
    """V (G, points, D) of each group's particles and positives, in the features' units."""
    for members in draw.groups.members:
        generated, data = (gather(items, value, members).flatten(2) for value in (y, draw.positives))
        vectors = torch.cat([generated, data], 1)
        own = torch.zeros(points.shape[1], vectors.shape[1], dtype=torch.bool)
        targets = Targets(vectors, generated.shape[1], torch.ones(vectors.shape[:2], dtype=DOUBLE), own)
        goal = objective.goal(points.expand(len(members), -1, -1), targets)
        yield goal.goal - goal.x


@pytest.mark.parametrize("num", NUMBERS)
@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_the_field_is_zero_in_the_population_at_the_exact_map(distribution: Gaussian, num: int) -> None:
    """Within 4 standard errors at the exact map, beyond 8 at a wrong one."""
    assert abs(standard_errors(products(distribution, num, 0.0))) < 4
    assert standard_errors(products(distribution, num, 0.3)) > 8


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_the_field_is_zero_between_any_two_times(distribution: Gaussian) -> None:
    """f(x_t, t, s) against samples of p_s; no particle sees its own positive. V . (x - mean), which detects a wrong
    deviation, is 0 in expectation at the exact map, at the objective's own particles."""
    objective, items = Drifting(particles=50, pairs="below", **FIELD), cloud(distribution, 10_000)  # type: ignore[arg-type]
    draw = objective.draw(items, Key(0))
    for error, is_wrong in ((0.0, False), (0.6, True)):
        found = []
        for families in objective.goals(GaussianCall(items, distribution, error), draw):
            for goal in families:
                x = goal.x - goal.x.mean(1, keepdim=True)
                found.append(((goal.goal - goal.x) * x).sum(-1).mean(1))
        errors = abs(standard_errors(torch.cat(found)))
        assert errors > 6 if is_wrong else errors < 4


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"features": "projections"}, FIELD, {"scope": "batch", "pairs": "zero"}])
@pytest.mark.parametrize(("how", "copies"), [("mixed", 1), ("copies", 4)])
def test_gradient_equals_central_differences_with_v_held(options: dict, how: str, copies: int) -> None:
    items = gaussian_items(PLANE, num=16 // copies, size=3, copies=copies)
    objective = Drifting(particles=4, groups=how, **options)  # type: ignore[arg-type]
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


def test_no_gradient_passes_through_v() -> None:
    """d loss / d x is -2 V / (M D c), with V constant."""
    objective = Drifting()
    x, targets = random_targets(num=6)
    targets = replace(targets, own=torch.eye(6, 10, dtype=torch.bool))
    goal = objective.goal(x.requires_grad_(), targets)
    assert not goal.goal.requires_grad and not goal.force.requires_grad
    [found] = torch.autograd.grad((goal.x - goal.goal).pow(2).mean(), x)
    c = float((x / goal.x).detach()[0, 0, 0])
    assert torch.allclose(found[0], -2 * (goal.goal - goal.x).detach()[0] / (x.numel() * c), rtol=1e-9)


def test_only_scope_batch_depends_on_other_groups() -> None:
    items = gaussian_items(PLANE, num=16)
    moved = replace(items, latents=items.latents * (1 + (items.item[..., None] >= 8)))
    for scope, is_same in (("group", True), ("batch", False)):
        objective = Drifting(particles=8, scope=scope, report="force")  # type: ignore[arg-type]
        found = [objective.force(GaussianCall(i, PLANE), objective.draw(i, Key(0)))[:8] for i in (items, moved)]
        assert torch.equal(*found) == is_same


def test_guidance_has_the_published_density() -> None:
    items = cloud(LINE, 20_000)
    items = replace(items, is_null=torch.arange(20_000) % 10 == 0)
    objective = Drifting(particles=2, guidance=SampleGuidance(max_scale=4.0))
    alpha = objective.draw(items, Key(0)).alpha
    assert items.is_null is not None and bool((alpha[items.is_null] == 1).all())
    guided = alpha[~items.is_null]
    above = guided[guided > 1]
    assert abs(len(above) / len(guided) - 0.5) < 0.02 and float(above.max()) <= 4
    assert abs(float((above < 2).double().mean()) - (1 - 1 / 4) / (1 - 1 / 16)) < 0.02  # alpha^-3
    none = Drifting(guidance=SampleGuidance(max_scale=4.0)).draw(gaussian_items(LINE), Key(0))
    assert bool((none.alpha == 1).all())


def test_guidance_pushes_away_from_items_without_condition() -> None:
    """Two clusters, one of null items: with alpha > 1 the others drift away from it."""
    items = gaussian_items(LINE, num=32, size=1)
    latents = torch.where(torch.arange(32)[None, :, None] % 2 == 1, 1.0, 0.0).double() + 0.01 * items.latents
    items = replace(items, latents=latents, is_null=torch.arange(32) % 2 == 1)

    def mean_drift(scale: float) -> float:
        guidance = SampleGuidance(max_scale=scale, plain=0.0, power=0.0)
        objective = Drifting(particles=32, temperatures=(0.5,), unit_force=False, guidance=guidance)
        draw = objective.draw(items, Key(0))
        [[goal]] = [g for g in objective.goals(GaussianCall(items, LINE), draw) if g[0].x.shape[1] == 16][:1]
        return float((goal.goal - goal.x).mean())

    assert mean_drift(4.0) < mean_drift(1.0)


def test_features_are_fixed_pluggable_and_of_several_scales() -> None:
    x = Key(0).normal((3, 16, 4))
    families = FEATURES.get("projections")(x)
    assert [f.shape[1] for f in families] == [64, 32, 32, 128, 128, 512]
    assert all(torch.equal(a, b) for a, b in zip(families, FEATURES.get("projections")(x), strict=True))
    alone = FEATURES.get("projections")(x[:1])
    assert all(torch.allclose(a, b[:1], atol=1e-6) for a, b in zip(alone, families, strict=True))
    assert len(FEATURES.get("projections")(x[:, :1])) == 2
    with pytest.raises(ValueError, match="latent"):
        Drifting(features="latent")
    items = gaussian_items(PLANE, num=8)
    FEATURES.register("doubled_for_a_test")(lambda x_BNC: [2 * x_BNC.flatten(1)])
    values = [
        float(o.loss(GaussianCall(items, PLANE), o.draw(items, Key(0))).sum)
        for o in (Drifting(), Drifting(features="doubled_for_a_test"))
    ]
    assert abs(values[0] - values[1]) < 1e-9 * values[0]  # distances are in mean distances


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="temperatures must be one or more positive"):
        Drifting(temperatures=())


@pytest.mark.parametrize("options", [{}, FIELD, {"features": "projections"}])
def test_half_precision_is_finite_at_extreme_times(options: dict) -> None:
    """Also for groups of one, and for particles at one point."""
    items = gaussian_items(PLANE, num=9, size=4)
    items = replace(items, latents=items.latents.bfloat16())
    weight = torch.full((2, 2), 0.3, dtype=torch.bfloat16, requires_grad=True)
    for particles in (1, 4):
        objective = Drifting(particles=particles, pairs="below", **options)
        draw = objective.draw(items, Key(0))
        for t in (1e-3, 0.5, 0.994, 1.0):
            for gap in (0.0, 1e-3, 0.3, 1.0):
                for x in (draw.x, torch.zeros_like(draw.x)):
                    moved = replace(draw, x=x, t=torch.full_like(draw.t, t), s=torch.full_like(draw.t, max(0, t - gap)))

                    def call(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
                        assert x.dtype == torch.bfloat16 and t.dtype == s.dtype == torch.float32
                        return x @ weight

                    terms = objective.loss(call, moved)  # type: ignore[arg-type]
                    [gradient] = torch.autograd.grad(terms.sum, weight)
                    assert bool(terms.sum.isfinite()) and bool(gradient.isfinite().all())
