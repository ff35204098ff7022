"""Keyed randomness: the only place in Omni that seeds a generator.

A `Key` is a seed plus a path of folds, e.g. `Key(0).fold("noise", step, sample)`. The same path gives the same samples
in any process, at any world size, after any resume: no random state is saved.
All noise, order and initial weights follow from this file: a change of its arithmetic changes every run.
"""

from __future__ import annotations

import hashlib
import math
import random
import secrets
from dataclasses import dataclass

import torch

# SplitMix64's odd constants, as signed integers for torch.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@dataclass(frozen=True)
class Key:
    """A seed and the path folded into it. Immutable and hashable.

    Example:
        >>> Key(0).fold("noise", 3) == Key(0).fold("noise").fold(3)
        True
    """

    seed: int
    path: tuple[int | str, ...] = ()

    def fold(self, *parts: int | str) -> Key:
        """A new key with `parts` (ints or strings) appended to the path."""
        for part in parts:
            if not isinstance(part, int | str):
                raise ValueError(f"a key folds ints and strings, got {part!r}; convert it first")
        return Key(self.seed, self.path + parts)

    def integer(self) -> int:
        """63 bits that depend on the whole path (blake2b)."""
        text = repr((int(self.seed), *(p if isinstance(p, str) else int(p) for p in self.path)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator seeded by this key."""
        return torch.Generator(device=device).manual_seed(self.integer())

    def python(self) -> random.Random:
        """A fresh `random.Random` seeded by this key, for choices among Python objects."""
        return random.Random(self.integer())

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal samples, on the CPU; move them to a device afterwards (same bits everywhere)."""
        return torch.randn(shape, generator=self.generator(), dtype=dtype)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uniform samples in [0, 1), on the CPU."""
        return torch.rand(shape, generator=self.generator(), dtype=dtype)

    def each(self, names: torch.Tensor) -> torch.Tensor:
        """names int64 (N, K) -> int64 (N,): 64 bits for every name, a function of (key, name) alone.

        The vectorised `fold(*name)`, on the names' device. The results are keys for `uniforms` and `normals`.
        """
        bits = torch.full(names.shape[:1], self.integer(), dtype=torch.int64, device=names.device)
        for column in names.unbind(1):
            bits = _mixed(bits ^ _mixed(column + _GOLDEN))
        return bits


def fresh_seed() -> int:
    """63 bits from the system's source of randomness: the seed of a request without one. Record it."""
    return secrets.randbits(63)


def uniforms(keys: torch.Tensor, counter: int | torch.Tensor = 0) -> torch.Tensor:
    """Sample number `counter` of every key of `Key.each`, both broadcast: float64 in [0, 1), the same bits on any
    device.

    The generator is SplitMix64 (Steele, Lea, Flood 2014); its n-th output does not depend on earlier ones.
    """
    counter = torch.as_tensor(counter, device=keys.device)
    return _shifted(_mixed(keys + (counter + 1) * _GOLDEN), 11).to(torch.float64) * 2.0**-53


def normals(keys: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Two standard normal samples for each (key, counter), both int64, broadcast: float32 (..., 2).

    Box-Muller from two 32-bit uniforms, in float64. The last bit may differ between devices, as sines do.
    """
    bits = _mixed(keys + (counter + 1) * _GOLDEN)
    radius = (-2 * torch.log((_shifted(bits, 32).to(torch.float64) + 0.5) * 2.0**-32)).sqrt()
    angle = (bits & 0xFFFFFFFF).to(torch.float64) * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).float()


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's bijection of 64 bits; int64 products wrap around. Never change the constants."""
    z = (z ^ _shifted(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """z >> by, filled with zeros (torch's own fills with the sign)."""
    return (z >> by) & ((1 << (64 - by)) - 1)
