"""A sampler of any schedule over blocks and times, and its exact linear map from noise to output.

A schedule is a matrix of levels: one row per state, one column per block, level S for noise and 0 for data. The pass
between two rows moves every block whose level falls, all at once. What a block reads in a pass is one `Reading`:

    clean_past      finished earlier blocks, and itself: block-autoregressive models with a clean copy of the past
    causal          all earlier blocks at their present times, and itself: Diffusion Forcing (arXiv 2407.01392) and
                    AR-Diffusion (arXiv 2503.07418)
    window          all blocks that are not pure noise, and itself: Rolling Diffusion (arXiv 2402.09470)
    bidirectional   all blocks at their present times: full-sequence diffusion; also the level-major order
                    (arXiv 2103.15089), where each pass moves one block

A block at time 1 is independent of the data, so the exact velocities of `window` and `bidirectional` are equal.

Every step is linear in the state and in fresh noise. `transfer` pushes unit vectors through the same sampler code in
place of noise, so the covariance of the output has no sampling error.

Legend: N samples, B blocks, D numbers per block, K noises, L = S + 1 levels. Times are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.schedules.gaussian import BlockGaussian, apply
from omni.config import Frozen, nearest
from omni.rng import Key
from omni.samplers import time_grid

Levels = Sequence[Sequence[int]]
Noise = Callable[..., Tensor]  # of a name such as ("start", block) or ("step", pass, block): standard normal (N, D)


class Reading(Frozen):
    """What a moving block reads.

    scope: see above. context_time: finished blocks are read at this time instead of 0, multiplied by
    1 - context_time; the stored block stays. context_noise: "none" adds nothing, although the velocity is that of a
    block at context_time (stabilisation of Diffusion Forcing with DDIM); "fresh" adds context_time times new noise in
    every evaluation; "once" adds the same noise in all of them, as a cache that is written once does.
    """

    scope: Literal["clean_past", "causal", "window", "bidirectional"] = "causal"
    context_time: float = Field(default=0.0, ge=0, lt=1)
    context_noise: Literal["none", "fresh", "once"] = "none"

    @property
    def adds_noise(self) -> bool:
        """Whether the context has noise of its own."""
        return self.context_time > 0 and self.context_noise != "none"

    def reads(self, levels_B: Tensor, noise_level: int) -> Tensor:
        """bool (B, B): row b, the blocks that block b reads at these levels."""
        all_BB = levels_B.new_ones(len(levels_B), len(levels_B), dtype=torch.bool)
        match self.scope:
            case "clean_past":
                return (all_BB.tril() & (levels_B == 0)).fill_diagonal_(True)
            case "causal":
                return all_BB.tril()
            case "window":
                return (all_BB & (levels_B < noise_level)).fill_diagonal_(True)
            case "bidirectional":
                return all_BB


@dataclass(frozen=True)
class View:
    """What one evaluation reads: the arguments of `BlockGaussian.velocity`."""

    x_NBD: Tensor
    tau_B: Tensor
    reads_BB: Tensor


@dataclass(frozen=True)
class Move:
    """One pass: levels and times of the blocks before and after it, and what its evaluations read."""

    number: int
    levels_B: Tensor
    after_B: Tensor
    t_B: Tensor
    s_B: Tensor
    noise_level: int
    reading: Reading
    noise: Noise

    @property
    def moving_B(self) -> Tensor:
        """Blocks whose level falls."""
        return self.after_B < self.levels_B

    @property
    def gap_B1(self) -> Tensor:
        """s - t of every block, 0 where it stays."""
        return (self.s_B - self.t_B)[:, None]

    def before(self, x_NBD: Tensor) -> View:
        """The state as it is read before the pass."""
        return self._view(x_NBD, self.levels_B, self.t_B, 0)

    def after(self, x_NBD: Tensor) -> View:
        """A state at the end of the pass, for a second evaluation."""
        return self._view(x_NBD, self.after_B, self.s_B, 1)

    def _view(self, x_NBD: Tensor, levels_B: Tensor, time_B: Tensor, evaluation: int) -> View:
        """The state as it is read at these levels: finished blocks at the context time."""
        reading, reads_BB = self.reading, self.reading.reads(levels_B, self.noise_level)
        if reading.context_time == 0:
            return View(x_NBD, time_B, reads_BB)
        finished_B = levels_B == 0
        tau_B = torch.where(finished_B, reading.context_time, time_B)
        shown_NBD = torch.where(finished_B[:, None], (1 - reading.context_time) * x_NBD, x_NBD)
        if reading.context_noise != "none":
            for b in finished_B.nonzero()[:, 0].tolist():
                name = (b,) if reading.context_noise == "once" else (b, self.number, evaluation)
                shown_NBD[:, b] += reading.context_time * self.noise("context", *name)
        return View(shown_NBD, tau_B, reads_BB)


# ---- steps ---------------------------------------------------------------------------------------------------------


def euler(gaussian: BlockGaussian, x_NBD: Tensor, move: Move) -> Tensor:
    """x + (s - t) times the velocity: one evaluation."""
    view = move.before(x_NBD)
    return x_NBD + move.gap_B1 * gaussian.velocity(view.x_NBD, view.tau_B, view.reads_BB)


def heun(gaussian: BlockGaussian, x_NBD: Tensor, move: Move) -> Tensor:
    """The mean of the velocities before and after an Euler step. A block's last step is Euler, as in omni.samplers."""
    before = move.before(x_NBD)
    first_NBD = gaussian.velocity(before.x_NBD, before.tau_B, before.reads_BB)
    after = move.after(x_NBD + move.gap_B1 * first_NBD)
    second_NBD = gaussian.velocity(after.x_NBD, after.tau_B, after.reads_BB)
    velocity_NBD = torch.where((move.after_B > 0)[:, None], (first_NBD + second_NBD) / 2, first_NBD)
    return x_NBD + move.gap_B1 * velocity_NBD


def flow_map(gaussian: BlockGaussian, x_NBD: Tensor, move: Move) -> Tensor:
    """Each moving block jumps by the exact flow map of its conditional distribution, all else fixed in this pass."""
    view = move.before(x_NBD)
    weights_BB, variance_B = gaussian.data_given_others(view.tau_B, view.reads_BB)
    mean_NBD = apply(weights_BB, view.x_NBD)
    t_B1, s_B1 = move.t_B[:, None], move.s_B[:, None]
    before, after = (((1 - time) ** 2 * variance_B[:, None] + time**2).sqrt() for time in (t_B1, s_B1))
    jumped_NBD = (1 - s_B1) * mean_NBD + after / before * (x_NBD - (1 - t_B1) * mean_NBD)
    return torch.where(move.moving_B[:, None], jumped_NBD, x_NBD)


def ancestral(gaussian: BlockGaussian, x_NBD: Tensor, move: Move) -> Tensor:
    """Each moving block is sampled, with fresh noise, from its exact conditional distribution given what it reads;
    blocks that move in one pass are independent. The coupling of levels is that of `BlockGaussian.cleaner`."""
    view = move.before(x_NBD)
    to_B = torch.where(move.moving_B, move.s_B, view.tau_B)
    weights_BB, variance_B = gaussian.cleaner(view.tau_B, to_B, view.reads_BB)
    moved_NBD, result_NBD = apply(weights_BB, view.x_NBD), x_NBD.clone()
    for b in move.moving_B.nonzero()[:, 0].tolist():
        result_NBD[:, b] = moved_NBD[:, b] + variance_B[b].sqrt() * move.noise("step", move.number, b)
    return result_NBD


Step = Callable[[BlockGaussian, Tensor, Move], Tensor]
STEPS: dict[str, Step] = {"euler": euler, "heun": heun, "flow_map": flow_map, "ancestral": ancestral}


# ---- the sampler ---------------------------------------------------------------------------------------------------


def sample(
    gaussian: BlockGaussian,
    levels: Levels,
    noise: Noise,
    reading: Reading,
    step: str = "euler",
    times: Sequence[float] | None = None,
) -> Tensor:
    """The blocks after the last row of `levels`, (N, B, D) float64.

    Args:
        gaussian: the data; its velocity takes the place of a network.
        levels: rows of one level per block, from all S to all 0, never rising. Equal rows have no pass between them.
        noise: a pure function of a name that returns standard normal samples (N, D); see `keyed_noise`.
        reading: what a moving block reads.
        step: a name of STEPS.
        times: S + 1 times from 1 to 0, as of `omni.samplers.time_grid`. None: equal steps.

    Raises ValueError, naming the value, for another step, matrix or number of times.
    """
    if step not in STEPS:
        raise ValueError(f"unknown step {step!r}{nearest(step, STEPS)}; known: {', '.join(STEPS)}")
    check_levels(levels, gaussian.num_blocks)
    highest = levels[0][0]
    times = time_grid(highest) if times is None else times
    if len(times) != highest + 1 or times[0] != 1 or times[-1] != 0:
        raise ValueError(f"{len(times)} times from {times[0]} to {times[-1]}; give {highest + 1} from 1 to 0")
    levels_MB = torch.tensor([list(row) for row in levels])
    times_MB = torch.tensor(times, dtype=torch.float64).flip(0)[levels_MB]
    x_NBD = torch.stack([noise("start", b) for b in range(gaussian.num_blocks)], 1)
    for m in range(len(levels) - 1):
        if torch.equal(levels_MB[m], levels_MB[m + 1]):
            continue
        move = Move(m, levels_MB[m], levels_MB[m + 1], times_MB[m], times_MB[m + 1], highest, reading, noise)
        x_NBD = STEPS[step](gaussian, x_NBD, move)
    return x_NBD


def check_levels(levels: Levels, num_blocks: int) -> None:
    """ValueError, naming the row, unless every block goes from one level S down to 0."""
    if not levels or any(len(row) != num_blocks for row in levels):
        raise ValueError(f"every row needs {num_blocks} levels, one per block, got {[len(row) for row in levels]}")
    if len(set(levels[0])) > 1 or levels[0][0] < 1:
        raise ValueError(f"the first row is {tuple(levels[0])}; all blocks start at one level S of at least 1, noise")
    if any(level != 0 for level in levels[-1]):
        raise ValueError(f"the last row is {tuple(levels[-1])}; all blocks must end at level 0, data")
    for number, (now, after) in enumerate(pairwise(levels)):
        if any(b > a for a, b in zip(now, after, strict=True)):
            raise ValueError(f"row {number} is {tuple(now)}, the next is {tuple(after)}; no level may rise")


def keyed_noise(key: Key, num: int, size: int = 1) -> Noise:
    """Noise (num, size) for `sample`, a function of the key and the name alone."""
    return lambda *name: key.fold(*name).normal((num, size), torch.float64)


def transfer(
    gaussian: BlockGaussian,
    levels: Levels,
    reading: Reading,
    step: str = "euler",
    times: Sequence[float] | None = None,
) -> Tensor:
    """A (B, K) with output = A @ noises: the initial noise of the B blocks, then fresh noises in the order of use.

    A first run of a sampler with fresh noise records which noises it asks for. Then noise k is the k-th unit vector.
    """
    columns: dict[tuple[int | str, ...], int] = {("start", b): b for b in range(gaussian.num_blocks)}

    def record(*name: int | str) -> Tensor:
        columns.setdefault(name, len(columns))
        return torch.zeros(1, 1, dtype=torch.float64)

    def unit(*name: int | str) -> Tensor:
        column_K1 = torch.zeros(len(columns), 1, dtype=torch.float64)
        column_K1[columns[name]] = 1
        return column_K1

    if step == "ancestral" or reading.adds_noise:
        sample(gaussian, levels, record, reading, step, times)
    return sample(gaussian, levels, unit, reading, step, times)[:, :, 0].T


def output_covariance(
    gaussian: BlockGaussian,
    levels: Levels,
    reading: Reading,
    step: str = "euler",
    times: Sequence[float] | None = None,
) -> Tensor:
    """The covariance (B, B) of what the sampler returns: A A^T of `transfer`."""
    transfer_BK = transfer(gaussian, levels, reading, step, times)
    return transfer_BK @ transfer_BK.T
