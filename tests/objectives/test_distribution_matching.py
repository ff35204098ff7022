"""Distribution matching on rollouts: three jumps, the gradient by its formula, who gets gradients, a Gaussian toy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from layouts import random_batch, small_model
from small_network import network_call
from torch import Tensor

from eval.experiments.plane.network import PlaneCall, PlaneNetwork
from omni.losses import ContextPass, ScoreNetworks, critic_losses, sampled_past
from omni.objectives.base import Items
from omni.objectives.distribution_matching import DistributionMatching
from omni.objectives.times import BatchNames
from omni.rng import Key
from omni.sequence.block_context import BlockContext
from omni.sequence.own_past import rounds


def test_times_are_a_cell_of_each_grid() -> None:
    """Every cell of every grid is drawn: its share is 1 / (number of grids) / n."""
    items = gaussian_items(LINE, num=6000, size=1)
    start, t, s, end = DistributionMatching(steps=(2, 8)).jump_times(items, Key(0))
    assert bool((start == 1).all()) and bool((end == 0).all())
    for n in (2, 8):
        for i in range(n):
            share = float(((t == 1 - i / n) & (s == 1 - (i + 1) / n)).double().mean())
            assert abs(share - 0.5 / n) < 4 * (0.5 / n / 6000) ** 0.5


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_the_sample_of_an_exact_map_does_not_depend_on_the_steps(distribution: Gaussian) -> None:
    items = gaussian_items(distribution, num=50)
    call = GaussianCall(items, distribution)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    wanted = distribution.map(items.noise(Key(3)), one, 0 * one)
    for steps in ((1,), (2, 16), (5,)):
        assert torch.allclose(DistributionMatching(steps=steps).sample(call, items, Key(3)), wanted, atol=1e-12)


def test_the_sample_makes_three_jumps_with_a_graph() -> None:
    items = gaussian_items(PLANE, num=8)
    call, objective = network_call(items), DistributionMatching(steps=(4,))
    x, times = objective.sample(call, items, Key(1)), objective.jump_times(items, Key(1))
    wanted = items.noise(Key(1))
    for t, s in zip(times[:-1], times[1:], strict=True):
        wanted = wanted + items.expand(s - t) * call(wanted, t, s)
    assert torch.allclose(x, wanted) and len(call.log) == 6
    for found, same in zip(*(torch.autograd.grad(v.sum(), list(call.live.values())) for v in (x, wanted)), strict=True):
        assert torch.allclose(found, same) and float(found.abs().max()) > 0


@pytest.mark.parametrize(("w", "scope"), [(1.0, "item"), (2.5, "item"), (1.0, "batch")])
def test_the_gradient_equals_the_formula(w: float, scope: str) -> None:
    """d loss / d x^ = g / C of each latent, with the critic's and the teacher's predictions of the data; and the raw
    loss. An item without its condition is not guided."""
    items = replace(gaussian_items(PLANE, num=6, size=3), is_null=torch.arange(6) == 2)
    student, teacher, critic = (network_call(items, seed) for seed in range(3))
    objective = DistributionMatching(steps=(2, 4), guidance_scale=w, weight=0.5, scope=scope)
    terms = objective.loss(student, teacher, critic, items, Key(4))
    x = objective.sample(student, items, Key(4))
    t = objective.time.draw(items.names, Key(4))
    tt = t.repeat_interleave(3)[None, :, None]
    noisy = ((1 - tt) * x + tt * items.noise(Key(4), "added noise")).detach()
    own, null = teacher(noisy, t, t), teacher.null()(noisy, t, t)
    scale = torch.where(items.is_null[items.item][..., None], 1.0, w)
    fake = critic.guided(1 / scale[0, ::3, 0])(noisy, t, t)
    real_x0, fake_x0 = noisy - tt * (scale * own + (1 - scale) * null), noisy - tt * fake
    distance = (x - real_x0).abs().view(6, -1).mean(1).repeat_interleave(3)[None, :, None]
    distance = distance if scope == "item" else distance.mean()
    g = ((fake_x0 - real_x0) / distance).detach()
    weights = list(student.live.values())
    for found, wanted in zip(
        torch.autograd.grad(terms.sum, weights), torch.autograd.grad((g * x).sum() / 2, weights), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12) and float(wanted.abs().max()) > 0
    assert terms.count == 18 and terms.weight == 0.5
    assert torch.allclose(terms.sum, g.square().mean(-1).sum() / 2)
    assert terms.raw is not None and torch.allclose(terms.raw, (fake_x0 - real_x0).square().mean(-1).sum())


def test_equal_networks_give_no_gradient() -> None:
    items = gaussian_items(PLANE, num=16)
    student, other = network_call(items), network_call(items, 1)
    terms = DistributionMatching().loss(student, other, other, items, Key(0))
    gradients = torch.autograd.grad(terms.sum, list(student.live.values()), allow_unused=True)
    assert float(terms.sum.detach()) == 0 and all(g is None or float(g.abs().max()) == 0 for g in gradients)


@dataclass(frozen=True)
class Linear:
    """One jump from noise to a + b eps; for steps = (1,), whose other two jumps have no length."""

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x - self.a - self.b * x


@pytest.mark.parametrize(("mean", "std"), [(0.2, 0.3), (1.5, 0.3), (0.2, 1.2), (1.5, 1.2)])
def test_the_gradient_points_to_the_teacher(mean: float, std: float) -> None:
    """With the exact critic of N(mean, std^2): descent moves mean and deviation towards the teacher's 0.7 and 0.6."""
    items = gaussian_items(LINE, num=500, size=16)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, std))
    critic = Gaussian(a.detach()[None], (b.detach() ** 2)[None, None])
    calls = Linear(a, b), GaussianCall(items, LINE), GaussianCall(items, critic)
    terms = DistributionMatching(steps=(1,)).loss(*calls, items, Key(2))  # type: ignore[arg-type]
    of_a, of_b = torch.autograd.grad(terms.sum, [a, b])
    assert float(of_a) * (mean - 0.7) > 0 and float(of_b) * (std - 0.6) > 0


def test_the_critic_learns_the_samples_velocity() -> None:
    """Its loss is flow matching on x: at the exact velocity it is Var[v | x_t], within Monte Carlo error."""
    items = gaussian_items(PLANE, num=4000, size=1)
    x = PLANE.sample(Key(8), 1, 4000)
    objective = DistributionMatching(critic_time={"kind": "uniform"})
    t = objective.critic_time.draw(items.names, Key(1))
    least = float((PLANE.variance / PLANE.deviation(t[:, None]) ** 2).mean())
    found, worse = (objective.critic_loss(GaussianCall(items, PLANE, e), x, items, Key(1)) for e in (0.0, 0.2))
    assert abs(float(found.sum) / found.count - least) < 0.03 * least
    assert float(worse.sum) > float(found.sum) + 0.01 * worse.count


def networks(dtype: torch.dtype = torch.float32):  # noqa: ANN201
    models = [small_model(seed, dtype).train() for seed in range(3)]
    return models[0], ScoreNetworks(*models[1:])


def cast(batch, dtype: torch.dtype):  # noqa: ANN001, ANN201
    return replace(batch, latents=batch.latents.to(dtype), refine_latents=batch.refine_latents.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_model_alone(dtype: torch.dtype) -> None:
    """The model's loss gives the teacher and the critic none, and the encoding of the past none; the critic's loss
    gives them to the critic alone. Finite in bf16."""
    model, scores = networks(dtype)
    batch = cast(random_batch(Key(2).fold("on policy"), num_documents=6), dtype)
    assert len(rounds(batch)) >= 2
    objective = DistributionMatching()
    terms = model(batch, [objective], Key(0), scores=scores)["DistributionMatching"]
    terms.sum.backward()
    assert terms.sum.dtype == torch.float32 and torch.isfinite(terms.sum) and terms.count == batch.num_refine
    got = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert "flow.velocity.weight" in got and "flow.clean.weight" not in got and "token.embedding.weight" not in got
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is None for one in (scores.teacher, scores.critic) for p in one.parameters())
    model.zero_grad(set_to_none=True)
    found = critic_losses(model, scores.critic, batch, [objective], Key(0))["DistributionMatching"]
    found.sum.backward()
    assert all(p.grad is None for one in (model, scores.teacher) for p in one.parameters())
    assert float(dict(scores.critic.named_parameters())["flow.clean.weight"].grad.abs().max()) > 0


def test_every_block_reads_the_models_own_past() -> None:
    """The true latents of a block that a later one reads have no effect; a given block's have."""
    model, scores = networks(torch.float64)
    batch = cast(random_batch(Key(2).fold("on policy"), num_documents=6, copies=1), torch.float64)
    supervised = {(int(r), d, b) for r, d, b in positions(batch)}
    own = torch.zeros_like(batch.is_latent)
    for r, d, b in supervised:
        own[r] |= batch.is_latent[r] & (batch.context.document[r] == d) & (batch.context.block[r] == b)

    def value(latents: Tensor) -> float:
        changed = replace(batch, latents=latents)
        return float(
            model(changed, [DistributionMatching()], Key(0), scores=scores)["DistributionMatching"].sum.detach()
        )

    given = batch.is_latent & ~own
    at = batch.latents
    assert bool(own.any()) and bool(given.any())
    assert value(torch.where(own[..., None], at + 1, at)) == pytest.approx(value(at), rel=1e-12)
    assert abs(value(torch.where(given[..., None], at + 1, at)) - value(at)) > 1e-6


def positions(batch):  # noqa: ANN001, ANN201
    """(row, document, block) of every refine position."""
    where = (batch.item >= 0).nonzero()
    return [(r, int(batch.refine.document[r, s]), int(batch.refine.block[r, s])) for r, s in where.tolist()]


def test_errors_name_the_way_out() -> None:
    model, scores = networks()
    batch, objective = random_batch(Key(2)), DistributionMatching()
    with pytest.raises(ValueError, match="needs a teacher and a critic"):
        model(batch, [objective], Key(0))
    with pytest.raises(ValueError, match=r"steps.*1 or more, got \[0, 4\]"):
        DistributionMatching(steps=(0, 4))
    model.config = model.config.model_copy(update={"blocks": BlockContext(reads="before")})
    with pytest.raises(ValueError, match="DistributionMatching samples block after block.*reads = 'finished'"):
        model(batch, [objective], Key(0), scores=scores)


def test_a_batch_without_pictures_counts_nothing() -> None:
    model, scores = networks()
    batch = replace(random_batch(Key(2)), item_first=torch.zeros(0, dtype=torch.int64))
    found = model(batch, [DistributionMatching()], Key(0), scores=scores)
    for terms in (found, critic_losses(model, scores.critic, batch, [DistributionMatching()], Key(0))):
        assert terms["DistributionMatching"].count == 0 and float(terms["DistributionMatching"].sum) == 0


def test_the_past_has_no_graph() -> None:
    model, _ = networks()
    batch = random_batch(Key(2).fold("on policy"), num_documents=6)
    one = ContextPass(model, batch, *model.context(batch), None, 1.0)
    own, memory = sampled_past(DistributionMatching(), one, Key(0))
    assert not own.latents.requires_grad and not any(one.requires_grad for pair in memory.layers for one in pair)


@pytest.mark.slow
def test_a_student_learns_the_mean_and_the_variance() -> None:
    """From N(0, 1) to the teacher's N(0.7, 0.36), with a critic that is trained beside it; half a minute."""
    batch = 256
    objective = DistributionMatching(steps=(1, 2), critic_time={"kind": "uniform"}, scope="batch")
    student, critic = (PlaneNetwork(Key(n), channels=1, width=32, depth=2) for n in range(2))
    optimisers = [
        torch.optim.Adam(one.parameters(), rate, betas=(0.0, 0.99)) for one, rate in ((student, 2e-3), (critic, 5e-3))
    ]
    items = Items(torch.zeros(1, batch, 1), torch.arange(batch)[None], BatchNames(batch))
    calls = [PlaneCall(one, items) for one in (student, critic)]
    teacher = GaussianCall(items, Gaussian(LINE.mean.float(), LINE.covariance.float()))
    for step in range(600):
        for n in range(3):
            with torch.no_grad():
                x = objective.sample(calls[0], items, Key(step).fold(n))
            descend(optimisers[1], objective.critic_loss(calls[1], x, items, Key(step).fold(n)).sum / batch)
        terms = objective.loss(*[calls[0], teacher, calls[1]], items, Key(step).fold("student"))
        for group in optimisers[0].param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / 600))
        descend(optimisers[0], terms.sum / batch)
    many = Items(torch.zeros(1, 8192, 1), torch.arange(8192)[None], BatchNames(8192))
    with torch.no_grad():
        x = objective.sample(PlaneCall(student, many), many, Key(99))
    assert abs(float(x.mean()) - 0.7) < 0.05 and abs(float(x.std()) - 0.6) < 0.05


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
