"""The distributions of times. t = 1 is noise, t = 0 data, and s <= t is the end of a jump.

One time has a density (`TimeDistribution`); a pair (t, s) combines two by a rule (`PairDistribution`). Every sample is
keyed by its item's name (document, block, copy), so it depends neither on packing nor on micro-batches.

Legend: I items (noisy copies of blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.rng import Key, uniforms

Name = tuple[int, int, int]  # (document, block, copy)


class BatchNames(Sequence[Name]):
    """Names (n // copies, 0, n % copies) of items of one batch, such as points of toy data.

    Their random values come from one generator per (key, purpose), far faster than one per name. So they depend on the
    index in the batch and on `num`: do not use such names for items that may be packed otherwise.
    """

    def __init__(self, num: int, copies: int = 1) -> None:
        self.num, self.copies = num, copies

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, n):  # noqa: ANN001, ANN204
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(self.num))]
        if not -self.num <= n < self.num:
            raise IndexError(n)
        return (n % self.num // self.copies, 0, n % self.num % self.copies)


def keys_I(names: Sequence[Name], key: Key, device: torch.device | str = "cpu") -> Tensor:
    """int64 (I,): the key of every item, for omni.rng's `uniforms` and `normals`."""
    return key.each(torch.tensor(list(names), dtype=torch.int64, device=device).reshape(-1, 3))


def uniform_I(names: Sequence[Name], key: Key, purpose: str) -> Tensor:
    """(I,) float64 in [0, 1), each a function of (key, purpose, name) alone."""
    if isinstance(names, BatchNames):
        return key.fold(purpose).uniform((len(names),), torch.float64)
    return uniforms(keys_I(names, key.fold(purpose)))


def stratified_I(names: Sequence[Name], key: Key, purpose: str) -> Tensor:
    """(I,) float64 in [0, 1): the copies of one block are evenly spaced from one keyed offset."""
    if isinstance(names, BatchNames):
        n = torch.arange(len(names))
        return (uniform_I(names, key, purpose)[n - n % names.copies] + n % names.copies / names.copies) % 1.0
    copy = torch.tensor([copy for _, _, copy in names], dtype=torch.float64)
    copies = 1 + int(copy.max()) if len(names) else 1
    offsets = uniforms(keys_I([(document, block, 0) for document, block, _ in names], key.fold(purpose)))
    return (offsets + copy / copies) % 1.0


def karras_times(num: int, rho: float, sigma_min: float, sigma_max: float, data_std: float) -> Tensor:
    """(num,) float64, ascending: EDM's grid of noise levels (arXiv 2206.00364, eq. 5) as times.

    sigma_i = (sigma_min^(1/rho) + i / (num - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho and t = sigma / (sigma +
    data_std). The levels are those of data of deviation `data_std` (0.5 in EDM); Omni's latents have deviation 1. The
    lowest node is 0, where Omni has its boundary condition f(x, 0, 0) = x; EDM's is at sigma_min.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (low + (high - low) * torch.linspace(0, 1, num, dtype=torch.float64)) ** rho
    t = sigma / (sigma + data_std)
    return torch.where(torch.arange(num) == 0, 0.0, t)


class TimeDistribution(Frozen):
    """The density of one time.

    uniform        U(low, high)
    logit_normal   sigmoid(mean + std z)                                              (SD3, arXiv 2403.03206)
    log_normal     sigma = exp(mean + std z), t = sigma / (1 + sigma): the same density, named as EDM names it

    then warped by shift t / (1 + (shift - 1) t) (resolution shift) and held inside [low, high].
    """

    kind: Literal["uniform", "logit_normal", "log_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    shift: float = Field(default=1.0, gt=0)
    low: float = Field(default=0.0, ge=0, lt=1)
    high: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> TimeDistribution:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low={self.low}, high={self.high}")
        return self

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse distribution function: u in [0, 1] float64 -> t, same shape."""
        if self.kind == "uniform":
            t = u
        else:
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return self.low + (self.high - self.low) * t if self.kind == "uniform" else t.clamp(self.low, self.high)

    def cumulative(self, t: Tensor) -> Tensor:
        """Distribution function before clamping to [low, high], the inverse of `quantile`: t float64 -> u."""
        if self.kind == "uniform":
            t = ((t - self.low) / (self.high - self.low)).clamp(0, 1)
        t = t / (self.shift - (self.shift - 1) * t)
        return t if self.kind == "uniform" else torch.special.ndtr((torch.logit(t) - self.mean) / self.std)

    def draw(self, names: Sequence[Name], key: Key, purpose: str = "time") -> Tensor:
        """(I,) float64; the copies of one block are stratified."""
        return self.quantile(stratified_I(names, key, purpose))


class PairDistribution(Frozen):
    """The joint distribution of t and s <= t.

    max_min   (max, min) of two independent samples, `time` and `end`                  (MeanFlow, arXiv 2505.13447)
    below     t from `time`, s uniform in [low, t]                                     (IMM, arXiv 2503.07565)
    zero      t from `time`, s = 0                                                     (consistency models)
    gap       g from `gap`, s from `time` truncated to [0, 1 - g], t = s + g           (TVM, arXiv 2511.19797)

    A keyed share `diagonal` of the items then has s = t.
    """

    kind: Literal["max_min", "below", "zero", "gap"] = "max_min"
    time: TimeDistribution = TimeDistribution()
    end: TimeDistribution | None = None
    gap: TimeDistribution = TimeDistribution(mean=-0.8)
    diagonal: float = Field(default=0.0, ge=0, le=1)

    def draw(self, names: Sequence[Name], key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64."""
        if self.kind == "max_min":
            a, b = self.time.draw(names, key), (self.end or self.time).draw(names, key, "end time")
            t, s = torch.maximum(a, b), torch.minimum(a, b)
        elif self.kind == "gap":
            g = self.gap.draw(names, key, "gap")
            s = self._truncated(1 - g, stratified_I(names, key, "end time"))
            t = s + g
        else:
            t = self.time.draw(names, key)
            low = self.time.low
            s = low + (t - low) * uniform_I(names, key, "end time") if self.kind == "below" else torch.zeros_like(t)
        same = uniform_I(names, key, "diagonal") < self.diagonal
        return t, torch.where(same, t, s)

    def _truncated(self, high: Tensor, u: Tensor) -> Tensor:
        """A sample of `time` given that it is at most `high`: quantile(u P(time <= high)), by bisection of quantile."""
        low_u, high_u = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            middle = (low_u + high_u) / 2
            inside = self.time.quantile(middle) <= high
            low_u, high_u = torch.where(inside, middle, low_u), torch.where(inside, high_u, middle)
        return torch.minimum(self.time.quantile(u * low_u), high)
