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


Prediction = Literal["data", "noise", "v", "velocity"]


def fused_snr(t: Tensor, prediction: Prediction, decay: float = 0.96, clip: float = 5.0) -> Tensor:
    """Diffusion Forcing's fused SNR weight (arXiv 2407.01392) of each block of a level vector: t (..., B) -> (..., B).

    A block whose predecessors are clean is easier, as if its own SNR were higher. With snr = ((1 - t) / t)^2 and s =
    min(snr, clip) / clip, c_1 = s_1, c_b = decay c_(b-1) + (1 - decay) s_b, and c_0 = 0:

        f = 1 - (1 - decay c_(b-1)) (1 - s_b),  f' the same with snr / clip for s_b
        weight = clip f ("data"), f / f' ("noise"), clip f / (clip f' + 1) ("v")

    for the square error of x0, of eps, and of v = alpha eps - sigma x0 on the variance-preserving path. "velocity" is
    the weight for eps - x0 on x_t = (1 - t) x0 + t eps, whose error is that of v divided by n of
    `trigonometric_scale`: n^2 times as much. Decay 0 gives min-SNR weights (arXiv 2303.09556) to blocks by themselves.
    Raises ValueError unless 0 <= decay < 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}; 0 is no fusion, and the paper has 0.96")
    snr = ((1 - t) / t).square()
    s = snr.clamp(max=clip) / clip
    average, before = torch.zeros_like(s[..., :1]), []
    for b in range(s.shape[-1]):
        before.append(average)
        average = decay * average + (1 - decay) * s[..., b : b + 1] if b else s[..., :1]
    rest = 1 - decay * torch.cat([s[..., :0], *before], -1)
    f, unclipped = 1 - rest * (1 - s), 1 - rest * (1 - snr / clip)
    if prediction == "data":
        return clip * f
    if prediction == "noise":
        return torch.where(unclipped > 0, f / unclipped, 1.0)  # both are 0 at t = 1 of the first block
    weight = clip * f / (clip * unclipped + 1)
    return weight if prediction == "v" else weight * trigonometric_scale(t).square()


def trigonometric_scale(t: Tensor) -> Tensor:
    """n = sqrt((1 - t)^2 + t^2): x / n lies on the TrigFlow path of angle tau, tan tau = t / (1 - t), and
    dt / dtau = n^2 (sCM, arXiv 2410.11081)."""
    return ((1 - t) ** 2 + t**2).sqrt()
