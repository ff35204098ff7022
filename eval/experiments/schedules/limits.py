"""What a schedule returns: closed forms for infinitely many steps, and recursions for finitely many.

None of this calls the sampler. In a staggered schedule block b starts `lag` x S passes after its predecessor; lag 0 is
a full sequence, lag 1 is block-autoregressive, 1 / W is a rolling window of W blocks.

Notation for two blocks: block 1 at time r, block 2 at t, c = 1 - t, p = 1 - r, rho the correlation,

    det = (p^2 + r^2) (c^2 + t^2) - p^2 c^2 rho^2
    E[eps_2 - x0_2 | x_1, x_2] = -rho p t / det x_1 + ((t - c) (p^2 + r^2) + c p^2 rho^2) / det x_2

The coefficients follow from inverting the covariance of (x_1, x_2); that of x_2 is half of d log det / dt at fixed r.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.experiments.schedules.gaussian import BlockGaussian
from eval.experiments.schedules.sampling import FinishedContext
from omni.sequence.schedule import Reads, Schedule

# ---- two blocks ----------------------------------------------------------------------------------------------------


def pair_coefficients(rho: float, r: Any, t: Any) -> tuple[Any, Any]:
    """The coefficients of x_1 and x_2 above, of floats or arrays."""
    p, c = 1 - r, 1 - t
    det = (p * p + r * r) * (c * c + t * t) - (p * c * rho) ** 2
    return -rho * p * t / det, ((t - c) * (p * p + r * r) + c * (p * rho) ** 2) / det


def pair_recursion(rho: float, schedule: Schedule, finished: FinishedContext) -> tuple[float, float, float]:
    """Var x_1, Cov(x_1, x_2), Var x_2 after Euler steps of equal size, of two blocks read causally: scalars alone.

    It also carries Cov(x_2, n) for the noise n that is added once to finished context.
    """
    highest, shown, mode = schedule.num_levels, finished.time, finished.noise
    first, cross, second, with_noise = 1.0, 0.0, 1.0, 0.0
    for now, after in pairwise(schedule.levels):
        r, t = (level / highest for level in now)
        dr, dt = ((b - a) / highest for a, b in zip(now, after, strict=True))
        r, scale = (shown, 1 - shown) if now[0] == 0 else (r, 1.0)
        noisy = shown if now[0] == 0 and mode != "none" else 0.0
        u, v = pair_coefficients(rho, r, t)
        on_noise, fresh = (dt * u * noisy, 0.0) if mode == "once" else (0.0, (dt * u * noisy) ** 2)
        own, past = 1 + dt * v, dt * u * scale  # x_2 becomes own x_2 + past x_1 + on_noise n
        grow = 1 + dr * (2 * r - 1) / ((1 - r) ** 2 + r * r)
        second = own**2 * second + past**2 * first + 2 * own * past * cross + fresh
        second += on_noise**2 + 2 * own * on_noise * with_noise
        cross, first = grow * (own * cross + past * first), grow**2 * first
        with_noise = own * with_noise + on_noise
    return first, cross, second


def pair_limit(rho: float, lag: float, points: int = 48) -> tuple[float, float, float]:
    """Var x_1, Cov(x_1, x_2), Var x_2 for infinitely many steps of two blocks read causally.

    x_1 = sqrt(p^2 + r^2) z_1 on its own path. With r = max(t - lag, 0) and H(t) the integral of the coefficient of x_2
    from 0 to t, x_2(0) = exp(-H(1)) z_2 + z_1 J with

        J = integral over t in (0, 1) of rho p t sqrt(p^2 + r^2) / det exp(-H(t)).

    Without lag H(t) is a quarter of log(det(t) / det(0)), so Var x_2 = sqrt(1 - rho^2) + J^2 with
    J = rho (1 - rho^2)^(1/4) times the integral of c t sqrt(c^2 + t^2) det^(-5/4). To first order J is rho / 2: half of
    the covariance is lost. Gauss-Legendre quadrature of `points` points on each side of t = lag.
    """
    total, growth = 0.0, 0.0
    middle = [lag] if 0 < lag < 1 else []
    for low, high in pairwise([0.0, *middle, 1.0]):
        (t, weight), (unit, unit_weight) = _gauss(low, high, points), _gauss(0.0, 1.0, points)
        below = low + (t[:, None] - low) * unit  # nodes of the integral from the start of the piece to each t
        inner = (t - low) * (pair_coefficients(rho, np.maximum(below - lag, 0), below)[1] @ unit_weight)
        r = np.maximum(t - lag, 0)
        past, own = pair_coefficients(rho, r, t)
        total -= float(weight @ (past * np.hypot(1 - r, r) * np.exp(-(growth + inner))))
        growth += float(weight @ own)
    return 1.0, total, math.exp(-2 * growth) + total**2


def _gauss(low: float, high: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature on (low, high)."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    half = (high - low) / 2
    return low + half * (1 + nodes), half * weights


# ---- any number of blocks ------------------------------------------------------------------------------------------


def context_limit(gaussian: BlockGaussian, finished: FinishedContext) -> Tensor:
    """The covariance (B, B) for infinitely many steps, one block after the other, finished blocks at a context time.

    Block b ends at w . y + sqrt(V) z with w, V of x0_b given y_j = (1 - a) x_j + a n_j, a the context time. With noise
    "once" all y have the right distribution, so every variance is exact, and cross-covariances are too small. With
    "none" n is 0 and variances are too small as well. Noise that is "fresh" in every evaluation averages out: its limit
    is that of "none". Two blocks, k = (1 - a)^2 / ((1 - a)^2 + a^2): covariance rho k; variance 1, or with "none"
    1 - rho^2 k (1 - k).
    """
    B, a = gaussian.num_blocks, finished.time
    noise = a if finished.noise == "once" else 0.0
    parts = torch.zeros(B, 2 * B, dtype=torch.float64)  # of the B noises z, then of the B noises n
    for b in range(B):
        believed = (1 - a) ** 2 * gaussian.covariance[:b, :b] + a**2 * torch.eye(b, dtype=torch.float64)
        cross = (1 - a) * gaussian.covariance[b, :b]
        weights = torch.linalg.solve(believed, cross)
        parts[b] = weights @ ((1 - a) * parts[:b])
        parts[b, B : B + b] += noise * weights
        parts[b, b] = (1 - weights @ cross).sqrt()
    return parts @ parts.T


def staggered_limit(
    gaussian: BlockGaussian, lag: float, reads: Reads, finished: FinishedContext | None = None, steps: int = 64
) -> Tensor:
    """The covariance (B, B) for infinitely many steps of a staggered schedule.

    The matrix from noise to state has a linear differential equation. Runge-Kutta of order 4 with `steps` steps between
    the times where a block starts or ends. Fresh noise of the context averages out, so it is left out.
    """
    finished = finished or FinishedContext()
    B, a = gaussian.num_blocks, finished.time
    start_B = lag * torch.arange(B, dtype=torch.float64)
    ends = torch.cat([start_B, start_B + 1]).mul(1e12).round().div(1e12).unique().tolist()
    parts = torch.eye(B, 2 * B, dtype=torch.float64)  # of the initial noise, then of the noise of the context
    context = parts.roll(B, 1) * (a if finished.noise == "once" else 0.0)
    for low, high in pairwise(ends):
        middle = (low + high) / 2
        ended_B, started_B = start_B + 1 < middle, start_B < middle
        times_T = torch.linspace(low, high, 2 * steps + 1, dtype=torch.float64)
        tau_TB = torch.where(ended_B, a, (1 - times_T[:, None] + start_B).clamp(0, 1))
        weights_TBB = velocity_weights(gaussian, tau_TB, _reads_BB(reads, ended_B).expand(len(times_T), B, B))
        weights_TBB = weights_TBB * (ended_B | ~started_B).logical_not()[:, None]
        inputs_TBK = -weights_TBB @ (ended_B[:, None] * context)
        parts = _runge_kutta(-weights_TBB * (1 - a * ended_B.double()), inputs_TBK, parts, high - low)
    return parts @ parts.T


def velocity_weights(gaussian: BlockGaussian, tau_TB: Tensor, reads_TBB: Tensor) -> Tensor:
    """(T, B, B): row b holds the coefficients of E[eps_b - x0_b | x_j for j with reads[b, j]], 0 where it does not.

    B masked systems, solved together.
    """
    one_BB = torch.eye(gaussian.num_blocks, dtype=torch.float64)
    keep_TB = 1 - tau_TB
    cross_TBB = tau_TB.diag_embed() - gaussian.covariance * keep_TB[:, None, :]  # Cov(eps_b - x0_b, x_j)
    noisy_TBB = keep_TB[:, :, None] * gaussian.covariance * keep_TB[:, None, :] + tau_TB.square().diag_embed()
    inside = reads_TBB[..., :, None] & reads_TBB[..., None, :]
    systems = torch.where(inside, noisy_TBB[:, None], one_BB)
    return torch.linalg.solve(systems, torch.where(reads_TBB, cross_TBB, 0.0))


def _reads_BB(reads: Reads, ended_B: Tensor) -> Tensor:
    """Row b: the blocks that block b reads, itself included. A block that is noise may be read: it is independent."""
    every_BB = ended_B.new_ones(len(ended_B), len(ended_B))
    if reads == "finished":
        return (every_BB & ended_B).fill_diagonal_(True)
    return every_BB.tril() if reads == "before" else every_BB


def _runge_kutta(rates_TBB: Tensor, inputs_TBK: Tensor, parts_BK: Tensor, length: float) -> Tensor:
    """d parts = (rate parts + input) d time over `length`, of order 4; rates and inputs at the ends and middles."""
    steps = len(rates_TBB) // 2
    h = length / steps
    for n in range(0, 2 * steps, 2):
        (a, b, c), (u, v, w) = rates_TBB[n : n + 3], inputs_TBK[n : n + 3]
        k1 = a @ parts_BK + u
        k2 = b @ (parts_BK + h / 2 * k1) + v
        k3 = b @ (parts_BK + h / 2 * k2) + v
        k4 = c @ (parts_BK + h * k3) + w
        parts_BK = parts_BK + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return parts_BK


# ---- steps that are exact, in a schedule that is not ----------------------------------------------------------------


def independence_divergence(gaussian: BlockGaussian, schedule: Schedule) -> float:
    """KL(output | truth) in nats where each pass samples its blocks independently, exactly given the finished ones.

    By the chain rule a pass adds KL(N(0, D) | N(0, C)): C is the covariance of its blocks given the finished ones, D
    its diagonal. The conditional means are the same on both sides.
    """
    total, covariance = 0.0, gaussian.covariance
    for m in range(schedule.num_passes):
        known = [b for b, level in enumerate(schedule.levels[m]) if level == 0]
        new = [move.block for move in schedule.moves(m)]
        weights = torch.linalg.solve(covariance[known][:, known], covariance[known][:, new])
        inside = covariance[new][:, new] - covariance[new][:, known] @ weights
        alone = inside.diagonal()
        total += float(inside.inverse().diagonal() @ alone - len(new) - alone.log().sum() + inside.logdet()) / 2
    return total


def smoothing_gradient(gaussian: BlockGaussian, time: float) -> Tensor:
    """The covariance (B, B) of x~ + sigma^2 grad log p(x~), x~ = x + sigma eps, sigma = time / (1 - time): the second
    stage of autoregressive distribution smoothing (arXiv 2103.15089). It is that of E[x | x~], C (C + sigma^2)^-1 C."""
    noisy = gaussian.covariance + (time / (1 - time)) ** 2 * torch.eye(gaussian.num_blocks, dtype=torch.float64)
    return gaussian.covariance @ torch.linalg.solve(noisy, gaussian.covariance)
