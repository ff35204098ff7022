"""Objectives and samplers over the registries: keyed, exact where the exact map is known, blind to packing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from layouts import CHANNELS, PAD, random_batch, random_spans, small_model
from torch import Tensor

from omni.layout import Shape, pack
from omni.objectives import OBJECTIVES, FlowObjective, build_objective
from omni.objectives.base import Items
from omni.objectives.times import TimeDistribution
from omni.rng import Key
from omni.samplers import SAMPLERS, time_grid

FLOW = [n for n in OBJECTIVES.names() if issubclass(OBJECTIVES.get(n), FlowObjective)]


@pytest.mark.parametrize("law", [LINE, PLANE])
def test_mean_flow_residual_vanishes_at_the_exact_gaussian_map(law: Gaussian) -> None:
    """With the marginal velocity as tangent the Eulerian identity holds pointwise: residual below 1e-8 in float64."""
    objective = build_objective("mean_flow", diagonal=0.0, power=0.0)
    items = gaussian_items(law)
    draw = objective.draw(items, Key(0))
    marginal = replace(draw, v=law.velocity(draw.x, items.expand(draw.t)))
    exact, wrong = (objective.loss(GaussianCall(items, law, error), marginal) for error in (0.0, 0.1))
    assert float(exact.sum) / exact.count < 1e-8
    assert float(wrong.sum) / wrong.count > 1e-4


@pytest.mark.parametrize("law", [LINE, PLANE])
def test_flow_matching_reaches_its_irreducible_loss(law: Gaussian) -> None:
    """At the exact velocity the loss is Var[v | x_t] = variance / deviation(t)^2, within Monte Carlo error."""
    objective = build_objective("flow_matching", time={"kind": "uniform"})
    items = gaussian_items(law, num=4000)
    draw = objective.draw(items, Key(1))
    floor = float((law.variance / law.deviation(draw.t[:, None]) ** 2).mean())
    found = objective.loss(GaussianCall(items, law), draw)
    spoiled = objective.loss(GaussianCall(items, law, 0.2), draw)
    assert abs(float(found.sum) / found.count - floor) < 0.03 * floor
    assert float(spoiled.sum) / spoiled.count > float(found.sum) / found.count + 0.01


@pytest.mark.parametrize("name", FLOW)
def test_objectives_are_keyed_and_blind_to_packing(name: str) -> None:
    """Same key, same loss bits; other key, other loss; and the sum does not depend on the packing."""
    model = small_model(dtype=torch.float64)
    documents = [random_spans(Key(n).fold("packing"), 4) for n in range(6)]
    objective = build_objective(name)

    def total(groups: list[list[int]]) -> Tensor:
        terms = []
        for group in groups:
            [batch], _ = pack(
                [documents[i] for i in group], [Shape(2, 300, 300)],
                channels=CHANNELS, pad_id=PAD, copies=2, uids=group, fixed_shape=False,
            )  # fmt: skip
            cast = {"latents": batch.latents.double(), "refine_latents": batch.refine_latents.double()}
            terms.append(model.loss(replace(batch, **cast), [objective], Key(5))[type(objective).__name__])
        return torch.stack([term.sum.detach() for term in terms]).sum() / sum(term.count for term in terms)

    whole, again, split = total([[0, 1, 2, 3, 4, 5]]), total([[0, 1, 2, 3, 4, 5]]), total([[4, 1], [0, 2], [3, 5]])
    assert torch.equal(whole, again)
    assert abs(float(whole - split)) < 1e-6 * abs(float(whole))  # noise is drawn in float32; sums reorder


@pytest.mark.parametrize("name", FLOW)
def test_objectives_train(name: str) -> None:
    """A few AdamW steps on one batch lower the loss at fixed draws."""
    model = small_model().train()
    options = {"power": 0.0} if name == "mean_flow" else {}  # the adaptive weight hides the size of the residual
    batch, objective = random_batch(Key(2).fold("train")), build_objective(name, **options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        term = model.loss(batch, [objective], Key(9))[type(objective).__name__]
        (term.sum / term.count).backward()
        optimiser.step()
        losses.append(float(term.sum.detach()) / term.count)
    assert losses[-1] < 0.95 * losses[0]


def test_derivative_of_the_model_equals_central_differences() -> None:
    """Total derivative along (v, 1, 0), several copies and documents in one batch, float64: 1e-6 relative."""
    model = small_model(dtype=torch.float64)
    call, x, t, s, v = model_call(model)
    zero = torch.zeros_like(s)
    found = call.derivative(x, t, s, v, torch.ones_like(t), zero)
    h = 1e-6
    with torch.no_grad():
        wanted = (call(x + h * v, t + h, s) - call(x - h * v, t - h, s)) / (2 * h)
    mask = call.batch.item >= 0
    assert float((found - wanted)[mask].abs().max()) < 1e-6 * float(wanted[mask].abs().max())


def test_there_is_no_tangent_between_copies() -> None:
    """The trap: were copies to see one another, moving one would move another's F."""
    model = small_model(dtype=torch.float64)
    call, x, t, s, v = model_call(model)
    only = (call.batch.item == 0).unsqueeze(-1)
    moved = call.derivative(x, t, s, torch.where(only, v, 0.0), torch.zeros_like(t), torch.zeros_like(s))
    assert float(moved[call.batch.item == 0].abs().max()) > 0
    assert float(moved[call.batch.item > 0].abs().max()) == 0


def model_call(model):  # noqa: ANN001, ANN202
    from omni.model import FlowCall

    batch = random_batch(Key(11).fold("tangent"), num_documents=3, copies=3, rows=2)
    with torch.no_grad():
        batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
        _, memory = model.context(batch)
    key = Key(12)
    t = key.uniform((batch.num_items,), torch.float64) * 0.8 + 0.2
    x, v = (key.fold(n).normal(tuple(batch.refine_latents.shape), torch.float64) for n in "xv")
    return FlowCall(model, batch, memory, torch.ones_like(t)), x, t, t * 0.5, v


def test_time_draws_are_stratified_over_copies_and_keyed_by_item() -> None:
    items = Items(torch.zeros(1, 4, 1), torch.arange(4)[None], [(7, 0, c) for c in range(4)])
    t = TimeDistribution(kind="uniform").draw(items.names, Key(0), "time")
    assert torch.allclose(t.sort().values.diff(), torch.full((3,), 0.25).double(), atol=1e-6)
    alone = Items(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), [(7, 0, 0)])
    assert float(TimeDistribution(kind="uniform").draw(alone.names, Key(0), "time")) == float(t[0])


# ---- samplers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_samplers_converge_on_the_gaussian_flow(name: str) -> None:
    """The flow-map sampler is exact in any number of steps; Euler and DDIM are of first order."""
    sampler = SAMPLERS.get(name)
    start = Key(4).normal((500, 1), torch.float64)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    wanted = LINE.map(start, one, zero)

    def call(x: Tensor, t: float, s: float) -> Tensor:
        return LINE.average(x, torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))

    errors = []
    for steps in (1, 2, 16, 32):
        states = list(sampler(call, start, time_grid(steps)))
        assert [s.step for s in states] == list(range(1, steps + 1)) and states[-1].t == 0.0
        errors.append(float((states[-1].x - wanted).abs().max()))
    if name == "flow_map":
        assert max(errors) < 1e-12
    else:
        assert errors[0] > errors[2] > errors[3]
        assert 1.7 < errors[2] / errors[3] < 2.4  # order one


def test_ddim_is_euler_on_this_path() -> None:
    start = Key(4).normal((50, 1), torch.float64)

    def call(x: Tensor, t: float, s: float) -> Tensor:
        return LINE.velocity(x, torch.tensor(t, dtype=torch.float64))

    a, b = (list(SAMPLERS.get(name)(call, start, time_grid(7, 3.0)))[-1].x for name in ("euler", "ddim"))
    assert float((a - b).abs().max()) < 1e-14


def test_time_grid() -> None:
    assert time_grid(2) == [1.0, 0.5, 0.0]
    assert time_grid(2, shift=3.0) == [1.0, 0.75, 0.0]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        time_grid(0)
