"""Keyed randomness: the only place in Omni that seeds a generator.

A `Key` is a seed plus a path of folds, e.g. `Key(0).fold("noise", step, sample)`. The same path gives
the same draws in any process, at any world size, after any resume: nothing needs to be saved.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch


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
        """Standard normal draws on the CPU; move them to a device afterwards (same bits everywhere)."""
        return torch.randn(shape, generator=self.generator(), dtype=dtype)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uniform draws in [0, 1) on the CPU."""
        return torch.rand(shape, generator=self.generator(), dtype=dtype)
