"""A small network F(x, t, s, beta) on the plane, and its callable for objectives.

    features  x, and of t and of t - s: itself and sin, cos of 1, 2, 4 quarter turns; beta - 1; 1 without condition
    network   a stack of linear layers with SiLU

The time features have low frequencies because derivatives with respect to time multiply by the frequency.
`Count` counts the evaluations of an objective: one evaluation is one point through the network. A result with a graph
counts as `gradient` (the backward pass costs again), any other as `plain`; a derivative counts as two evaluations,
value and tangent.

Legend: I items (points), C channels, K frequencies, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from omni.objectives.base import Items
from omni.rng import Key

FREQUENCIES = (1.0, 2.0, 4.0)  # in quarter turns over the unit interval of time


class PlaneNetwork(nn.Module):
    """Linear layers of `width`, `depth` of them hidden, with SiLU between. F starts at 0.

    The condition is the data set or none (`is_null`); it and beta are inputs.
    """

    def __init__(self, key: Key, channels: int = 2, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        sizes = [channels + 2 * (1 + 2 * len(FREQUENCIES)) + 2] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.read = nn.Linear(width, channels)
        for parameter in self.parameters():
            parameter.detach().zero_()
        for number, layer in enumerate(self.layers):
            weight = key.fold("initialise", number).normal((sizes[number + 1], sizes[number]))
            layer.get_parameter("weight").detach().copy_(weight * math.sqrt(2 / sizes[number]))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, beta: Tensor, is_null: Tensor) -> Tensor:
        """x (I, C); t, s, beta, is_null (I,), all of the weights' dtype -> (I, C)."""
        h = features(x, t, s, beta, is_null)
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        return self.read(h)

    def with_tangent(
        self, primals: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor, Tensor, Tensor], *constants: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(F, dF) along tangents of (x, t, s). Written out: a third of the cost of forward-mode autograd here."""
        (_, t, s), (dx, dt, ds) = primals, tangents
        h = features(*primals, *constants)
        rate = torch.cat([dx, time_rates(t, dt), time_rates(t - s, dt - ds), dt.new_zeros(len(dt), 2)], -1)
        for layer in self.layers:
            z, rate = layer(h), rate @ layer.get_parameter("weight").T
            gate = z.sigmoid()
            h = z * gate
            rate = rate * (gate + h * (1 - gate))
        return self.read(h), rate @ self.read.weight.T


def features(x: Tensor, t: Tensor, s: Tensor, beta: Tensor, is_null: Tensor) -> Tensor:
    """The network's input, (I, C + 2 (1 + 2 K) + 2)."""
    flags = torch.stack([beta - 1, is_null], -1)
    return torch.cat([x, time_features(t), time_features(t - s), flags], -1)


def time_features(t: Tensor) -> Tensor:
    """(I,) -> (I, 1 + 2 K)."""
    angle_IK = t[:, None] * angular_frequencies(t.dtype)
    return torch.cat([t[:, None], angle_IK.sin(), angle_IK.cos()], -1)


def time_rates(t: Tensor, dt: Tensor) -> Tensor:
    """The derivative of `time_features` along dt, of the same shape."""
    turn_K = angular_frequencies(t.dtype)
    angle_IK = t[:, None] * turn_K
    return dt[:, None] * torch.cat([torch.ones_like(t[:, None]), turn_K * angle_IK.cos(), -turn_K * angle_IK.sin()], -1)


def angular_frequencies(dtype: torch.dtype) -> Tensor:
    """(K,) radians per unit of time."""
    return 0.5 * math.pi * torch.tensor(FREQUENCIES, dtype=dtype)


@dataclass
class Count:
    """Evaluations of the network so far, in points."""

    gradient: int = 0
    plain: int = 0

    def add(self, num: int, *, has_graph: bool) -> None:
        """Count `num` evaluations."""
        if has_graph:
            self.gradient += num
        else:
            self.plain += num


@dataclass(frozen=True)
class PlaneCall:
    """The FlowCall of a PlaneNetwork (see omni.objectives.base). Each item is one latent.

    `averages`: the target network, None where the objective has none. `frozen`: results have no graph.
    """

    network: PlaneNetwork
    items: Items
    averages: PlaneNetwork | None = None
    beta: Tensor | None = None  # (I,); None is 1
    frozen: bool = False
    is_null: bool = False
    count: Count = field(default_factory=Count)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with self._counted(len(t), graph=not self.frozen):
            return self.network(*self._flattened(x, t, s), *self._constants()).view(x.shape)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        return self._with_derivative((x, t, s), (dx, dt, ds), graph=False)[1]

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._with_derivative((x, t, s), (dx, dt, ds), graph=not self.frozen)

    def target(self, graph: bool = False) -> PlaneCall:
        return replace(self, network=self.averages or self.network, averages=None, frozen=not graph)

    def null(self) -> PlaneCall:
        return replace(self, is_null=True, beta=None)

    def guided(self, beta: Tensor) -> PlaneCall:
        return replace(self, beta=beta)

    def _with_derivative(
        self, primals: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor, Tensor, Tensor], *, graph: bool
    ) -> tuple[Tensor, Tensor]:
        """F and its derivative along `tangents`; two evaluations a point."""
        x = primals[0]
        with self._counted(2 * len(primals[1]), graph=graph):
            found = self.network.with_tangent(self._flattened(*primals), self._flattened(*tangents), *self._constants())
        return found[0].view(x.shape), found[1].view(x.shape)

    def _counted(self, num: int, *, graph: bool) -> torch.set_grad_enabled:
        """Count `num` evaluations; return a context with gradients where they are enabled and `graph` is true."""
        graph = graph and torch.is_grad_enabled()
        self.count.add(num, has_graph=graph)
        return torch.set_grad_enabled(graph)

    def _flattened(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (1, I, C) -> (I, C), and all three in the weights' dtype."""
        dtype = self.network.read.weight.dtype
        return x.flatten(0, 1).to(dtype), t.to(dtype), s.to(dtype)

    def _constants(self) -> tuple[Tensor, Tensor]:
        """(beta, is_null), each (I,) of the weights' dtype."""
        num, dtype = len(self.items), self.network.read.weight.dtype
        beta = torch.ones(num, dtype=dtype) if self.beta is None else self.beta.to(dtype)
        dropped = self.items.is_null
        if self.is_null or dropped is None:
            return beta, torch.full((num,), float(self.is_null), dtype=dtype)
        return beta, dropped.to(dtype)
