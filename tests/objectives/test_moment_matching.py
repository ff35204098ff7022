"""Inductive moment matching: population discrepancy, consistency training and GMMN as special cases, times,
gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from clouds import Cloud, cloud, standard_errors
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from layouts import random_batch, small_model
from small_network import gradient_error, network_call
from torch import Tensor

from omni.objectives.base import Items, jump
from omni.objectives.consistency import Consistency
from omni.objectives.kernels import Kernel, pairwise_distance, squared_discrepancy
from omni.objectives.moment_matching import MomentDraw, MomentMatching, inner_time
from omni.objectives.particles import gather
from omni.objectives.times import BatchNames, TimeDistribution
from omni.rng import Key

SQUARED = Kernel(kind="squared")
DOUBLE = torch.float64


def unbiased(distribution: Gaussian, num: int, error: float, **options: object) -> Tensor:
    """The discrepancy without diagonals of every group of 50, in chunks of 10,000 particles."""
    objective = MomentMatching(particles=50, **options)  # type: ignore[arg-type]
    found = []
    for chunk in range(num // 10_000):
        items = cloud(distribution, 10_000, key=Key(chunk).fold("data"))
        draw = objective.draw(items, Key(chunk))
        found.append(objective.discrepancy(GaussianCall(items, distribution, error), draw, diagonals=False)[::50])
    return torch.cat(found)


NUMBERS = [pytest.param(20_000, id="20k"), pytest.param(100_000, id="100k", marks=pytest.mark.slow)]


@pytest.mark.parametrize("num", NUMBERS)
@pytest.mark.parametrize("distribution", [LINE, PLANE])
@pytest.mark.parametrize("options", [{"k": 4.0}, {"pairs": "one_step"}], ids=["inductive", "gmmn"])
def test_population_discrepancy_is_zero_at_the_exact_map(distribution: Gaussian, options: dict, num: int) -> None:
    """Within 4 standard errors at the exact map, beyond 6 at a wrong one. The step from t to r is wide: a map that is
    wrong at t is wrong in the same way at a near r, as induction assumes, and the discrepancy is smaller."""
    assert abs(standard_errors(unbiased(distribution, num, 0.0, **options))) < 4
    assert standard_errors(unbiased(distribution, num, 0.6, **options)) > 6


def test_copies_of_one_point_are_biased_unless_the_point_is_all_there_is() -> None:
    """The bias of "copies" (see `particles`): given x0, the exact map has other ends from t than from r."""
    objective = MomentMatching(particles=50, groups="copies", k=6.0)
    narrow = Gaussian(PLANE.mean, PLANE.covariance * 1e-10)
    for distribution, is_biased in ((PLANE, True), (narrow, False)):
        items = cloud(distribution, 400, copies=50)
        found = objective.discrepancy(
            GaussianCall(items, distribution), objective.draw(items, Key(0)), diagonals=False
        )[::50]
        assert (standard_errors(found) > 8) == is_biased
        assert is_biased or abs(float(found.mean())) < 1e-6


# ---- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "distance"), [("squared", "l2"), ("pseudo_huber", "pseudo_huber")])
def test_one_particle_at_s_0_is_twice_consistency_training(kernel: str, distance: str) -> None:
    items = gaussian_items(PLANE, num=16, size=3)
    objective = MomentMatching(
        particles=1, pairs="zero", kernel=Kernel(kind=kernel), weighting="one", min_gap=0.01  # type: ignore[arg-type]
    )  # fmt: skip
    draw = objective.draw(items, Key(0))
    call = network_call(items)
    found = objective.loss(call, draw)
    assert found.count == 48
    consistency = Consistency(distance=distance, clock="flow")  # type: ignore[arg-type]
    given = consistency.draw(items, Key(0))
    given = replace(given, x=draw.x, t=draw.t, s=draw.s, r=draw.r, x_r=draw.x_r)
    # Omni's consistency loss has the weight 1 / (t - r); for one item at a time it divides out
    for n in range(len(items)):
        one = Items(items.latents[:, 3 * n : 3 * n + 3], torch.zeros(1, 3, dtype=torch.int64), [items.names[n]])
        cut = {name: getattr(given, name)[:, 3 * n : 3 * n + 3] for name in ("x", "v", "noise", "x_r")}
        times = {name: getattr(given, name)[n : n + 1] for name in ("t", "s", "r")}
        alone = consistency.loss(network_call(one), replace(given, items=one, **cut, **times))
        wanted = 2 * float(alone.sum.detach() / alone.count) * float(draw.t[n] - draw.r[n])
        value = float(objective.discrepancy(call, draw)[n].detach())
        assert wanted > 1e-7 and abs(value - wanted) < 1e-9 * wanted


def double_loop(x: Tensor, y: Tensor, k) -> float:  # noqa: ANN001
    """MMD^2 of two samples (M, D), by its definition."""
    total = 0.0
    for j in range(len(x)):
        for i in range(len(x)):
            total += k(x[j], x[i]) + k(y[j], y[i]) - 2 * k(x[j], y[i])
    return total / len(x) ** 2


@pytest.mark.parametrize("kind", ["laplace", "rbf"])
def test_one_step_is_a_generative_moment_matching_network(kind: str) -> None:
    """t = 1, r = s = 0: plain MMD^2 between generator samples eps - F(eps, 1, 0) and data, a mixture of bandwidths."""
    items = gaussian_items(PLANE, num=10, size=2)
    kernel = Kernel(kind=kind, bandwidths=(0.5, 2.0))  # type: ignore[arg-type]
    objective = MomentMatching(pairs="one_step", particles=5, weighting="one", kernel=kernel)
    draw = objective.draw(items, Key(0))
    call = network_call(items)
    found = objective.loss(call, draw)
    one = torch.ones(len(items), dtype=DOUBLE)
    with torch.no_grad():
        generated = items.flat(items.noise(Key(0)) - call(items.noise(Key(0)), one, 0 * one)).flatten(1)
    data = items.flat(items.latents).flatten(1)

    def k(a: Tensor, b: Tensor) -> float:
        d = max(math.sqrt(float((a - b).pow(2).sum())), 1e-8)  # the published lower bound
        of = {"laplace": lambda h: math.exp(-d / h / 4), "rbf": lambda h: math.exp(-(d**2) / h**2 / 8)}[kind]
        return (of(0.5) + of(2.0)) / 2

    wanted = (double_loop(generated[:5], data[:5], k) + double_loop(generated[5:], data[5:], k)) / 2
    assert abs(float(found.sum.detach()) / found.count - wanted) < 1e-9 * wanted
    elbo = MomentMatching(pairs="one_step", particles=5, kernel=kernel).loss(call, draw)  # the weight at t = 1 is 1
    assert abs(float(elbo.sum.detach()) / elbo.count - wanted) < 1e-5 * wanted
    root = MomentMatching(pairs="one_step", particles=10, weighting="one", kernel=kernel, root=True)
    both = root.loss(call, root.draw(items, Key(0)))
    assert abs(float(both.sum.detach()) / both.count - double_loop(generated, data, k) ** 0.5) < 1e-9


def test_gradient_of_the_gaussian_kernel_is_attraction_minus_repulsion() -> None:
    """d MMD^2 / d x_j = -(2 / (N h^2)) (attraction - repulsion), h^2 = D / w^2 here."""
    x, y = (Key(n).normal((1, 6, 3), DOUBLE) for n in range(2))
    x.requires_grad_()
    scale = torch.tensor([1.7], dtype=DOUBLE)
    [found] = torch.autograd.grad(
        squared_discrepancy(x, y, Kernel(kind="rbf"), scale, diagonals=True).sum(), x
    )  # fmt: skip
    h2 = 3 / 1.7**2
    for j in range(6):
        pulls = []
        for others in (y[0], x[0].detach()):
            weights = torch.exp(-(others - x[0, j].detach()).pow(2).sum(-1) / (2 * h2))
            pulls.append((weights[:, None] * (others - x[0, j].detach())).mean(0))
        assert torch.allclose(found[0, j], -(2 / (6 * h2)) * (pulls[0] - pulls[1]), rtol=1e-9, atol=1e-15)


# ---- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["laplace", "rbf", "energy", "squared", "pseudo_huber"])
def test_kernels_equal_their_formulas_and_have_finite_gradients_at_distance_zero(kind: str) -> None:
    a, b = (Key(n).normal((2, 3, 4), DOUBLE) for n in range(2))
    b[0, 0] = a[0, 0]
    w = torch.tensor([0.8, 3.0], dtype=DOUBLE)
    kernel = Kernel(kind=kind)  # type: ignore[arg-type]
    found = kernel(a.requires_grad_(), b, w)
    for g in range(2):
        for j in range(3):
            for k in range(3):
                d2 = float((a[g, j] - b[g, k]).detach().pow(2).sum())
                wanted = {
                    "laplace": math.exp(-float(w[g]) * max(math.sqrt(d2), 1e-8) / 4) - 1,
                    "rbf": math.exp(-(float(w[g]) ** 2) * d2 / 8) - 1,
                    "energy": -math.sqrt(max(d2 / 4, 1e-16)),
                    "squared": -d2 / 4,
                    "pseudo_huber": 0.00054 - math.sqrt(d2 / 4 + 0.00054**2),
                }[kind]
                assert abs(float(found[g, j, k]) - wanted) < 1e-12
    [gradient] = torch.autograd.grad(kernel(a, a, w).sum() + found.sum(), a)
    assert bool(gradient.isfinite().all())
    assert bool(torch.autograd.grad(kernel(a, b, w)[0, 0, 0], a)[0].eq(0).all())


def test_distance_is_precise_for_near_particles() -> None:
    """In float32 at |x| = 30, a difference of 1e-3: |a|^2 + |b|^2 - 2ab would lose it."""
    a = torch.full((1, 40, 64), 30.0)
    assert abs(float(pairwise_distance(a, a + 1e-3)[0, 3, 5]) / 8e-3 - 1) < 1e-2


def test_the_scale_of_the_kernel_is_the_two_time_one() -> None:
    t, s = torch.tensor([0.8, 0.5], dtype=DOUBLE), torch.tensor([0.3, 0.5 - 1e-9], dtype=DOUBLE)
    n = ((1 - t) ** 2 + t**2).sqrt()
    skip_out = ((1 - s) * t - (1 - t) * s) / n  # Simple-EDM's c_out(s, t)
    assert torch.allclose(MomentMatching().kernel_scale(t, s), torch.tensor([2.0, 1e6], dtype=DOUBLE))
    found = MomentMatching(output="simple_edm").kernel_scale(t, s)
    assert abs(float(found[0] * skip_out[0]) - 1) < 1e-12
    assert abs(float(MomentMatching(output="x").kernel_scale(t, s)[0] * (1 - 0.3 / 0.8)) - 1) < 1e-12


# ---- times ---------------------------------------------------------------------------------------------------------


def test_times_are_the_papers() -> None:
    """t uniform in [0, .994], s uniform below it, eta(r) = eta(t) - 160 / 2^k unless the gap or s bounds it."""
    items = cloud(LINE, 40_000)
    objective = MomentMatching(min_gap=0.0)
    draw = objective.draw(items, Key(0))
    t, s, r = (value[::4] for value in (draw.t, draw.s, draw.r))
    assert abs(float(t.mean()) - 0.497) < 0.01 and float(t.max()) <= 0.994
    assert abs(float((s / t).mean()) - 0.5) < 0.01
    eta = t / (1 - t) - 160 / 2**12
    wanted = torch.maximum(s, torch.where(eta > 0, eta / (1 + eta), 0.0))
    assert float((r - wanted).abs().max()) < 1e-12
    assert bool((s <= r).all()) and bool((r <= t).all())
    pixels = MomentMatching(time=TimeDistribution(kind="uniform", low=0.006, high=0.996)).draw(items, Key(0))
    assert float(pixels.s.min()) >= 0.006


def test_gaps_equal_the_documented_ones_and_min_gap_holds() -> None:
    t, zero = torch.tensor([0.994, 0.5, 1.0], dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    gap = t - inner_time(t, zero, 12.0, 0.0)
    assert 1.3e-6 < float(gap[0]) < 1.5e-6 and 0.9e-2 < float(gap[1]) < 1.1e-2 and float(gap[2]) == 0
    assert 1.7e-7 < float((t - inner_time(t, zero, 15.0, 0.0))[0]) < 1.9e-7
    assert torch.allclose(t - inner_time(t, zero, 12.0, 1e-4), gap.clamp(min=1e-4), atol=1e-15)
    assert inner_time(t, zero, 0.0, 0.0).tolist()[1] == 0.0  # eta(t) - 160 < 0: the far end, not above 1
    late = torch.full((3,), 0.49999, dtype=DOUBLE)
    assert float(inner_time(t, late, 12.0, 1e-4)[1]) == 0.49999  # s bounds r even inside the gap


def test_x_r_is_the_ddim_step_on_the_line() -> None:
    """DDIM(x_t, x0, r, t) = (alpha_r - alpha_t sigma_r / sigma_t) x0 + (sigma_r / sigma_t) x_t."""
    items = gaussian_items(PLANE, num=8)
    draw = MomentMatching(k=6.0).draw(items, Key(0))
    t, r = items.expand(draw.t), items.expand(draw.r)
    wanted = ((1 - r) - (1 - t) * r / t) * items.latents + r / t * draw.x
    assert float((draw.x_r - wanted).abs().max()) < 1e-12


def test_at_r_equal_s_the_target_is_x_s() -> None:
    items = gaussian_items(PLANE, num=8)
    objective = MomentMatching()
    draw = objective.draw(items, Key(0))
    draw = replace(draw, r=draw.s, x_r=items.interpolate(draw.noise, draw.s))
    for _, y_r, _ in objective.particle_pairs(network_call(items), draw):
        [members] = draw.groups.members
        assert torch.equal(y_r, gather(items, draw.x_r, members).flatten(2))


def test_present_weights_unless_target_decay() -> None:
    items = gaussian_items(PLANE, num=8)

    class Marked:
        def __init__(self) -> None:
            self.asked = 0

        def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return x

        def target(self, graph: bool = False) -> Marked:
            self.asked += 1
            return self

    for decay, wanted in ((None, 0), (0.99, 1)):
        call, objective = Marked(), MomentMatching(target_decay=decay)
        objective.loss(call, objective.draw(items, Key(0)))  # type: ignore[arg-type]
        assert call.asked == wanted


def test_options_that_cannot_take_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['k'\] have no effect with pairs='one_step'"):
        MomentMatching(pairs="one_step", k=10)
    with pytest.raises(ValueError, match="bandwidths must be one or more positive"):
        Kernel(bandwidths=(1.0, 0.0))
    with pytest.raises(ValueError, match="at least 2 particles"):
        one = torch.zeros(1, 1, 2)
        squared_discrepancy(one, one, SQUARED, torch.ones(1), diagonals=False)


# ---- gradients and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["laplace", "rbf", "energy", "squared", "pseudo_huber"])
@pytest.mark.parametrize(("how", "copies"), [("mixed", 1), ("copies", 4)])
def test_gradient_equals_central_differences(kind: str, how: str, copies: int) -> None:
    items = gaussian_items(PLANE, num=8 // copies, size=2, copies=copies)
    objective = MomentMatching(kernel=Kernel(kind=kind), groups=how, k=6.0)  # type: ignore[arg-type]
    draw = objective.draw(items, Key(1))
    assert gradient_error(lambda call: objective.loss(call, draw).sum, network_call(items)) < 1e-6


def test_weight_is_the_elbo_times_sigmoid() -> None:
    """1/2 sigmoid(b - lambda) (-dlambda/dt) alpha^a / (alpha^2 + sigma^2), with the derivative taken numerically."""
    from omni.objectives.weighting import elbo_sigmoid

    t = torch.linspace(0.01, 0.99, 50, dtype=DOUBLE)
    log_snr = lambda t: 2 * ((1 - t) / t).log()  # noqa: E731
    rate = (log_snr(t + 1e-6) - log_snr(t - 1e-6)) / 2e-6
    for b, a in ((5.0, 1.0), (4.0, 2.0)):
        wanted = 0.5 * torch.sigmoid(b - log_snr(t)) * -rate * (1 - t) ** a / ((1 - t) ** 2 + t**2)
        assert torch.allclose(elbo_sigmoid(t, b, a), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["laplace", "rbf", "energy", "pseudo_huber"])
def test_half_precision_is_finite_at_extreme_times(kind: str) -> None:
    """A bf16 network and bf16 latents: all values are finite, and the gradient is not all zero."""
    items = gaussian_items(PLANE, num=16, size=4)
    items = replace(items, latents=items.latents.bfloat16())
    objective = MomentMatching(kernel=Kernel(kind=kind))  # type: ignore[arg-type]
    weight = torch.full((2, 2), 0.3, dtype=torch.bfloat16, requires_grad=True)
    for t in (1e-3, 0.5, 0.994, 1.0):
        for gap in (0.0, 1e-3, 0.3, 1.0):
            draw = at_times(objective, items, t, max(0.0, t - gap))

            def call(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
                assert x.dtype == torch.bfloat16 and t.dtype == s.dtype == torch.float32
                return x @ weight

            terms = objective.loss(call, draw)  # type: ignore[arg-type]
            assert terms.sum.dtype == torch.float32
            [gradient] = torch.autograd.grad(terms.sum, weight)
            assert bool(terms.sum.isfinite()) and bool(gradient.isfinite().all())
            assert gap == 0 or float(gradient.abs().max()) > 0


def at_times(objective: MomentMatching, items: Items, t: float, s: float) -> MomentDraw:
    """A draw of the objective, moved to one pair of times."""
    draw = objective.draw(items, Key(0))
    in_float32 = replace(items, latents=items.latents.float())
    start, end = torch.full_like(draw.t, t), torch.full_like(draw.t, s)
    r = inner_time(start.double(), end.double(), objective.k, objective.min_gap).float()
    return replace(
        draw,
        t=start,
        s=end,
        r=r,
        x=in_float32.interpolate(draw.noise, start),
        x_r=in_float32.interpolate(draw.noise, r),
    )


def test_a_half_precision_model_trains_on_it() -> None:
    model = small_model().bfloat16().train()
    batch = random_batch(Key(2), num_documents=4, copies=4, rows=1)
    assert batch.num_items
    batch = replace(batch, latents=batch.latents.bfloat16(), refine_latents=batch.refine_latents.bfloat16())
    term = model(batch, [MomentMatching(groups="copies")], Key(0))["MomentMatching"]
    term.sum.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert bool(term.sum.isfinite()) and gradients and all(bool(g.isfinite().all()) for g in gradients)


def test_the_gap_survives_half_precision_latents() -> None:
    """x_t and x_r of bf16 latents differ by (t - r) v in float32; in bf16 they would round to equal values."""
    items = gaussian_items(PLANE, num=16)
    items = replace(items, latents=items.latents.bfloat16())
    draw = at_times(MomentMatching(), items, 0.99, 0.0)
    moved = draw.x - draw.x_r
    assert torch.allclose(moved, items.latents.float().new_tensor(1e-4) * draw.v, rtol=0.05, atol=1e-6)
    assert float((draw.x.bfloat16() == draw.x_r.bfloat16()).float().mean()) > 0.9


def test_land_equals_jump_of_the_exact_map() -> None:
    """`jump_in_float32` equals `jump`, and is correct."""
    items = gaussian_items(PLANE, num=4)
    objective = MomentMatching()
    draw = objective.draw(items, Key(0))
    [(y_t, _, _)] = list(objective.particle_pairs(GaussianCall(items, PLANE), draw))
    wanted = jump(GaussianCall(items, PLANE), draw.x, draw.t, draw.s, items)
    assert torch.equal(y_t.flatten(), wanted.flatten())


# ---- training ------------------------------------------------------------------------------------------------------


def mixture(key: Key, num: int) -> Tensor:
    """(num, 2): four Gaussians of deviation 0.15 at (+-1, +-1)."""
    return (key.fold("mode").uniform((num, 2)) * 2).floor() * 2 - 1 + 0.15 * key.fold("within").normal((num, 2))


def trained(objective: MomentMatching, steps: int = 100, num: int = 128) -> float:
    """Energy distance of one jump from t = 1 to the data, after Adam on a small network. Each point is a document."""
    sizes = [(4, 64), (64, 64), (64, 2)]
    weights = [(Key(0).fold(n).normal(size) * (2 / size[0]) ** 0.5 * (n < 2)) for n, size in enumerate(sizes)]
    parameters = [w.requires_grad_() for w in weights] + [torch.zeros(b, requires_grad=True) for _, b in sizes]

    def call(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = torch.cat([x[0], t[:, None], s[:, None]], -1)
        for n in range(3):
            h = h @ parameters[n] + parameters[3 + n]
            h = h if n == 2 else torch.nn.functional.silu(h)
        return h[None]

    optimiser = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99))
    for step in range(steps):
        items = Cloud(mixture(Key(1).fold(step), num)[None], torch.arange(num)[None], BatchNames(num))
        terms = objective.loss(call, objective.draw(items, Key(2).fold(step)))  # type: ignore[arg-type]
        optimiser.zero_grad()
        (terms.sum / terms.count).backward()
        optimiser.step()
    with torch.no_grad():
        noise, one = Key(3).normal((1, 1000, 2)), torch.ones(1000)
        points = noise - call(noise, one, 0 * one)
        wanted = mixture(Key(4), 1000)[None]
        return float(squared_discrepancy(points, wanted, Kernel(kind="energy"), one[:1], diagonals=True))


def test_four_particles_match_the_distribution_where_one_collapses() -> None:
    """At the widest step from r to t, one particle moves to the mean of the data; four repel one another."""
    one, four = (trained(MomentMatching(pairs="one_step", particles=m)) for m in (1, 4))
    inductive = trained(MomentMatching(k=5.0, particles=4))
    assert one > 0.2 and four < 0.05 and inductive < 0.2, (one, four, inductive)
