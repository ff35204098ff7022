"""Next token: the test oracle is a sum over positions; the z-loss fixes the scale of the logits, not the
probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from omni.objectives import build_objective
from omni.rng import Key


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_a_sum_over_positions(z_loss: float) -> None:
    logits, target = 4 * Key(0).normal((6, 9)), torch.tensor([0, 8, 3, 3, 1, 5])
    found = build_objective("next_token", z_loss=z_loss).loss(logits, target)  # type: ignore[attr-defined]
    wanted = 0.0
    for row, right in zip(logits.double().tolist(), target.tolist(), strict=True):
        log_z = math.log(sum(math.exp(value) for value in row))
        wanted += log_z - row[right] + z_loss * log_z**2
    assert found.count == 6 and float(found.sum) == pytest.approx(wanted, rel=1e-6)


def test_z_loss_keeps_the_probabilities() -> None:
    """Free logits fitted to counts 1, 2, 5: with it they become log-probabilities, from any start."""
    target = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
    objective = build_objective("next_token", z_loss=0.1)
    logits = torch.full((3,), 7.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = objective.loss(logits.expand(8, 3), target).sum  # type: ignore[attr-defined]
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    assert logits.detach().exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-4)


def test_a_negative_z_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="z_loss"):
        build_objective("next_token", z_loss=-1.0)
