"""Steps of every objective under bfloat16, at times where half precision is critical: all values stay finite."""

from __future__ import annotations

import copy

import pytest
import torch
from layouts import random_batch, small_model
from torch import Tensor

from omni.objectives import OBJECTIVES, FlowObjective, build_objective
from omni.objectives.base import target_decay_of
from omni.objectives.times import TimeDistribution
from omni.rng import Key

TIMES = torch.tensor([1e-3, 2e-3, 0.499, 0.5, 0.993, 0.994, 0.999, 1.0], dtype=torch.float64)
FLOW = sorted(name for name in OBJECTIVES.names() if issubclass(OBJECTIVES.get(name), FlowObjective))


def at_the_edges(self: TimeDistribution, u: Tensor) -> Tensor:
    """A quantile function whose only times are TIMES: with two samples t - s is often 1e-3, and also 0 and 0.999."""
    return TIMES[(u * len(TIMES)).long().clamp(max=len(TIMES) - 1)]


def train(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of values that are not finite among losses, gradients and, at the end, weights."""
    monkeypatch.setattr(TimeDistribution, "quantile", at_the_edges)
    objective = build_objective(name)
    assert isinstance(objective, FlowObjective)
    model = small_model().train()
    decay = target_decay_of(objective)
    averages = None if decay is None else copy.deepcopy(model).requires_grad_(False)
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    batches = [random_batch(Key(n).fold("half"), num_documents=3, copies=4, rows=1) for n in range(4)]
    bad = 0
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16):
            found = model(batch, [objective], Key(0).fold(step), averages, step / steps)
        term = next(iter(found.values()))
        (term.sum / max(term.count, 1)).backward()
        bad += int(not bool(term.sum.isfinite()))
        bad += sum(int((~p.grad.isfinite()).sum()) for p in parameters if p.grad is not None)
        optimiser.step()
        optimiser.zero_grad()
        if averages is not None:
            with torch.no_grad():
                for mean, now in zip(averages.parameters(), parameters, strict=True):
                    mean.lerp_(now, 1 - decay)
    return bad + sum(int((~p.isfinite()).sum()) for p in parameters)


@pytest.mark.parametrize("name", FLOW)
def test_eight_steps_are_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(name, 8, monkeypatch) == 0  # of every batch two


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOW)
def test_a_thousand_steps_are_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(name, 1000, monkeypatch) == 0
