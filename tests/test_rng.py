"""Thousands of keys: a sample depends on its own name alone, not on its neighbours, and has the right distribution."""

from __future__ import annotations

import hashlib
import math
import random

import pytest
import torch

from omni.objectives.base import Items
from omni.objectives.times import stratified_I, uniform_I
from omni.rng import Key, _mixed, normals, uniforms

NAMES = [(document, block, copy) for document in range(40) for block in (3, 9) for copy in range(2)]


def test_it_is_splitmix64() -> None:
    """The first outputs of the published generator with state 0."""
    states = torch.arange(1, 4) * (0x9E3779B97F4A7C15 - (1 << 64))
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(z) % (1 << 64) for z in _mixed(states)] == published


def test_keys_depend_on_the_name_and_the_path_alone() -> None:
    names = torch.tensor(NAMES)
    keys = Key(1).fold("noise").each(names)
    assert len(set(keys.tolist())) == len(NAMES)
    order = torch.randperm(len(NAMES), generator=Key(0).generator())
    assert torch.equal(Key(1).fold("noise").each(names[order]), keys[order])
    assert torch.equal(Key(1).fold("noise").each(names[5:6]), keys[5:6])
    for other in (Key(2).fold("noise"), Key(1).fold("time"), Key(1).fold("noise", 0)):
        assert not (other.each(names) == keys).any()
    same = Key(1).fold("noise").each(names.flip(1)) == keys
    assert torch.equal(same, names[:, 0] == names[:, 2])  # columns are distinguished


def test_the_distributions() -> None:
    keys = Key(3).each(torch.arange(3000).view(-1, 3))
    assert torch.equal(uniforms(keys, 7), uniforms(keys, torch.tensor(7)))
    u = uniforms(keys.unsqueeze(1), torch.arange(200))
    z = normals(keys.unsqueeze(1), torch.arange(200)).double()
    num = u.numel()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / num) ** 0.5
    ranks = u.flatten().sort().values
    assert float((ranks - torch.arange(num) / num).abs().max()) < 2.0 / num**0.5  # Kolmogorov and Smirnov's distance
    inside = torch.special.ndtr(z.flatten()).sort().values
    assert float((inside - torch.arange(2 * num) / (2 * num)).abs().max()) < 2.0 / (2 * num) ** 0.5
    columns = z.flatten(1)
    correlation = columns[:, :50].T @ columns[:, 50:100] / len(columns)
    assert float(correlation.abs().max()) < 5 / len(columns) ** 0.5
    neighbours = (columns[1:] * columns[:-1]).mean()
    assert abs(float(neighbours)) < 4 / columns.numel() ** 0.5


def test_noise_of_an_item_does_not_depend_on_position_or_neighbours() -> None:
    """Also with items of different sizes, an odd number of channels, and padding in between."""
    item = torch.tensor([[0, 0, 0, -1, 1, 1], [2, 2, -1, -1, -1, -1]])
    names = ((5, 1, 0), (5, 1, 1), (8, 2, 0))
    noise = Items(torch.zeros(2, 6, 3), item, names).noise(Key(0))
    assert (noise[item < 0] == 0).all() and (noise[item >= 0] != 0).all()
    assert len(noise[item >= 0].unique()) == 7 * 3
    alone = Items(torch.zeros(1, 2, 3), torch.tensor([[0, 0]]), names[2:]).noise(Key(0))
    assert torch.equal(alone[0], noise[1, :2])
    moved = Items(torch.zeros(1, 4, 3), torch.tensor([[-1, 0, 0, 0]]), names[:1]).noise(Key(0))
    assert torch.equal(moved[0, 1:], noise[0, :3])


def test_copies_are_stratified() -> None:
    u = stratified_I(NAMES, Key(0), "time").view(-1, 2)
    assert torch.allclose((u[:, 1] - u[:, 0]) % 1.0, torch.full((len(u),), 0.5, dtype=torch.float64))
    assert len(u[:, 0].unique()) == len(u)
    assert not torch.equal(uniform_I(NAMES, Key(0), "time"), uniform_I(NAMES, Key(0), "level"))


# ---- the same in plain Python --------------------------------------------------------------------------------------

GOLDEN, BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mixed(z: int) -> int:
    """SplitMix64 as published, on Python's integers."""
    z &= BITS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
    return z ^ z >> 31


def test_each_uniforms_and_normals_equal_plain_integers() -> None:
    key, names = Key(5).fold("x"), [(3, 7), (-2, 0), (1 << 40, 5)]
    keys = key.each(torch.tensor(names))
    for name, found in zip(names, keys.tolist(), strict=True):
        bits = key.integer()
        for part in name:
            bits = mixed(bits ^ mixed(part + GOLDEN))
        assert found % (1 << 64) == bits
        for counter in (0, 1, 9):
            z = mixed(bits + (counter + 1) * GOLDEN)
            assert float(uniforms(torch.tensor([found]), counter)) == (z >> 11) / 2**53
            radius = math.sqrt(-2 * math.log(((z >> 32) + 0.5) / 2**32))
            angle = 2 * math.pi * (z % (1 << 32)) / 2**32
            pair = normals(torch.tensor([found]), torch.tensor([counter]))
            assert pair.shape == (1, 2) and pair.dtype == torch.float32
            assert pair[0].tolist() == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-6)
    assert float(uniforms(keys[:1])) == float(uniforms(keys[:1], 0))


def test_every_bit_of_a_key_changes_its_normals() -> None:
    """Equal to the float64 formula in float32, except for one or two values that processors round differently."""
    keys = Key(5).each(torch.arange(3000).view(-1, 1))
    wanted = []
    for bits in keys.tolist():
        z = mixed(bits + GOLDEN)
        radius = math.sqrt(-2 * math.log(((z >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (z & 0xFFFFFFFF) / 2**32
        wanted.append([radius * math.cos(angle), radius * math.sin(angle)])
    assert int((normals(keys, torch.tensor(0)) != torch.tensor(wanted)).sum()) <= 2


def test_a_key_hashes_its_seed_and_path() -> None:
    """63 bits of blake2b; ints and strings differ, and a fold of several parts equals several folds."""
    text = "(5, 'noise', 3, '3')"
    wanted = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    key = Key(5).fold("noise").fold(3, "3")
    assert key == Key(5, ("noise", 3, "3")) and key.integer() == wanted < 1 << 63
    assert Key(5).fold("noise", True).integer() == Key(5).fold("noise", 1).integer()
    assert len({Key(5).fold(*path).integer() for path in ((), ("1",), (1,), (1, 1), ("1", 1), ("11",))}) == 6
    assert key.python().random() == random.Random(wanted).random()
    again = torch.Generator().manual_seed(wanted)
    assert torch.equal(key.normal((3, 2)), torch.randn(3, 2, generator=again))
    again.manual_seed(wanted)
    assert torch.equal(key.uniform((3,), torch.float64), torch.rand(3, generator=again, dtype=torch.float64))
    for part in (1.5, None, (1,)):
        with pytest.raises(ValueError, match="a key folds ints and strings, got"):
            Key(0).fold("a", part)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        key.seed = 6  # type: ignore[misc]
    assert len({Key(0), Key(0).fold(), Key(0, ())}) == 1
