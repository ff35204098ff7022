"""Weights of a loss per item, as functions of (I,) tensors. Weights never have a gradient.

Legend: I items. e: mean square error of an item; t, s: its times.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def adaptive(e: Tensor, power: float, offset: float) -> Tensor:
    """e / sg(e + offset)^power (MeanFlow, arXiv 2505.13447, eq. 22). Power 0 is the plain square, 1 near a logarithm;
    power 1/2 has the gradient of the norm itself (ECT, arXiv 2406.14548)."""
    return e if power == 0 else e / (e.detach() + offset).pow(power)


def pseudo_huber(e: Tensor, c: float) -> Tensor:
    """sqrt(e + c^2) - c (iCT, arXiv 2310.14189): a square near zero, the norm far away; here of the mean square."""
    return (e + c * c).sqrt() - c


def elbo_sigmoid(t: Tensor, bias: float, power: float) -> Tensor:
    """IMM's weight of t on the path x_t = (1 - t) x0 + t eps (arXiv 2503.07565, eq. 13):
    sigmoid(b - lambda) / 2 * (-dlambda/dt) * (1 - t)^power / ((1 - t)^2 + t^2), lambda = 2 log((1 - t) / t)."""
    t = t.clamp(1e-6, 1 - 1e-6)
    log_snr = 2 * ((1 - t) / t).log()
    return 0.5 * torch.sigmoid(bias - log_snr) * 2 / (t * (1 - t)) * (1 - t).pow(power) / ((1 - t) ** 2 + t**2)


Distance = Literal["l2", "pseudo_huber", "norm"]


def distance(e: Tensor, kind: Distance, c: float) -> Tensor:
    """The minimised function of a mean square error: identity, pseudo-Huber, or root (ECT, arXiv 2406.14548)."""
    if kind == "l2":
        return e
    return pseudo_huber(e, c) if kind == "pseudo_huber" else e.clamp(min=1e-16).sqrt()  # the root's slope at 0: 0


def trigonometric_scale(t: Tensor) -> Tensor:
    """n = sqrt((1 - t)^2 + t^2): x / n lies on the TrigFlow path of angle tau, tan tau = t / (1 - t), and
    dt / dtau = n^2 (sCM, arXiv 2410.11081)."""
    return ((1 - t) ** 2 + t**2).sqrt()
