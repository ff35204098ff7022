"""Pairing of noise with data: transport permutes the noise to the least cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from omni.objectives.base import Items
from omni.objectives.flow_matching import FlowMatching
from omni.objectives.pairing import GROUP, Pairing
from omni.rng import Key

SIZES = (2, 1, 2, 2, 1, 2)


def items(pairing: Pairing) -> Items:
    """Six items of two sizes in two rows, with padding between and after them."""
    item = torch.tensor([[0, 0, 1, -1, 2, 2], [3, 3, 4, 5, 5, -1]])
    latents = torch.where((item >= 0).unsqueeze(-1), Key(0).normal((2, 6, 3)), 0)
    return Items(latents, item, [(n, 0, 0) for n in range(6)], pairing=pairing)


def blocks(value: torch.Tensor, of: Items) -> list[torch.Tensor]:
    return [value[of.item == n] for n in range(6)]


def test_transport_is_the_permutation_of_least_cost() -> None:
    independent, paired = items("independent"), items("transport")
    before, after = (blocks(one.noise(Key(1)), one) for one in (independent, paired))
    data = blocks(independent.latents, independent)
    for size in (1, 2):
        members = [n for n in range(6) if SIZES[n] == size]

        def cost(order: tuple[int, ...], members: list[int] = members) -> float:
            return sum(float((before[m] - data[n]).pow(2).sum()) for n, m in zip(members, order, strict=True))

        best = min(itertools.permutations(members), key=cost)
        assert all(torch.equal(after[n], before[m]) for n, m in zip(members, best, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not paired.noise(Key(1))[paired.item < 0].any()


def test_many_items_are_paired_in_groups() -> None:
    num = 2 * GROUP + 3
    latents = Key(0).normal((1, num, 2))
    many = Items(latents, torch.arange(num)[None], [(n, 0, 0) for n in range(num)], pairing="transport")
    before, after = replace(many, pairing="independent").noise(Key(1))[0], many.noise(Key(1))[0]
    for start in range(0, num, GROUP):
        group = slice(start, start + GROUP)
        assert sorted(map(tuple, before[group].tolist())) == sorted(map(tuple, after[group].tolist()))
    data = latents[0]
    assert float((after - data).pow(2).sum()) < 0.6 * float((before - data).pow(2).sum())


def test_only_the_noise_of_data_is_paired() -> None:
    independent, paired = items("independent"), items("transport")
    assert torch.equal(independent.noise(Key(1), "other"), paired.noise(Key(1), "other"))
    draw = FlowMatching(pairing="transport").draw(paired, Key(1))
    assert torch.equal(draw.noise, paired.noise(Key(1))) and torch.equal(draw.v, draw.noise - paired.latents)
    empty = replace(paired, latents=torch.zeros(1, 0, 3), item=torch.zeros(1, 0, dtype=torch.int64), names=[])
    assert empty.noise(Key(1)).shape == (1, 0, 3)


def test_without_scipy_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match=r"pairing = 'transport' needs scipy; pip install 'omni-flow\[pairing\]'"):
        items("transport").noise(Key(1))
