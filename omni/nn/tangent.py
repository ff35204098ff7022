"""Forward-mode derivatives of the refine stream, layer by layer, in three forms.

A `Dual` is a value with its tangent. The transformer passes Duals from part to part, and each part differentiates its
own function: layers by the rules below (ordinary arithmetic on ordinary tensors, as autograd, compilers, activation
checkpoints and sharded parameters need), the small modules at both ends by torch.func.jvp (`lift`). One jvp around the
whole network breaks checkpoints and multiplies zero tangents. rCM (arXiv 2510.08431) passes tangents the same way. Keys
and values of the context are constants. Two copies never see one another: a tangent between copies would silently
falsify MeanFlow and TVM.

    two_pass   the tangent without a graph, for stop-gradient targets: no activation is kept
    carried    value and tangent with a graph: gradients flow through both (reverse over forward)
    central    (F(p + h d) - F(p - h d)) / 2h: any kernel; the test oracle of the other two; its graph is F's
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["two_pass", "carried", "central"]


class Dual(NamedTuple):
    """A value and its derivative along one direction: same shape, same dtype."""

    value: Tensor
    tangent: Tensor


def lift(function: Callable[..., Tensor], *arguments: Any) -> Any:
    """function(*arguments) of tensors; if some are Duals, the Dual of its value (the others are constants)."""
    at = [n for n, argument in enumerate(arguments) if isinstance(argument, Dual)]
    if not at:
        return function(*arguments)

    def local(*values: Tensor) -> Tensor:
        full = list(arguments)
        for n, value in zip(at, values, strict=True):
            full[n] = value
        return function(*full)

    values, tangents = zip(*(arguments[n] for n in at), strict=True)
    return Dual(*torch.func.jvp(local, values, tangents))


def linear(function: Callable[[Tensor], Tensor], a: Dual) -> Dual:
    """A linear function (no bias) of a Dual."""
    return Dual(function(a.value), function(a.tangent))


def add(a: Dual, b: Dual) -> Dual:
    """The sum of two Duals."""
    return Dual(a.value + b.value, a.tangent + b.tangent)


def product(a: Dual, b: Dual) -> Dual:
    """The product of two Duals, elementwise."""
    return Dual(a.value * b.value, torch.addcmul(a.tangent * b.value, a.value, b.tangent))


def silu(a: Dual) -> Dual:
    """y = x sigmoid(x);  y' = x' (sigmoid(x) + y (1 - sigmoid(x)))."""
    gate = a.value.sigmoid()
    y = a.value * gate
    return Dual(y, a.tangent * (gate + y * (1 - gate)))


def rms_norm(a: Dual, weight: Tensor, eps: float) -> Dual:
    """y = x / rho, rho^2 = mean(x^2) + eps;  y' = (x' - y mean(y x')) / rho; both times the weight."""
    scale = (a.value.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    y = a.value * scale
    along = (y * a.tangent).mean(-1, keepdim=True)
    return Dual(y * weight, torch.addcmul(a.tangent, y, along, value=-1) * scale * weight)


def differentiate(
    function: Callable[..., Any],
    point: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    form: Form,
    step: float | None = None,
) -> Dual:
    """function(point), and d/dh function(point + h direction) at h = 0.

    Args:
        function: takes tensors and returns one; for `two_pass` and `carried` it also takes Duals and returns one.
        form: see the module docstring.
        step: h of `central`; None: 1e-6 in float64, 1e-3 in float32 (smaller steps lose to rounding).
    """
    if form == "central":
        h = step or (1e-6 if point[0].dtype == torch.float64 else 1e-3)
        ahead, behind = (function(*(p + c * d for p, d in zip(point, direction, strict=True))) for c in (h, -h))
        return Dual(function(*point), (ahead - behind) / (2 * h))
    with torch.set_grad_enabled(torch.is_grad_enabled() and form == "carried"):
        return function(*map(Dual, point, direction))
