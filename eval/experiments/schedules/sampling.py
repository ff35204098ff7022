"""A sampler of any schedule on a Gaussian sequence, and the exact covariance of what it returns.

Schedules, and what their moving blocks read, are those of omni.sequence.schedule. In place of a network stands the
exact conditional distribution of a block given the states that it reads, at the times that they have in training.

Every step is linear in the state and in noise. `transfer` gives unit vectors to the same sampler in place of noise, so
the covariance of the output has no sampling error.

Legend: N samples, B blocks, K noises, M blocks that move in a pass, Q nodes of a quadrature. All float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.schedules.gaussian import BlockGaussian, Coupling, State
from omni.config import Frozen, nearest
from omni.rng import Key
from omni.samplers import time_grid
from omni.sequence.schedule import Move, Schedule

Noise = Callable[..., Tensor]  # of a name such as ("start", block) or ("step", pass, block): standard normal (N,)


class FinishedContext(Frozen):
    """How finished blocks are read; the stored block stays as it is.

    time: they are multiplied by 1 - time, and the velocity is that for blocks at this time. 0: a clean copy. noise:
    "none" adds nothing (stabilisation of Diffusion Forcing with DDIM); "fresh" adds `time` times new noise in every
    evaluation; "once" adds the same noise in all of them, as a cache that is written once does.
    """

    time: float = Field(default=0.0, ge=0, lt=1)
    noise: Literal["none", "fresh", "once"] = "none"


class Read(NamedTuple):
    """A state, and its value (N,) as it is shown."""

    state: State
    value: Tensor


@dataclass(frozen=True)
class Pass:
    """Pass m of a schedule: the blocks that it moves, and what they read.

    times: of the levels 0..S. values: every (block, level) that was visited.
    """

    gaussian: BlockGaussian
    schedule: Schedule
    m: int
    times: Sequence[float]
    values: Mapping[tuple[int, int], Tensor]
    finished: FinishedContext
    coupling: Coupling
    noise: Noise

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """The blocks that fall in this pass."""
        return self.schedule.moves(self.m)

    def start(self, move: Move) -> Read:
        """The moving block itself."""
        return Read(State(move.block, self.times[move.start]), self.values[move.block, move.start])

    def gap(self, move: Move) -> float:
        """The change of its time, below 0."""
        return self.times[move.end] - self.times[move.start]

    def context(self, move: Move, ends: Mapping[int, Tensor] | None = None) -> list[Read]:
        """What it reads beside itself. ends: values of the moving blocks after the pass, read in place of those before
        it, for a second evaluation."""
        read = []
        for block, level in self.schedule.context(self.m, move.block):
            moved = next((other for other in self.moves if other[:2] == (block, level)), None)
            if ends is None or moved is None:
                read.append(self._shown(block, level, self.values[block, level], 0 if ends is None else 1))
            else:
                read.append(self._shown(block, moved.end, ends[block], 1))
        return read

    def velocity(self, own: Read, context: Sequence[Read]) -> Tensor:
        """E[eps_b - x0_b | own state and context], (N,)."""
        return (own.value - self.mean(State(own.state.block, 0.0), [own, *context])) / own.state.time

    def mean(self, target: State, read: Sequence[Read]) -> Tensor:
        """E[target | read], (N,)."""
        if not read:
            return torch.zeros_like(next(iter(self.values.values())))
        weights, _ = self.gaussian.posterior(target, [each.state for each in read], self.coupling)
        return weights @ torch.stack([each.value for each in read])

    def variance(self, target: State, read: Sequence[Read]) -> float:
        """Var[target | read]."""
        states = [each.state for each in read]
        return self.gaussian.posterior(target, states, self.coupling)[1] if states else 1.0

    def _shown(self, block: int, level: int, value: Tensor, evaluation: int) -> Read:
        """A state as it is read: finished blocks at the context time."""
        time, noise = self.finished.time, self.finished.noise
        if level > 0 or time == 0:
            return Read(State(block, self.times[level]), value)
        value = (1 - time) * value
        if noise != "none":
            name = () if noise == "once" else (self.m, evaluation)
            value = value + time * self.noise("context", block, *name)
        return Read(State(block, time), value)


# ---- steps: the values of the moving blocks after a pass, by block --------------------------------------------------

Step = Callable[[Pass], dict[int, Tensor]]


def euler(p: Pass) -> dict[int, Tensor]:
    """x + (s - t) times the velocity: one evaluation. A step to data gives E[x0 | what is read]."""
    return {move.block: _moved(p, move, p.velocity(p.start(move), p.context(move))) for move in p.moves}


def heun(p: Pass) -> dict[int, Tensor]:
    """The mean of the velocities before and after an Euler step. A block's last step is Euler, as in omni.samplers."""
    slopes = {move.block: p.velocity(p.start(move), p.context(move)) for move in p.moves}
    ends = {move.block: _moved(p, move, slopes[move.block]) for move in p.moves}
    for move in p.moves:
        if move.end > 0:
            own = Read(State(move.block, p.times[move.end]), ends[move.block])
            slopes[move.block] = (slopes[move.block] + p.velocity(own, p.context(move, ends))) / 2
    return {move.block: _moved(p, move, slopes[move.block]) for move in p.moves}


def flow_map(p: Pass) -> dict[int, Tensor]:
    """Each moving block jumps by the exact flow map of its distribution given its context, which the map holds fixed
    although it may move in the same pass."""
    return {move.block: _jump(p, move) for move in p.moves}


def joint_map(p: Pass) -> dict[int, Tensor]:
    """The exact flow map of all moving blocks at once: context that moves in the pass moves along its own path.

    The times of the moving blocks fall together, linearly. The velocities are linear with coefficients that vary, so
    the path is that of a linear differential equation; Gauss-Legendre collocation with Q nodes solves it to rounding.
    """
    if not p.schedule.is_coupled(p.m):
        return flow_map(p)
    longest = max(-p.gap(move) for move in p.moves)
    nodes_Q, weights_Q, integral_QQ = collocation(5 + math.ceil(43 * longest))
    begin_MN = torch.stack([p.start(move).value for move in p.moves])
    rates_QMM, inputs_QMN = zip(*(_equation(p, node) for node in nodes_Q.tolist()), strict=True)
    M, Q = len(p.moves), len(nodes_Q)
    system = torch.eye(Q * M, dtype=torch.float64)
    system -= torch.einsum("qij,qp->qipj", torch.stack(rates_QMM), integral_QQ).reshape(Q * M, Q * M)
    right = torch.stack([rate @ begin_MN + more for rate, more in zip(rates_QMM, inputs_QMN, strict=True)])
    slopes_QMN = torch.linalg.solve(system, right.reshape(Q * M, -1)).reshape(Q, M, -1)
    end_MN = begin_MN + torch.einsum("q,qmn->mn", weights_Q, slopes_QMN)
    return {move.block: end for move, end in zip(p.moves, end_MN, strict=True)}


def ancestral(p: Pass) -> dict[int, Tensor]:
    """Each moving block is sampled, with fresh noise, from its exact distribution at the lower level given what it
    reads; blocks that move in one pass are independent given that."""
    ends = {}
    for move in p.moves:
        target, read = State(move.block, p.times[move.end]), [p.start(move), *p.context(move)]
        deviation = max(p.variance(target, read), 0.0) ** 0.5
        ends[move.block] = p.mean(target, read) + deviation * p.noise("step", p.m, move.block)
    return ends


def _moved(p: Pass, move: Move, velocity: Tensor) -> Tensor:
    """A straight step."""
    return p.start(move).value + p.gap(move) * velocity


def _jump(p: Pass, move: Move) -> Tensor:
    """The flow map of one block with a fixed context: it keeps the block's quantile."""
    context, data = p.context(move), State(move.block, 0.0)
    mean, variance = p.mean(data, context), p.variance(data, context)
    t, s = p.times[move.start], p.times[move.end]
    before, after = (((1 - time) ** 2 * variance + time**2) ** 0.5 for time in (t, s))
    return (1 - s) * mean + after / before * (p.start(move).value - (1 - t) * mean)


def _equation(p: Pass, node: float) -> tuple[Tensor, Tensor]:
    """d z / d node = rate z + input at a node in (0, 1) of the pass: (M, M) and (M, N)."""
    time_of = {move.block: p.times[move.start] + node * p.gap(move) for move in p.moves}
    place = {move[:2]: m for m, move in enumerate(p.moves)}
    rate_MM = torch.zeros(len(p.moves), len(p.moves), dtype=torch.float64)
    input_MN = torch.zeros(len(p.moves), len(p.start(p.moves[0]).value), dtype=torch.float64)
    for m, move in enumerate(p.moves):
        names = [move[:2], *p.schedule.context(p.m, move.block)]
        read = [p.start(move), *p.context(move)]
        states = [State(b, time_of[b]) if (b, level) in place else r.state
                  for (b, level), r in zip(names, read, strict=True)]  # fmt: skip
        weights, _ = p.gaussian.posterior(State(move.block, 0.0), states, p.coupling)
        scale = p.gap(move) / time_of[move.block]
        rate_MM[m, m] = scale
        for name, weight, each in zip(names, (scale * weights).tolist(), read, strict=True):
            if name in place:
                rate_MM[m, place[name]] -= weight
            else:
                input_MN[m] -= weight * each.value
    return rate_MM, input_MN


@lru_cache
def collocation(num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), both (Q,), and the integrals (Q, Q) from 0 to each node of the
    polynomials that are 1 at one node and 0 at the others."""
    legendre = np.polynomial.legendre
    nodes, weights = legendre.leggauss(num_nodes)
    values = legendre.legvander(nodes, num_nodes - 1)
    integrals = np.stack([legendre.legval(nodes, legendre.legint(row, lbnd=-1)) for row in np.eye(num_nodes)], 1)
    matrix = integrals @ np.linalg.inv(values) / 2
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2), torch.from_numpy(matrix)


STEPS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "flow_map": flow_map,
    "joint_map": joint_map,
    "ancestral": ancestral,
}


# ---- the sampler ---------------------------------------------------------------------------------------------------


def sample(
    gaussian: BlockGaussian,
    schedule: Schedule,
    noise: Noise,
    step: str | Step = "euler",
    finished: FinishedContext | None = None,
    coupling: Coupling = "markov",
    times: Sequence[float] | None = None,
) -> Tensor:
    """The blocks after the last pass, (N, B).

    Args:
        schedule: of `gaussian.num_blocks` blocks that all start as noise.
        noise: a pure function of a name that returns standard normal samples (N,); see `keyed_noise`.
        step: a name of STEPS, or such a function.
        finished: None reads clean copies.
        coupling: of two levels of one block. It matters to "ancestral" and to schedules that read two levels.
        times: S + 1 times from 1 to 0, as of `omni.samplers.time_grid`. None: equal steps.

    Raises ValueError, naming the value, for another step, schedule or number of times.
    """
    if isinstance(step, str):
        if step not in STEPS:
            raise ValueError(f"unknown step {step!r}{nearest(step, STEPS)}; known: {', '.join(STEPS)}")
        step = STEPS[step]
    grid = list(time_grid(schedule.num_levels) if times is None else times)
    finished = finished or FinishedContext()
    _check(gaussian, schedule, grid, finished)
    levels = list(schedule.levels[0])
    values = {(b, level): noise("start", b) for b, level in enumerate(levels)}
    for m in range(schedule.num_passes):
        p = Pass(gaussian, schedule, m, grid[::-1], values, finished, coupling, noise)
        ends = step(p)
        for move in p.moves:
            levels[move.block] = move.end
            values[move.block, move.end] = ends[move.block]
    return torch.stack([values[b, level] for b, level in enumerate(levels)], 1)


def _check(gaussian: BlockGaussian, schedule: Schedule, grid: Sequence[float], finished: FinishedContext) -> None:
    """ValueError for arguments of `sample` that do not fit together."""
    S, B = schedule.num_levels, gaussian.num_blocks
    if schedule.levels[0] != (S,) * B:
        raise ValueError(f"the first row is {schedule.levels[0]}; all {B} blocks must start as noise, at level {S}")
    if len(grid) != S + 1 or grid[0] != 1 or grid[-1] != 0 or any(b >= a for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"{len(grid)} times from {grid[0]} to {grid[-1]}; give {S + 1} that fall from 1 to 0")
    if finished.time and schedule.reads == "two_levels":
        raise ValueError("a schedule that reads two levels reads clean copies; leave out the context time")


def keyed_noise(key: Key, num: int) -> Noise:
    """Noise (num,) for `sample`, a function of the key and the name alone."""
    return lambda *name: key.fold(*name).normal((num,), torch.float64)


def transfer(
    gaussian: BlockGaussian,
    schedule: Schedule,
    step: str | Step = "euler",
    finished: FinishedContext | None = None,
    coupling: Coupling = "markov",
    times: Sequence[float] | None = None,
) -> Tensor:
    """A (B, K) with output = A @ noises: the initial noise of the B blocks, then fresh noises in the order of use.

    A first run records which noises the sampler asks for. In the second, noise k is the k-th unit vector.
    """
    columns: dict[tuple[int | str, ...], int] = {}

    def record(*name: int | str) -> Tensor:
        columns.setdefault(name, len(columns))
        return torch.zeros(1, dtype=torch.float64)

    def unit(*name: int | str) -> Tensor:
        column_K = torch.zeros(len(columns), dtype=torch.float64)
        column_K[columns[name]] = 1
        return column_K

    sample(gaussian, schedule, record, step, finished, coupling, times)
    return sample(gaussian, schedule, unit, step, finished, coupling, times).T


def output_covariance(
    gaussian: BlockGaussian,
    schedule: Schedule,
    step: str | Step = "euler",
    finished: FinishedContext | None = None,
    coupling: Coupling = "markov",
    times: Sequence[float] | None = None,
) -> Tensor:
    """The covariance (B, B) of what the sampler returns: A A^T of `transfer`."""
    transfer_BK = transfer(gaussian, schedule, step, finished, coupling, times)
    return transfer_BK @ transfer_BK.T
