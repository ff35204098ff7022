"""All registered objectives: keyed, exact where the exact map is known, independent of packing. See also
test_samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items
from layouts import CHANNELS, PAD, random_batch, random_spans, small_model
from torch import Tensor

from omni.objectives import OBJECTIVES, FlowObjective, build_objective
from omni.objectives.base import Items
from omni.objectives.times import Name, PairDistribution, TimeDistribution
from omni.rng import Key
from omni.sequence.layout import Shape, pack

FLOW = [n for n in OBJECTIVES.names() if issubclass(OBJECTIVES.get(n), FlowObjective)]

# Options that make an objective's value the size of its residual, without adaptive weights and normalisation.
PLAIN: dict[str, dict[str, object]] = {
    "alpha_flow": {"power": 0.0},
    "continuous_consistency": {"normalise": "none"},
    # alone: two particles, each the only negative of the other, move apart without bound
    "drifting": {
        "particles": 1,
        "affinity": "row",
        "unit_force": False,
        "unit_distance": False,
        "temperatures": [1.0],
    },
    "improved_mean_flow": {"power": 0.0},
    "mean_flow": {"power": 0.0},
}

# Groups of copies do not depend on packing; mixed ones depend on the documents of a batch (objectives.particles).
GROUPED: dict[str, dict[str, object]] = {
    name: {"groups": "copies", "particles": 2} for name in ("drifting", "moment_matching")
}


@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_flow_matching_reaches_its_irreducible_loss(distribution: Gaussian) -> None:
    """At the exact velocity the loss is Var[v | x_t] = variance / deviation(t)^2, within Monte Carlo error."""
    objective = build_objective("flow_matching", time={"kind": "uniform"})
    items = gaussian_items(distribution, num=4000)
    draw = objective.draw(items, Key(1))
    least = float((distribution.variance / distribution.deviation(draw.t[:, None]) ** 2).mean())
    found = objective.loss(GaussianCall(items, distribution), draw)
    spoiled = objective.loss(GaussianCall(items, distribution, 0.2), draw)
    assert abs(float(found.sum) / found.count - least) < 0.03 * least
    assert float(spoiled.sum) / spoiled.count > float(found.sum) / found.count + 0.01


@pytest.mark.parametrize("name", FLOW)
def test_objectives_are_keyed_and_independent_of_packing(name: str) -> None:
    """Same key, same loss bits; other key, other loss; the sum does not depend on the packing."""
    model = small_model(dtype=torch.float64)
    documents = [random_spans(Key(n).fold("packing"), 4) for n in range(6)]
    objective = build_objective(name, **GROUPED.get(name, {}))

    def total(groups: list[list[int]], seed: int = 5) -> Tensor:
        terms = []
        for group in groups:
            [batch], _ = pack(
                [documents[i] for i in group], [Shape(2, 300, 300)],
                channels=CHANNELS, pad_id=PAD, copies=2, uids=group, fixed_shape=False,
            )  # fmt: skip
            cast = {"latents": batch.latents.double(), "refine_latents": batch.refine_latents.double()}
            terms.append(model(replace(batch, **cast), [objective], Key(seed))[type(objective).__name__])
        return torch.stack([term.sum.detach() for term in terms]).sum() / sum(term.count for term in terms)

    whole, again, split = total([[0, 1, 2, 3, 4, 5]]), total([[0, 1, 2, 3, 4, 5]]), total([[4, 1], [0, 2], [3, 5]])
    assert torch.equal(whole, again) and not torch.equal(whole, total([[0, 1, 2, 3, 4, 5]], seed=6))
    assert abs(float(whole - split)) < 1e-6 * abs(float(whole))  # noise is sampled in float32; sums reorder


@pytest.mark.parametrize("name", FLOW)
def test_objectives_train(name: str) -> None:
    """A few AdamW steps on one batch lower the loss at fixed random values."""
    model = small_model().train()
    batch, objective = random_batch(Key(2).fold("train")), build_objective(name, **PLAIN.get(name, {}))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        term = model(batch, [objective], Key(9))[type(objective).__name__]
        (term.sum / term.count).backward()
        optimiser.step()
        losses.append(float(term.sum.detach()) / term.count)
    assert losses[-1] < 0.95 * losses[0]


VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("alpha_flow", {"alpha": 0.5}),
    ("consistency", {"clock": "flow", "min_gap": 0.0, "schedule": {"kind": "ect", "stage": 20}}),
    ("consistency", {"schedule": "ict"}),
    ("continuous_consistency", {"normalise": "norm"}),
    ("shortcut", {"bootstrap": 1.0}),
]


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FLOW), *VARIANTS])
def test_objectives_are_finite_in_bf16(
    name: str, options: dict[str, object], gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, latents and activations in bf16: loss and gradients at the critical times of each."""

    def start(self: object, names: Sequence[Name], key: Key, purpose: str = "time") -> Tensor:
        return torch.tensor([(1e-3, 0.5, 0.994, 1.0)[n % 4] for n in range(len(names))], dtype=torch.float64)

    def pair(self: object, names: Sequence[Name], key: Key) -> tuple[Tensor, Tensor]:
        t = start(self, names, key)
        return t, (t - gap).clamp(min=0)

    monkeypatch.setattr(TimeDistribution, "draw", start)
    monkeypatch.setattr(PairDistribution, "draw", pair)
    model = small_model(dtype=torch.bfloat16).train()
    batch = random_batch(Key(2).fold("bf16"))
    batch = replace(batch, latents=batch.latents.bfloat16(), refine_latents=batch.refine_latents.bfloat16())
    objective = build_objective(name, **options)
    term = model(batch, [objective], Key(4))[type(objective).__name__]
    assert batch.num_items >= 4 and term.sum.dtype == torch.float32 and torch.isfinite(term.sum)
    term.sum.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(g).all()) for g in gradients)


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
    """If copies saw one another, moving one would move another's F."""
    model = small_model(dtype=torch.float64)
    call, x, t, s, v = model_call(model)
    only = (call.batch.item == 0).unsqueeze(-1)
    moved = call.derivative(x, t, s, torch.where(only, v, 0.0), torch.zeros_like(t), torch.zeros_like(s))
    assert float(moved[call.batch.item == 0].abs().max()) > 0
    assert float(moved[call.batch.item > 0].abs().max()) == 0


def model_call(model):  # noqa: ANN001, ANN202
    from omni.losses import BatchFlowCall

    batch = random_batch(Key(11).fold("tangent"), num_documents=3, copies=3, rows=2)
    with torch.no_grad():
        batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
        _, memory = model.context(batch)
    key = Key(12)
    t = key.uniform((batch.num_items,), torch.float64) * 0.8 + 0.2
    x, v = (key.fold(n).normal(tuple(batch.refine_latents.shape), torch.float64) for n in "xv")
    return BatchFlowCall(model, batch, memory, torch.ones_like(t)), x, t, t * 0.5, v


def test_times_are_stratified_over_copies_and_keyed_by_item() -> None:
    items = Items(torch.zeros(1, 4, 1), torch.arange(4)[None], [(7, 0, c) for c in range(4)])
    t = TimeDistribution(kind="uniform").draw(items.names, Key(0), "time")
    assert torch.allclose(t.sort().values.diff(), torch.full((3,), 0.25).double(), atol=1e-6)
    alone = Items(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), [(7, 0, 0)])
    assert float(TimeDistribution(kind="uniform").draw(alone.names, Key(0), "time")) == float(t[0])
