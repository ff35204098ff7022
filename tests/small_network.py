"""A small float64 network as the callable of objectives, and gradient checks with stop-gradient parts held constant.

F = W2 tanh(W1 [x, t, s, beta] + b + c), position by position; c is the condition, absent for the null branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from omni.objectives.base import Items
from omni.rng import Key

Weights = Mapping[str, Tensor]


def small_weights(channels: int = 2, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    shapes = {"w1": (channels + 3, width), "b": (width,), "c": (width,), "w2": (width, channels)}
    return {
        name: (0.5 * Key(seed).fold(name).normal(shape, torch.float64)).requires_grad_()
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class NetworkCall:
    """`live` weights where a gradient may flow; `held` weights (a copy) in all parts without a graph to the weights.

    `log` records each call: (kind, t, s, beta).
    """

    items: Items
    live: Weights
    held: Weights
    beta: Tensor | None = None
    frozen: bool = False
    is_null: bool = False
    log: list[tuple[str, Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self.log.append(("null" if self.is_null else "call", t, s, self.beta))
        return self._evaluate(x, t, s)

    def _evaluate(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        w = self.live if torch.is_grad_enabled() and not self.frozen else self.held
        beta = torch.ones_like(t) if self.beta is None else self.beta
        times = [self.items.expand(value).expand(*x.shape[:-1], 1) for value in (t, s, beta)]
        h = torch.cat([x, *times], -1) @ w["w1"] + w["b"] + (0 if self.is_null else w["c"])
        return h.tanh() @ w["w2"]

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        self.log.append(("derivative", t, s, self.beta))
        with torch.no_grad():
            return torch.func.jvp(self._evaluate, (x, t, s), (dx, dt, ds))[1]

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(self._evaluate, (x, t, s), (dx, dt, ds))

    def target(self, graph: bool = False) -> NetworkCall:
        """With `graph` it also uses the held weights: its gradient reaches x alone."""
        return replace(self, frozen=True) if not graph else replace(self, live=self.held)

    def null(self) -> NetworkCall:
        return replace(self, is_null=True, beta=None)

    def guided(self, beta: Tensor) -> NetworkCall:
        return replace(self, beta=beta)


def network_call(items: Items, seed: int = 0) -> NetworkCall:
    weights = small_weights(items.latents.shape[-1], seed=seed)
    return NetworkCall(items, weights, {name: value.detach().clone() for name, value in weights.items()})


@contextmanager
def stop_gradients_held() -> Iterator[Callable[[], None]]:
    """Within, every `Tensor.detach` records its value; after a call of the given function, it returns recorded values.

    A loss evaluated again at other weights thus keeps its stop-gradient parts, as its gradient does.
    """
    original, recorded, place = torch.Tensor.detach, [], [-1]

    def detach(self: Tensor) -> Tensor:
        if place[0] < 0:
            recorded.append(original(self).clone())
            return recorded[-1]
        place[0] += 1
        return recorded[place[0] - 1]

    def rewind() -> None:
        place[0] = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", detach)
        yield rewind


def gradient_error(
    loss: Callable[[NetworkCall], Tensor], call: NetworkCall, directions: int = 6, h: float = 1e-5
) -> float:
    """The largest difference, over random directions, between the gradient and central differences; relative.

    h: their step, well below the scale on which the loss bends.
    """
    worst = 0.0
    with stop_gradients_held() as rewind:
        value = loss(call)
        found = torch.autograd.grad(value, list(call.live.values()), allow_unused=True)
        gradient = dict(zip(call.live, found, strict=True))
        for n in range(directions):
            step = {k: Key(n).fold("direction", k).normal(tuple(v.shape), v.dtype) for k, v in call.live.items()}
            ends = []
            for sign in (1, -1):
                rewind()
                moved = {k: (v.data + sign * h * step[k]).requires_grad_() for k, v in call.live.items()}
                ends.append(float(loss(replace(call, live=moved)).data))
            along = float(sum((gradient[k] * step[k]).sum() for k in step if gradient[k] is not None))
            wanted = (ends[0] - ends[1]) / (2 * h)
            worst = max(worst, abs(along - wanted) / max(abs(wanted), 1e-3 * abs(float(value.data)), 1e-9))
    return worst
