"""The plane's cells divide the noise evenly, also for a point in the midst of others."""

from __future__ import annotations

import torch

from eval.toy.semidiscrete import Semidiscrete
from omni.rng import Key

POINTS = torch.tensor([[2.0, 0], [-1, 1.7], [-1, -1.7], [0.1, 0.1]])
NOISE = Key(5).normal((40_000, 2))


def shares_of(coupling: Semidiscrete) -> torch.Tensor:
    return coupling.chosen(NOISE).bincount(minlength=4) / 10_000


def test_every_point_gets_an_equal_part_of_the_noise() -> None:
    coupling = Semidiscrete(POINTS, Key(0))
    assert float((shares_of(coupling) - 1).abs().max()) < 0.12
    coupling.potentials = torch.zeros(4)
    assert float(shares_of(coupling)[3]) < 0.01


def test_a_point_far_out_gets_the_noise_on_its_side() -> None:
    mean = NOISE[Semidiscrete(POINTS, Key(0)).chosen(NOISE) == 0].mean(0)
    assert float(mean[0]) > 1 and abs(float(mean[1])) < 0.2
