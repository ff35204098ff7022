"""Rotary frequencies for longer contexts than the base allows: linear, dynamic (NTK), llama3, yarn, longrope.

Each class gives the frequencies as published (the formulas of transformers' modeling_rope_utils, here in float64), and
a magnitude that multiplies cosines and sines. `turned` below is the number of dimensions of a head that rotate, 2 F.

The published frequencies of "dynamic" and "longrope" depend on the length of the pass, so that a cached key differs
from the same key in a longer pass. Here they are those of one stored `length`: cached, uncached and training passes
are equal, and equal to the published model in passes of that length ("dynamic") or on that side of the original length
("longrope").

Legend: F frequencies.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen

Factor = Annotated[float, Field(ge=1, le=1e6)]
Length = Annotated[int, Field(ge=1, le=1 << 30)]
Factors = Annotated[tuple[Annotated[float, Field(gt=0, le=1e6)], ...], Field(min_length=1, max_length=512)]
Magnitude = Annotated[float, Field(gt=0, le=100)]


def base_frequencies(base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
    """base ** (-2 i / (2 num)), (num,) float64."""
    return base ** (-torch.arange(num, dtype=torch.float64, device=device) / num)


class _Scaling(Frozen):
    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        """(num,) float64, in radians per position."""
        raise NotImplementedError

    def magnitude(self) -> float:
        """The factor of cosines and sines."""
        return 1.0

    def check(self, num: int) -> None:
        """ValueError if the values do not fit a head with `num` frequencies."""


class LinearScaling(_Scaling):
    """All frequencies divided by `factor` (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: Factor

    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        return base_frequencies(base, num, device) / self.factor


class DynamicScaling(_Scaling):
    """A larger base for contexts of `length` positions (NTK): base (factor length / original - factor + 1) ** (D /
    (D - 2)), with length at least original_length."""

    kind: Literal["dynamic"] = "dynamic"
    factor: Factor
    original_length: Length
    length: Length

    def check(self, num: int) -> None:
        if num < 2:
            raise ValueError("rotary.scaling of kind 'dynamic' needs a head with at least 2 frequencies")

    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        stretch = self.factor * max(self.length, self.original_length) / self.original_length - (self.factor - 1)
        return base_frequencies(base * stretch ** (num / (num - 1)), num, device)


class Llama3Scaling(_Scaling):
    """Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1, arXiv 2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor
    low_frequency_factor: float = Field(gt=0, le=1e6)
    high_frequency_factor: float = Field(gt=0, le=1e6)
    original_length: Length

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if low >= high:
            raise ValueError(f"high_frequency_factor = {high:g} must be greater than low_frequency_factor = {low:g}")
        return self

    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        found = base_frequencies(base, num, device)
        turns = self.original_length * found / (2 * math.pi)  # within the original length
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return found * (kept + (1 - kept) / self.factor)


class YarnScaling(_Scaling):
    """Frequencies with fewer than beta_slow turns in the original length are divided by `factor`, those with more than
    beta_fast kept, and a linear ramp between (arXiv 2309.00071). truncate: the ends of the ramp are whole numbers.

    The magnitude is attention_factor if given; else 0.1 mscale ln(factor) + 1 over the same with mscale_all_dim, where
    both are given and not 0; else 0.1 ln(factor) + 1.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_length: Length
    beta_fast: float = Field(default=32.0, gt=0, le=1e6)
    beta_slow: float = Field(default=1.0, gt=0, le=1e6)
    truncate: bool = True
    attention_factor: Magnitude | None = None
    mscale: float | None = Field(default=None, ge=0, le=100)
    mscale_all_dim: float | None = Field(default=None, ge=0, le=100)

    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        def index_of(turns: float) -> float:
            """The index of the frequency with so many turns in the original length."""
            return num * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num - 1)
        if low == high:
            high += 0.001
        found = base_frequencies(base, num, device)
        index = torch.arange(num, dtype=torch.float64, device=device)
        divided = ((index - low) / (high - low)).clamp(0, 1)
        return found * (1 - divided) + found / self.factor * divided

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        size = math.log(self.factor) / 10
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * size + 1) / (self.mscale_all_dim * size + 1)
        return size + 1


class LongRopeScaling(_Scaling):
    """Each frequency divided by a factor of its own: by short_factors where `length` is at most original_length, else
    by long_factors (arXiv 2402.13753, Phi-3). attention_factor: the magnitude."""

    kind: Literal["longrope"] = "longrope"
    short_factors: Factors
    long_factors: Factors
    original_length: Length
    length: Length
    attention_factor: Magnitude = 1.0

    def check(self, num: int) -> None:
        for name in ("short_factors", "long_factors"):
            if len(getattr(self, name)) != num:
                given = len(getattr(self, name))
                raise ValueError(f"rotary.scaling.{name} has {given} values; the head has {num} frequencies")

    def frequencies(self, base: float, num: int, device: torch.device | str = "cpu") -> Tensor:
        factors = self.long_factors if self.length > self.original_length else self.short_factors
        return base_frequencies(base, num, device) / torch.tensor(factors, dtype=torch.float64, device=device)

    def magnitude(self) -> float:
        return self.attention_factor


RotaryScaling = Annotated[
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")
]
