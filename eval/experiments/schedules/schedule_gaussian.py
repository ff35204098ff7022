"""Schedules over (block, time) on Gaussian data: what each one samples, without training and without sampling error.

    schedule_gaussian   errors of every schedule, orders of convergence, and the bias that more steps do not remove

Report rows. An error is the largest difference between entries of the output's covariance and of the true one; a KL is
that of the output against the truth. LINE is a name of `LINES` with one of its steps, S the number of steps per block,
LAG the delay of a block behind its predecessor in percent of its S steps.

    error_LINE_S, kl_LINE_S    for each S
    order_LINE                 of the schedules that converge: the slope of log error between the two largest S
    order_off_STEP             largest distance of the orders of Euler's steps from 1, of Heun's from 2
    exact_LINE                 of the schedules that are exact: the largest error over all S
    bias_causal_LAG            the error for infinitely many steps where a block reads noisy earlier blocks
    bias_ancestral_LAG         the same with fresh noise in every pass, extrapolated from two numbers of steps
    bias_finished_LAG          ... where a block reads finished earlier blocks, and starts before they are finished
    pair_kept_LAG              of two blocks read causally, the share of the covariance that remains
    pair_variance_LAG          and the variance of the second, which should be 1
    context_MODE_variance      one block after the other, finished blocks read at `context_time`: largest change of a
    context_MODE_covariance    variance and of a covariance. MODE: FinishedContext.noise
    context_fresh_added        largest difference between "fresh" and "none", at eight times `checked_steps`
    order_context_fresh        its order: fresh noise averages out
    masked_kl_ROUNDS           masked order of `tokens` tokens, mean over random orders; tokens are sampled exactly
    smoothing_error            distribution smoothing at `smoothing_time`: autoregressive samples, then a gradient step
    smoothing_kl               its KL
    agree_NAME                 the sampler against a computation that does not call it (agreement.Agreement)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from pydantic import Field, model_validator

from eval.experiments.schedules.agreement import Agreement, lagged, smoothed
from eval.experiments.schedules.gaussian import BlockGaussian, Coupling
from eval.experiments.schedules.limits import context_limit, pair_limit, staggered_limit
from eval.experiments.schedules.pictures import draw
from eval.experiments.schedules.sampling import FinishedContext, output_covariance
from eval.task import Context, Measure, Outcome, Panel, TaskOptions, task
from omni.media import load_image, save_png
from omni.rng import Key
from omni.sequence.schedule import Schedule, level_major, masked_order, staggered
from train.charts import require_matplotlib

MODES = ("none", "once", "fresh")
ORDERS = {"euler": 1, "heun": 2}
DETERMINISTIC = ("euler", "heun", "flow_map")
EVERY_STEP = (*DETERMINISTIC, "joint_map", "ancestral")


class ScheduleOptions(TaskOptions):
    """blocks, correlation: the data. window: blocks of a rolling window. steps: numbers S of steps per block. lags:
    delays between blocks over S, exact decimals. checked_steps: S of the checks at finite S. correlations: of pairs.
    tokens, rounds, orders: of masked order. folder: of the output picture."""

    blocks: int = Field(default=4, ge=2, le=16)
    correlation: float = Field(default=0.8, gt=-1, lt=1)
    window: int = Field(default=2, ge=1)
    steps: tuple[int, ...] = Field(default=(1, 2, 4, 8, 32, 128), min_length=2)
    lags: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    checked_steps: int = Field(default=8, ge=1)
    correlations: tuple[float, ...] = Field(default=(0.01, 0.5, 0.8, 0.95), min_length=1)
    context_time: float = Field(default=0.1, gt=0, lt=1)
    context_times: tuple[float, ...] = (0.014, 0.1, 0.5)
    smoothing_time: float = Field(default=0.2, gt=0, lt=1)
    tokens: int = Field(default=16, ge=1, le=64)
    rounds: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    orders: int = Field(default=8, ge=1)
    folder: str = "runs/eval"

    @model_validator(mode="after")
    def _check(self) -> ScheduleOptions:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"steps must increase from 1 or more, got {self.steps}")
        if 0 in self.correlations or self.correlation == 0:
            raise ValueError("no correlation may be 0: no covariance could be lost")
        for lag in self.lags:
            if not 0 <= lag <= 1 or lag * self.steps[-1] % 1 or lag * self.checked_steps % 1:
                raise ValueError(f"lag {lag}: a lag is in [0, 1], and lag times {self.steps[-1]} and "
                                 f"{self.checked_steps} steps is a whole number of passes")  # fmt: skip
        if max(self.rounds) > self.tokens:
            raise ValueError(f"{max(self.rounds)} rounds for {self.tokens} tokens; a round has at least one token")
        return self

    @property
    def gaussian(self) -> BlockGaussian:
        """The data."""
        return BlockGaussian(self.blocks, self.correlation)

    @property
    def contexts(self) -> dict[str, FinishedContext]:
        """Finished blocks at the context time, by mode."""
        return {m: FinishedContext.model_validate({"time": self.context_time, "noise": m}) for m in MODES}


@dataclass(frozen=True)
class Line:
    """A schedule and the steps that it is measured with. make: of blocks, S and the window. exact: steps whose output
    has the true covariance at every S. biased: more steps do not remove the error."""

    make: Callable[[int, int, int], Schedule]
    steps: Sequence[str]
    exact: Sequence[str] = ()
    biased: bool = False
    coupling: Coupling = "markov"


LINES = {
    "block_autoregressive": Line(
        lambda B, S, W: staggered(B, S, S, "finished"),
        (*DETERMINISTIC, "ancestral"), exact=("flow_map", "ancestral"),
    ),
    "full": Line(lambda B, S, W: staggered(B, S, 0, "all"), EVERY_STEP, exact=("joint_map",)),
    "rolling": Line(lambda B, S, W: staggered(B, S, Fraction(S, W), "all"), EVERY_STEP, exact=("joint_map",)),
    "pyramid": Line(lambda B, S, W: staggered(B, S, 1, "all"), EVERY_STEP, exact=("joint_map",)),
    "level_major": Line(
        lambda B, S, W: level_major(B, S, "all"), (*DETERMINISTIC, "ancestral"), exact=("flow_map", "ancestral")
    ),
    "level_major_two_levels": Line(
        lambda B, S, W: level_major(B, S), ("euler", "flow_map", "ancestral"), exact=("ancestral",), coupling="shared"
    ),
    "causal_full": Line(lambda B, S, W: staggered(B, S, 0), EVERY_STEP, biased=True),
    "causal_pyramid": Line(lambda B, S, W: staggered(B, S, 1), EVERY_STEP, biased=True),
    "causal_rolling": Line(lambda B, S, W: staggered(B, S, Fraction(S, W)), EVERY_STEP, biased=True),
}  # fmt: skip
PAIRS = [(name, step) for name, line in LINES.items() for step in line.steps]
EXACT = [(name, step) for name, step in PAIRS if step in LINES[name].exact]
CONVERGING = [(name, step) for name, step in PAIRS if not LINES[name].biased and step not in LINES[name].exact]
AGREEMENTS = ("recursion", "pair", "context", "heun", "joint_map", "masked", "smoothing")

Results = dict[tuple[str, str], list[tuple[float, float]]]  # (line, step) -> (error, KL) for each S


def percent(lag: float) -> str:
    """The end of a row's name."""
    return f"lag_{100 * lag:g}".replace(".", "_")


def schedule_rows(options: ScheduleOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    rows = [f"{kind}_{name}_{step}_{S}" for name, step in PAIRS for S in options.steps for kind in ("error", "kl")]
    rows += [f"order_{name}_{step}" for name, step in CONVERGING] + [f"order_off_{step}" for step in ORDERS]
    rows += [f"exact_{name}_{step}" for name, step in EXACT]
    kinds = ("bias_causal", "bias_ancestral", "bias_finished", "pair_kept", "pair_variance")
    rows += [f"{kind}_{percent(lag)}" for kind in kinds for lag in options.lags]
    rows += [f"context_{mode}_{end}" for mode in ("none", "once") for end in ("variance", "covariance")]
    rows += ["context_fresh_added", "order_context_fresh", "smoothing_error", "smoothing_kl"]
    rows += [f"masked_kl_{n}" for n in options.rounds]
    return [*rows, *(f"agree_{name}" for name in AGREEMENTS)]


@task("schedule_gaussian", ScheduleOptions, rows=schedule_rows)
def schedule_gaussian(context: Context, options: ScheduleOptions) -> Outcome:
    """Covariance of the output of schedules over blocks and times, exactly: orders, exact schedules, biases."""
    require_matplotlib()
    results = {pair: list(line_results(options, *pair)) for pair in PAIRS}
    orders = [context.key("order", n) for n in range(options.orders)]
    measures = [*line_measures(options, results), *bias_measures(options), *context_measures(options)]
    measures += [*masked_measures(options, orders), *smoothing_measures(options)]
    measures += agreement_measures(options, orders[0])
    picture = draw(passes_and_kl(options, results), lost_covariance(options))
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_png(picture, folder / "schedules.png")
    notes = [conditions(options), result_table(options, results), bias_table(options), context_table(options)]
    return Outcome(measures, [Panel("schedules.png", answer=(load_image(picture),))], notes=notes)


# ---- every schedule at every number of steps -----------------------------------------------------------------------


def line_results(options: ScheduleOptions, name: str, step: str) -> Iterator[tuple[float, float]]:
    """Error and KL for each S."""
    gaussian, line = options.gaussian, LINES[name]
    for S in options.steps:
        schedule = line.make(options.blocks, S, min(options.window, S))
        found = output_covariance(gaussian, schedule, step, coupling=line.coupling)
        yield gaussian.error(found), gaussian.divergence(found)


def line_measures(options: ScheduleOptions, results: Results) -> Iterator[Measure]:
    """Errors, orders, and exactness."""
    for (name, step), line in results.items():
        for S, (error, kl) in zip(options.steps, line, strict=True):
            yield Measure(f"error_{name}_{step}_{S}", error, "absolute")
            yield Measure(f"kl_{name}_{step}_{S}", kl, "nats")
    orders = {pair: order(options.steps[-2:], [error for error, _ in results[pair][-2:]]) for pair in CONVERGING}
    for (name, step), value in orders.items():
        yield Measure(f"order_{name}_{step}", value, "order")
    for step, wanted in ORDERS.items():
        off = max(abs(value - wanted) for (_, found), value in orders.items() if found == step)
        yield Measure(f"order_off_{step}", off, "order")
    for name, step in EXACT:
        yield Measure(f"exact_{name}_{step}", max(error for error, _ in results[name, step]), "absolute")


def order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the least-squares slope of log error over log S."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (steps, errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


# ---- what more steps do not remove ---------------------------------------------------------------------------------


def bias_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """The error that remains for infinitely many steps where a block starts before its context is finished."""
    gaussian = options.gaussian
    for lag in options.lags:
        yield Measure(
            f"bias_causal_{percent(lag)}", gaussian.error(staggered_limit(gaussian, lag, "before")), "absolute"
        )
        found = gaussian.error(staggered_limit(gaussian, lag, "finished"))
        yield Measure(f"bias_finished_{percent(lag)}", found, "absolute")
        yield Measure(f"bias_ancestral_{percent(lag)}", ancestral_bias(options, lag), "absolute")
        _, covariance, variance = pair_limit(options.correlation, lag)
        yield Measure(f"pair_kept_{percent(lag)}", covariance / options.correlation, "of 1")
        yield Measure(f"pair_variance_{percent(lag)}", variance, "of 1")


def ancestral_bias(options: ScheduleOptions, lag: float) -> float:
    """The error of causal reading with fresh noise: the term in 1 / S removed from two covariances."""
    gaussian, steps = options.gaussian, 4 * options.checked_steps
    one, two = (output_covariance(gaussian, lagged(options.blocks, S, lag), "ancestral") for S in (steps, 2 * steps))
    return gaussian.error(2 * two - one)


def context_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """Finished blocks that are read at a context time, one block after the other."""
    for mode in ("none", "once"):
        found = context_limit(options.gaussian, options.contexts[mode])
        difference = (found - options.gaussian.covariance).abs()
        yield Measure(f"context_{mode}_variance", float(difference.diagonal().max()), "absolute")
        yield Measure(f"context_{mode}_covariance", float(difference.fill_diagonal_(0).max()), "absolute")
    numbers = [options.checked_steps * factor for factor in (1, 2, 4, 8)]
    added = [fresh_added(options, S) for S in numbers]
    yield Measure("context_fresh_added", added[-1], "absolute")
    yield Measure("order_context_fresh", order(numbers, added), "order")


def fresh_added(options: ScheduleOptions, steps: int) -> float:
    """The largest change of the covariance by fresh noise in the context of Euler steps."""
    schedule = staggered(options.blocks, steps, steps, "finished")
    none, fresh = (output_covariance(options.gaussian, schedule, finished=options.contexts[mode])
                   for mode in ("none", "fresh"))  # fmt: skip
    return float((fresh - none).abs().max())


def masked_measures(options: ScheduleOptions, orders: Sequence[Key]) -> Iterator[Measure]:
    """Masked order: tokens of one round are independent given the known ones."""
    gaussian = BlockGaussian(options.tokens, options.correlation)
    for rounds in options.rounds:
        schedules = [masked_order(options.tokens, rounds, key) for key in orders]
        found = [gaussian.divergence(output_covariance(gaussian, each, "flow_map")) for each in schedules]
        yield Measure(f"masked_kl_{rounds}", math.fsum(found) / len(found), "nats")


def smoothing_measures(options: ScheduleOptions) -> Iterator[Measure]:
    """Autoregressive distribution smoothing with a gradient step; with a second autoregressive stage it is level-major
    with two levels, which is exact."""
    found = smoothed(options.gaussian, options.smoothing_time)
    yield Measure("smoothing_error", options.gaussian.error(found), "absolute")
    yield Measure("smoothing_kl", options.gaussian.divergence(found), "nats")


def agreement_measures(options: ScheduleOptions, key: Key) -> list[Measure]:
    """Largest differences between two computations of one result."""
    gaussian, contexts = options.gaussian, list(options.contexts.values())
    check = Agreement(gaussian, options.lags, options.correlations, options.checked_steps, options.steps[-1], contexts)
    tokens = Agreement(BlockGaussian(options.tokens, options.correlation), (), (), 0, 0, ())
    found = {
        "recursion": check.recursion(),
        "pair": check.pair(),
        "context": check.context(),
        "heun": check.heun(),
        "joint_map": check.joint_map(),
        "masked": tokens.masked(options.rounds, key),
        "smoothing": check.smoothing(options.smoothing_time),
    }
    return [Measure(f"agree_{name}", found[name], "absolute") for name in AGREEMENTS]


# ---- what is shown -------------------------------------------------------------------------------------------------


def conditions(options: ScheduleOptions) -> str:
    """What was computed, for the notes."""
    return (
        f"{options.blocks} blocks of correlation {options.correlation:g}, equal steps of time, exact conditional "
        "distributions in float64; unit vectors pass through the sampler as noise, so there is no sampling error"
    )


def result_table(options: ScheduleOptions, results: Results) -> str:
    """One line per schedule and step: error and KL for each S."""
    lines = [f"{'error / KL at S =':34}" + "".join(f"{S:>19}" for S in options.steps)]
    for (name, step), line in results.items():
        cells = "".join(f"{f'{error:.2e} / {kl:.1e}':>19}" for error, kl in line)
        lines.append(f"{name + ', ' + step:34}{cells}")
    return "\n".join(lines)


def bias_table(options: ScheduleOptions) -> str:
    """Two blocks read causally, infinitely many steps, by correlation and lag: covariance kept, variance."""
    title = "causal, 2 blocks, lag u / S ="
    lines = [f"{title:34}" + "".join(f"{lag:>16g}" for lag in options.lags)]
    for rho in options.correlations:
        limits = [pair_limit(rho, lag) for lag in options.lags]
        cells = "".join(f"{f'{cross / rho:.4f} / {variance:.4f}':>16}" for _, cross, variance in limits)
        lines.append(f"{f'rho = {rho:g}: kept / variance':34}{cells}")
    return "\n".join(lines)


def context_table(options: ScheduleOptions) -> str:
    """Two blocks, one after the other, by context time: covariance kept, variance without noise and with noise once."""
    lines = [f"{'context, 2 blocks':34}{'kept':>10}{'variance, none':>16}{'once':>10}"]
    for time in options.context_times:
        contexts = [FinishedContext.model_validate({"time": time, "noise": mode}) for mode in ("none", "once")]
        none, once = (context_limit(BlockGaussian(2, options.correlation), each) for each in contexts)
        cells = f"{float(none[0, 1]) / options.correlation:>10.5f}{float(none[1, 1]):>16.5f}{float(once[1, 1]):>10.5f}"
        lines.append(f"{f'time {time:g}':34}{cells}")
    return "\n".join(lines)


def passes_and_kl(options: ScheduleOptions, results: Results) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """KL over the number of passes, by step and schedule."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"euler": {}, "flow_map": {}}
    for (name, step), line in results.items():
        if step in panels and step not in LINES[name].exact and LINES[name].coupling == "markov":
            made = [LINES[name].make(options.blocks, S, min(options.window, S)) for S in options.steps]
            panels[step][name] = [(each.num_passes, kl) for each, (_, kl) in zip(made, line, strict=True)]
    return panels


def lost_covariance(options: ScheduleOptions) -> dict[str, list[tuple[float, float]]]:
    """By correlation: (lag, share of the covariance of two blocks that is lost)."""
    lags = [n / 16 for n in range(17)]
    return {f"correlation {rho:g}": [(lag, 1 - pair_limit(rho, lag)[1] / rho) for lag in lags]
            for rho in options.correlations}  # fmt: skip
