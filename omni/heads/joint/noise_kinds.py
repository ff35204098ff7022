"""The noise of a token: its form, its map to an id under a distribution, and the inverse map.

There are three kinds. Each starts as `size` uniforms a token and is then transformed, so all noise is sampled as
uniforms:

    uniform   one number u; the id is min{v : F(v) > u} (samplers.inverse_cdf), as in autoregressive decoding
    tree      ceil(log2 V) numbers, one for each level of a binary tree whose leaves are the ids in order; at a node
              whose children weigh (a, b) the path goes right if u (a + b) >= a
    gumbel    V Gumbel numbers g; the id is argmax(log p + g) (arXiv 2603.22216)

`invert` samples p(noise | distribution, id); averaged over ids from the distribution, that is the prior.

Legend: V vocabulary, D levels, S numbers of a token's noise (1, D or V), W width; leading dimensions are free.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample, uniform_interval

NoiseKind = Literal["uniform", "tree", "gumbel"]
SMALLEST = 1e-9  # the smallest probability that is inverted; below it float32 features of two noises are equal
TINY = 2.0**-53  # 1 - TINY is the largest float64 below 1


class SineEmbedding(nn.Module):
    """Numbers (..., S) in [0, 1) -> (..., W): each with its sine and cosine at 2^i 2 pi, i < `frequencies`, then a
    two-layer MLP. The features are computed in float64."""

    def __init__(self, size: int, width: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.enter = nn.Linear(size * (1 + 2 * frequencies), width)
        self.leave = nn.Linear(width, width)

    def forward(self, u: Tensor) -> Tensor:
        u = u.double()
        turns = u.unsqueeze(-1) * 2.0 ** torch.arange(self.frequencies, device=u.device) * (2 * math.pi)
        found = torch.cat([u.unsqueeze(-1), turns.sin(), turns.cos()], -1).flatten(-2)
        return self.leave(nn.functional.silu(self.enter(found.to(self.enter.weight.dtype))))


class Noise(nn.Module, ABC):
    """One kind of noise, and its embedding into placeholders. Noise is (..., S) float64."""

    tied: ClassVar[int] = 0  # how many of a token's S numbers are its uniform of autoregressive decoding

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def form(self, draws: Tensor) -> Tensor:
        """(..., S) independent uniforms in [0, 1) -> noise from the prior."""
        return draws

    def prior(self, uniforms: Tensor, key: Key) -> Tensor:
        """(..., S) noise from the prior for `uniforms` (...), the noise of autoregressive decoding. The kind uses them
        where it can (uniform: all of it; tree: the root's branch); the rest is keyed."""
        rest = self.size - self.tied
        kept = uniforms.double().unsqueeze(-1)[..., : self.tied]
        if not rest:
            return self.form(kept)
        drawn = key.fold("noise").uniform((*uniforms.shape, rest), torch.float64).to(uniforms.device)
        return self.form(torch.cat([kept, drawn], -1))

    @abstractmethod
    def choose(self, log_p: Tensor, noise: Tensor) -> Tensor:
        """The id (...) of noise (..., S) under log_p (..., V); its probability is never zero."""

    @abstractmethod
    def invert(self, log_p: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        """Noise (..., S) that maps to ids (...) under log_p (..., V), from uniforms `draws` (..., S): a sample from the
        posterior. Exact if the id has probability SMALLEST or more, else only finite."""

    @abstractmethod
    def embed(self, noise: Tensor) -> Tensor:
        """(..., S) -> (..., W)."""


class UniformNoise(Noise):
    """One number a token, the uniform of autoregressive decoding."""

    tied = 1

    def __init__(self, vocab_size: int, width: int, frequencies: int) -> None:
        super().__init__(1)
        self.waves = SineEmbedding(1, width, frequencies)

    def choose(self, log_p: Tensor, noise: Tensor) -> Tensor:
        return inverse_cdf_sample(log_p, noise[..., 0])

    def invert(self, log_p: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        lower, width = uniform_interval(log_p, ids)
        u = (lower + draws[..., 0] * width).clamp(max=1 - TINY)
        wrong = inverse_cdf_sample(log_p, u) != ids  # u was rounded out of the interval; its middle is safe
        return torch.where(wrong, lower + width / 2, u).unsqueeze(-1)

    def embed(self, noise: Tensor) -> Tensor:
        return self.waves(noise)


class TreeNoise(Noise):
    """The root's branch is that of autoregressive decoding with the token's uniform."""

    tied = 1

    def __init__(self, vocab_size: int, width: int, frequencies: int) -> None:
        super().__init__(max(1, math.ceil(math.log2(vocab_size))))
        self.waves = SineEmbedding(self.size, width, frequencies)

    def choose(self, log_p: Tensor, noise: Tensor) -> Tensor:
        node = torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)
        for level, mass in enumerate(self._levels(log_p)):
            left, right = _children(mass, node)
            goes = (noise[..., level] * (left + right) >= left) & (right > 0)
            node = 2 * node + goes.long()
        return node

    def invert(self, log_p: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        found = []
        for level, mass in enumerate(self._levels(log_p)):
            node = ids >> (self.size - level)
            left, right = _children(mass, node)
            goes = ((ids >> (self.size - level - 1)) & 1).bool()
            total = (left + right).clamp(min=torch.finfo(torch.float64).tiny)
            lower = torch.where(goes, left / total, 0.0)
            width = torch.where(goes, right, left) / total
            u = (lower + draws[..., level] * width).clamp(max=1 - TINY)
            wrong = ((u * (left + right) >= left) & (right > 0)) != goes
            found.append(torch.where(wrong, lower + width / 2, u))
        return torch.stack(found, -1)

    def embed(self, noise: Tensor) -> Tensor:
        return self.waves(noise)

    def _levels(self, log_p: Tensor) -> list[Tensor]:
        """The mass of every node, level by level from the root's two children: (..., 2), (..., 4), ... (..., 2^D)."""
        p = log_p.double().softmax(-1)
        mass = nn.functional.pad(p, (0, 2**self.size - p.shape[-1]))
        levels = [mass]
        while mass.shape[-1] > 2:
            mass = mass.unflatten(-1, (-1, 2)).sum(-1)
            levels.append(mass)
        return levels[::-1]


def _children(mass: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """Masses of the two children of `node` (...) among the nodes (..., 2^d) of one level."""
    left = mass.gather(-1, 2 * node.unsqueeze(-1)).squeeze(-1)
    right = mass.gather(-1, 2 * node.unsqueeze(-1) + 1).squeeze(-1)
    return left, right


class GumbelNoise(Noise):
    """Placeholders embed it as a linear function of softmax(g)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size)
        self.weigh = nn.Linear(vocab_size, width, bias=False)

    def form(self, draws: Tensor) -> Tensor:
        """Uniforms -> Gumbel numbers, -log(-log u)."""
        return -(-draws.clamp(min=TINY).log()).log()

    def choose(self, log_p: Tensor, noise: Tensor) -> Tensor:
        return (log_p.double().log_softmax(-1) + noise).argmax(-1)

    def invert(self, log_p: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        """The largest log p + g is Gumbel for every distribution; the others are truncated at it (the truncated Gumbel
        numbers of arXiv 1411.0030)."""
        log_p, free = log_p.double().log_softmax(-1), self.form(draws)
        where = ids.unsqueeze(-1)
        largest = free.gather(-1, where)
        cut = largest - log_p
        others = torch.minimum(-torch.logaddexp(-free, -cut), cut - 1e-9)
        return others.scatter(-1, where, cut.gather(-1, where).clamp(max=1e3))

    def embed(self, noise: Tensor) -> Tensor:
        return self.weigh(noise.softmax(-1).to(self.weigh.weight.dtype))


def build_noise(kind: NoiseKind, vocab_size: int, width: int, frequencies: int) -> Noise:
    """The kind of noise by its name in recipes."""
    if kind == "gumbel":
        return GumbelNoise(vocab_size, width)
    return (UniformNoise if kind == "uniform" else TreeNoise)(vocab_size, width, frequencies)


def uniforms_by_name(names: tuple[tuple[int, int, int], ...], shape: tuple[int, ...], key: Key) -> Tensor:
    """(B, *shape) float64 uniforms; those of a block are keyed by its name alone. Another key or shape changes the
    noise of every run."""
    return torch.stack([key.fold(*name).uniform(shape, torch.float64) for name in names])
