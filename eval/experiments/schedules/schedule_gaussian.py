"""Schedules over blocks and times on Gaussian data: what each one samples, without sampling error.

    schedule_gaussian   orders of convergence, exact schedules, and the bias that more steps do not remove

Report rows. An error is the largest difference between entries of the output's covariance and of the true one. SCHEDULE
is a name of `cases`, STEP of `STEPS`, LAG the delay of a block behind its predecessor in percent of its S steps.

    order_SCHEDULE_STEP        the order: minus the slope of log error over log S
    order_off_STEP             largest distance of these orders from 1 (euler) or 2 (heun)
    error_SCHEDULE_STEP        the error at the largest S
    exact_SCHEDULE_STEP        largest error over 1, 2, 8 and 32 steps of a schedule that is exact at any number
    bias_causal_LAG            the error for infinitely many steps where a block reads noisy earlier blocks
    bias_ancestral_LAG         the same with fresh noise in every pass, extrapolated from two numbers of steps
    bias_clean_past_LAG        ... where a block reads finished earlier blocks, and starts before they are finished
    pair_kept_LAG              of two blocks read causally, the share of the covariance that remains
    pair_variance_LAG          and the variance of the second, which should be 1
    context_MODE_variance      one block after the other, finished blocks read at `context_time`: largest change of a
    context_MODE_covariance    variance and of a covariance. MODE: Reading.context_noise
    context_fresh_added        largest difference between "fresh" and "none", at eight times the smallest S
    order_context_fresh        its order: fresh noise averages out
    agree_recursion            the sampler against scalar recursions of two blocks, at finite S
    agree_pair, agree_context  closed forms against the differential equation of the covariance
    agree_sampler              Heun steps at the largest S against the differential equation
    agree_late                 causal reading at a lag of 1 and more against block-autoregressive sampling
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from eval.experiments.schedules.gaussian import BlockGaussian
from eval.experiments.schedules.limits import context_limit, pair_limit, pair_recursion, staggered_limit
from eval.experiments.schedules.matrices import level_major, staggered
from eval.experiments.schedules.pictures import schedule_picture
from eval.experiments.schedules.sampling import Levels, Reading, output_covariance
from eval.task import Context, Measure, Outcome, Panel, TaskOptions, task
from omni.media import load_image, save_png
from train.charts import require_matplotlib

MODES = ("none", "once", "fresh")
EXACT = [(name, step) for name in ("block_autoregressive", "level_major") for step in ("flow_map", "ancestral")]
ORDERS = {"euler": 1, "heun": 2}
OTHER_ORDERS = [(name, step) for name in ("full", "rolling") for step in ("flow_map", "ancestral")]


class ScheduleOptions(TaskOptions):
    """blocks, correlation: the data. window: blocks of a rolling window. steps: numbers S of steps per block. lags:
    delays between blocks, over S. correlations, context_times: of the printed tables. folder: of the output picture."""

    blocks: int = Field(default=4, ge=2, le=16)
    correlation: float = Field(default=0.8, gt=-1, lt=1)
    window: int = Field(default=2, ge=1)
    steps: tuple[int, ...] = Field(default=(8, 16, 32, 64, 128, 256), min_length=2)
    lags: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    correlations: tuple[float, ...] = (0.01, 0.5, 0.8, 0.95)
    context_time: float = Field(default=0.1, gt=0, lt=1)
    context_times: tuple[float, ...] = (0.014, 0.1, 0.5)
    folder: str = "runs/eval"

    @model_validator(mode="after")
    def _whole_rows(self) -> ScheduleOptions:
        for steps in self.steps:
            wrong = [lag for lag in (*self.lags, 1 / self.window) if lag < 0 or abs(lag * steps % 1) > 1e-9]
            if wrong:
                raise ValueError(
                    f"a lag of {wrong[0]} x {steps} steps is no number of rows; change steps, lags or window"
                )
        if list(self.steps) != sorted(set(self.steps)) or 0 in self.correlations or self.correlation == 0:
            raise ValueError(f"steps {self.steps} must increase, and no correlation be 0: no covariance could be lost")
        return self

    @property
    def gaussian(self) -> BlockGaussian:
        """The data."""
        return BlockGaussian(self.blocks, self.correlation)

    @property
    def most(self) -> int:
        """The largest S."""
        return self.steps[-1]


# ---- schedules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A schedule, as a function of S, and what its blocks read."""

    levels: Callable[[int], Levels]
    reading: Reading


def cases(options: ScheduleOptions) -> dict[str, Case]:
    """The schedules without bias."""
    B, all_blocks = options.blocks, Reading(scope="bidirectional")
    return {
        "block_autoregressive": Case(lambda S: staggered(B, S, S), Reading(scope="clean_past")),
        "full": Case(lambda S: staggered(B, S, 0), all_blocks),
        "rolling": Case(lambda S: staggered(B, S, S / options.window), Reading(scope="window")),
        "level_major": Case(lambda S: level_major(B, S), all_blocks),
    }


# ---- the task ------------------------------------------------------------------------------------------------------


def percent(lag: float) -> str:
    """The end of a row's name."""
    return f"lag_{100 * lag:g}".replace(".", "_")


def schedule_rows(options: ScheduleOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    names = list(cases(options))
    rows = [f"{end}_{name}_{step}" for end in ("order", "error") for name in names for step in ORDERS]
    rows += [f"order_off_{step}" for step in ORDERS] + [f"order_{name}_{step}" for name, step in OTHER_ORDERS]
    rows += [f"exact_{name}_{step}" for name, step in EXACT]
    kinds = ("bias_causal", "bias_ancestral", "bias_clean_past", "pair_kept", "pair_variance")
    rows += [f"{kind}_{percent(lag)}" for kind in kinds for lag in options.lags]
    rows += [f"context_{mode}_{end}" for mode in ("none", "once") for end in ("variance", "covariance")]
    agreements = ("recursion", "pair", "context", "sampler", "late")
    return [*rows, "context_fresh_added", "order_context_fresh", *(f"agree_{name}" for name in agreements)]


@task("schedule_gaussian", ScheduleOptions, rows=schedule_rows)
def schedule_gaussian(context: Context, options: ScheduleOptions) -> Outcome:
    """Covariance of the output of schedules over blocks and times, exactly: orders, exact schedules, biases."""
    require_matplotlib()
    errors = convergence(options)
    measures = [*order_measures(options, errors), *exact_measures(options), *bias_measures(options)]
    measures += [*context_measures(options), *agreement_measures(options)]
    picture = draw(options, errors)
    notes = [conditions(options), error_table(options, errors), bias_table(options), context_table(options)]
    return Outcome(measures, [Panel("schedules.png", answer=(picture,))], notes=notes)


Errors = dict[tuple[str, str], list[float]]  # (schedule, step) -> the error for each S


def error_of(gaussian: BlockGaussian, found_BB: Tensor) -> float:
    """The largest difference from the true covariance."""
    return float((found_BB - gaussian.covariance).abs().max())


def convergence(options: ScheduleOptions) -> Errors:
    """Errors of the schedules without bias over S."""
    gaussian, known = options.gaussian, cases(options)
    wanted = [(name, step) for name in known for step in ORDERS] + OTHER_ORDERS
    return {
        (name, step): [
            error_of(gaussian, output_covariance(gaussian, known[name].levels(S), known[name].reading, step))
            for S in options.steps
        ]
        for name, step in wanted
    }


def order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the least-squares slope of log error over log S."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


def order_measures(options: ScheduleOptions, errors: Errors) -> Iterator[Measure]:
    """Orders and errors."""
    orders = {key: order(options.steps, line) for key, line in errors.items()}
    for (name, step), value in orders.items():
        yield Measure(f"order_{name}_{step}", value, "order")
        if step in ORDERS:
            yield Measure(f"error_{name}_{step}", errors[name, step][-1], "absolute")
    for step, wanted in ORDERS.items():
        off = max(abs(value - wanted) for (_, found), value in orders.items() if found == step)
        yield Measure(f"order_off_{step}", off, "order")


def exact_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """Schedules that move one block per pass: exact jumps and exact conditional samples are exact at any S."""
    gaussian, known = options.gaussian, cases(options)
    for name, step in EXACT:
        found = [output_covariance(gaussian, known[name].levels(S), known[name].reading, step) for S in (1, 2, 8, 32)]
        yield Measure(f"exact_{name}_{step}", max(error_of(gaussian, each) for each in found), "absolute")


def bias_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """The error that remains for infinitely many steps where blocks read causally."""
    gaussian = options.gaussian
    for lag in options.lags:
        for scope in ("causal", "clean_past"):
            bias = error_of(gaussian, staggered_limit(gaussian, lag, Reading(scope=scope)))
            yield Measure(f"bias_{scope}_{percent(lag)}", bias, "absolute")
        yield Measure(f"bias_ancestral_{percent(lag)}", ancestral_bias(options, lag), "absolute")
        _, covariance, variance = pair_limit(options.correlation, lag)
        yield Measure(f"pair_kept_{percent(lag)}", covariance / options.correlation, "of 1")
        yield Measure(f"pair_variance_{percent(lag)}", variance, "of 1")


def ancestral_bias(options: ScheduleOptions, lag: float) -> float:
    """The error of causal reading with fresh noise: the term in 1 / S removed from two covariances."""
    gaussian, steps = options.gaussian, 4 * options.steps[0]
    one, two = (
        output_covariance(gaussian, staggered(options.blocks, S, lag * S), Reading(scope="causal"), "ancestral")
        for S in (steps, 2 * steps)
    )
    return error_of(gaussian, 2 * two - one)


def context_reading(options: ScheduleOptions, mode: str) -> Reading:
    """A clean past that is read at the context time."""
    return Reading.model_validate({"scope": "clean_past", "context_time": options.context_time, "context_noise": mode})


def context_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """Finished blocks that are read at a context time, one block after the other."""
    for mode in ("none", "once"):
        difference = (
            context_limit(options.gaussian, context_reading(options, mode)) - options.gaussian.covariance
        ).abs()
        yield Measure(f"context_{mode}_variance", float(difference.diagonal().max()), "absolute")
        yield Measure(f"context_{mode}_covariance", float(difference.fill_diagonal_(0).max()), "absolute")
    numbers = [options.steps[0] * factor for factor in (1, 2, 4, 8)]
    added = [fresh_added(options, S) for S in numbers]
    yield Measure("context_fresh_added", added[-1], "absolute")
    yield Measure("order_context_fresh", order(numbers, added), "order")


def fresh_added(options: ScheduleOptions, steps: int) -> float:
    """The largest change of the covariance by fresh noise in the context of Euler steps."""
    levels = staggered(options.blocks, steps, steps)
    none, fresh = (
        output_covariance(options.gaussian, levels, context_reading(options, mode)) for mode in ("none", "fresh")
    )
    return float((fresh - none).abs().max())


# ---- the sampler against independent computations ------------------------------------------------------------------


def agreement_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """Largest differences between two computations of the same covariance."""
    yield Measure("agree_recursion", recursion_difference(options), "absolute")
    pairs = [(rho, lag) for rho in options.correlations for lag in options.lags]
    yield Measure("agree_pair", max(pair_difference(rho, lag) for rho, lag in pairs), "absolute")
    contexts = [context_reading(options, mode) for mode in ("none", "once")]
    gaussian = options.gaussian
    found = [context_limit(gaussian, each) - staggered_limit(gaussian, 1.0, each) for each in contexts]
    yield Measure("agree_context", max(float(each.abs().max()) for each in found), "absolute")
    yield Measure("agree_sampler", limit_difference(options, contexts), "absolute")
    yield Measure("agree_late", late_difference(options), "absolute")


def recursion_difference(options: ScheduleOptions) -> float:
    """Two blocks, Euler steps: the sampler against `pair_recursion`, over S, lags, correlations and contexts."""
    worst = 0.0
    for rho in options.correlations:
        for lag in options.lags:
            levels = staggered(2, options.steps[0], lag * options.steps[0])
            for mode in MODES:
                reading = Reading.model_validate({"context_time": options.context_time, "context_noise": mode})
                wanted = as_matrix(pair_recursion(rho, levels, reading))
                found = output_covariance(BlockGaussian(2, rho), levels, reading)
                worst = max(worst, float((found - wanted).abs().max()))
    return worst


def as_matrix(pair: tuple[float, float, float]) -> Tensor:
    """(2, 2) of Var x_1, Cov(x_1, x_2), Var x_2."""
    first, cross, second = pair
    return torch.tensor([[first, cross], [cross, second]], dtype=torch.float64)


def pair_difference(rho: float, lag: float) -> float:
    """`pair_limit` against the differential equation."""
    found = staggered_limit(BlockGaussian(2, rho), lag, Reading(scope="causal"))
    return float((found - as_matrix(pair_limit(rho, lag))).abs().max())


def limit_difference(options: ScheduleOptions, contexts: Sequence[Reading]) -> float:
    """Heun steps at the largest S against the differential equation: causal at every lag, and contexts at lag 1."""
    gaussian, worst = options.gaussian, 0.0
    lines = [(lag, Reading(scope="causal")) for lag in options.lags] + [(1.0, each) for each in contexts]
    for lag, reading in lines:
        levels = staggered(options.blocks, options.most, lag * options.most)
        found = output_covariance(gaussian, levels, reading, "heun")
        worst = max(worst, float((found - staggered_limit(gaussian, lag, reading)).abs().max()))
    return worst


def late_difference(options: ScheduleOptions) -> float:
    """Causal reading of blocks that start when all earlier ones are finished, or later."""
    steps, gaussian = options.steps[0], options.gaussian
    wanted = output_covariance(gaussian, staggered(options.blocks, steps, steps), Reading(scope="clean_past"))
    late = [output_covariance(gaussian, staggered(options.blocks, steps, r * steps), Reading()) for r in (1, 1.5)]
    return max(float((found - wanted).abs().max()) for found in late)


# ---- what is shown -------------------------------------------------------------------------------------------------


def conditions(options: ScheduleOptions) -> str:
    """What was computed, for the notes."""
    return (
        f"{options.blocks} blocks of correlation {options.correlation:g}, equal steps of time, exact conditional "
        "velocities in float64; unit vectors pass through the sampler as noise, so there is no sampling error"
    )


def error_table(options: ScheduleOptions, errors: Errors) -> str:
    """One line per schedule and step: the error for each S."""
    lines = [f"{'error at S =':32}" + "".join(f"{S:>10}" for S in options.steps) + f"{'order':>8}"]
    for (name, step), line in errors.items():
        cells = "".join(f"{error:>10.2e}" for error in line)
        lines.append(f"{name + ', ' + step:32}{cells}{order(options.steps, line):>8.2f}")
    return "\n".join(lines)


def bias_table(options: ScheduleOptions) -> str:
    """Two blocks read causally, infinitely many steps, by correlation and lag: covariance kept, variance."""
    title = "causal, 2 blocks, lag u / S ="
    lines = [f"{title:32}" + "".join(f"{lag:>16g}" for lag in options.lags)]
    for rho in options.correlations:
        limits = [pair_limit(rho, lag) for lag in options.lags]
        cells = "".join(f"{f'{cross / rho:.4f} / {variance:.4f}':>16}" for _, cross, variance in limits)
        lines.append(f"{f'rho = {rho:g}: kept / variance':32}{cells}")
    return "\n".join(lines)


def context_table(options: ScheduleOptions) -> str:
    """Two blocks, one after the other, by context time: covariance kept, variance without noise and with noise once."""
    lines = [f"{'context, 2 blocks':32}{'kept':>10}{'variance, none':>16}{'once':>10}"]
    for time in options.context_times:
        readings = [Reading.model_validate({"context_time": time, "context_noise": mode}) for mode in ("none", "once")]
        none, once = (context_limit(BlockGaussian(2, options.correlation), each) for each in readings)
        cells = f"{float(none[0, 1]) / options.correlation:>10.5f}{float(none[1, 1]):>16.5f}{float(once[1, 1]):>10.5f}"
        lines.append(f"{f'time {time:g}':32}{cells}")
    return "\n".join(lines)


def draw(options: ScheduleOptions, errors: Errors) -> Tensor:
    """Matrices, errors and biases as the file `schedules.png`: uint8 (H, W, 3)."""
    small, steps = 4, 6
    matrices = {
        "block-autoregressive": staggered(small, steps, steps),
        "rolling, window 2": staggered(small, steps, steps / 2),
        "full sequence": staggered(small, steps, 0),
        "level-major": level_major(small, steps),
    }
    lines = {
        f"{name}, {step}".replace("_", " "): list(zip(options.steps, errors[name, step], strict=True))
        for name, step in (*((name, "euler") for name in cases(options)), ("full", "heun"))
    }
    lines |= {f"causal, lag {lag:g}, euler": causal_errors(options, lag) for lag in options.lags[:3]}
    lags = [n / 16 for n in range(19)]
    biases = {
        f"correlation {rho:g}": [(lag, 1 - pair_limit(rho, lag)[1] / rho) for lag in lags]
        for rho in options.correlations
    }
    picture = schedule_picture(matrices, lines, biases)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_png(picture, folder / "schedules.png")
    return load_image(picture)


def causal_errors(options: ScheduleOptions, lag: float) -> list[tuple[float, float]]:
    """(S, error) of Euler steps that read causally."""
    found = [
        output_covariance(options.gaussian, staggered(options.blocks, S, lag * S), Reading()) for S in options.steps
    ]
    return [(S, error_of(options.gaussian, each)) for S, each in zip(options.steps, found, strict=True)]
