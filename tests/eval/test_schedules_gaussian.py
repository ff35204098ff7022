"""Schedules on a Gaussian sequence: the sampler against numpy, exact schedules, biases, the task."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.experiments.schedules import schedule_gaussian as lab
from eval.experiments.schedules.agreement import Agreement, lagged, smoothed
from eval.experiments.schedules.gaussian import BlockGaussian, State
from eval.experiments.schedules.limits import (
    context_limit,
    independence_divergence,
    pair_limit,
    pair_recursion,
    smoothing_gradient,
    staggered_limit,
)
from eval.experiments.schedules.sampling import (
    STEPS,
    FinishedContext,
    collocation,
    keyed_noise,
    output_covariance,
    sample,
    transfer,
)
from eval.suite import load_suite, main
from omni.rng import Key
from omni.sequence.schedule import Schedule, level_major, masked_order, staggered

ROOT = Path(__file__).parents[2]
SUITE = str(ROOT / "eval" / "suites" / "schedules.toml")
FOUR = BlockGaussian(4, 0.8)
THREE = BlockGaussian(3, -0.6)
SMALL = "blocks=3 steps=[2,4] lags=[0.5,1.0] checked_steps=2 correlations=[0.8] tokens=4 rounds=[1,4] orders=2"


def random_schedule(num_blocks: int, num_levels: int, reads: str, key: Key) -> Schedule:
    """Each pass moves a random set of blocks by a random number of levels."""
    random, rows = key.python(), [(num_levels,) * num_blocks]
    while any(rows[-1]):
        row = tuple(max(0, level - random.choice([0, 0, 1, 2])) for level in rows[-1])
        rows += [row] if row != rows[-1] else []
    return Schedule(tuple(rows), num_levels, reads)  # type: ignore[arg-type]


# ---- conditional distributions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_posteriors_are_those_of_simulated_states(coupling: str) -> None:
    """Least squares over many samples of states that are made by adding noise."""
    num, key = 40_000, Key(0)
    root = torch.linalg.cholesky(THREE.covariance)
    x0 = key.fold("x0").normal((num, 3), torch.float64) @ root.T
    eps, more = key.fold("eps").normal((num, 3), torch.float64), key.fold("more").normal((num,), torch.float64)

    def noisy(state: State) -> Tensor:
        return (1 - state.time) * x0[:, state.block] + state.time * eps[:, state.block]

    low, high = State(1, 0.3), State(1, 0.7)
    values = {state: noisy(state) for state in (State(0, 0.5), low, State(2, 0.9))}
    a = 0.3 / 0.7
    values[high] = noisy(high) if coupling == "shared" else a * values[low] + math.sqrt(0.49 - (a * 0.3) ** 2) * more
    for target, read in (
        (State(0, 0.0), (State(0, 0.5), low, high)),
        (low, (high, State(2, 0.9), State(0, 0.5))),
    ):
        value = values[target] if target in values else x0[:, 0]
        inputs = torch.stack([values[state] for state in read], 1)
        wanted = torch.linalg.solve(inputs.T @ inputs, inputs.T @ value)
        weights, variance = THREE.posterior(target, read, coupling)  # type: ignore[arg-type]
        torch.testing.assert_close(weights, wanted, atol=0.03, rtol=0)
        assert variance == pytest.approx(float((value - inputs @ wanted).var()), abs=0.01)


def test_divergence_is_that_of_torch_and_infinite_for_singular_matrices() -> None:
    found = THREE.covariance + 0.2 * torch.eye(3, dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    one, two = (torch.distributions.MultivariateNormal(mean, each) for each in (found, THREE.covariance))
    assert THREE.divergence(found) == pytest.approx(float(torch.distributions.kl_divergence(one, two)))
    assert THREE.divergence(THREE.covariance) == pytest.approx(0, abs=1e-14)
    assert THREE.divergence(torch.zeros_like(found)) == math.inf


@pytest.mark.parametrize(("arguments", "words"), [((0, 0.5), "at least 1"), ((2, 1.0), "in \\(-1, 1\\)")])
def test_bad_data_is_refused(arguments: tuple[int, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlockGaussian(*arguments)


# ---- the sampler against numpy -------------------------------------------------------------------------------------


def oracle(gaussian: BlockGaussian, schedule: Schedule) -> np.ndarray:
    """Euler steps for one time per block, by conditioning all (x0, eps) on what a block reads: no shared code."""
    B, S = gaussian.num_blocks, schedule.num_levels
    joint = np.eye(2 * B)
    joint[:B, :B] = gaussian.correlation ** np.abs(np.subtract.outer(np.arange(B), np.arange(B)))
    state = np.eye(B)
    for row, following in zip(schedule.levels, schedule.levels[1:], strict=False):
        tau, after = np.array(row) / S, np.array(following) / S
        see = np.hstack([np.diag(1 - tau), np.diag(tau)])  # x = see (x0, eps)
        slopes = np.zeros((B, B))
        for b in range(B):
            others = {"finished": [j for j in range(B) if row[j] == 0], "before": range(b), "all": range(B)}
            rows = see[sorted({b, *others[schedule.reads]})]
            wanted = np.zeros(2 * B)
            wanted[B + b], wanted[b] = 1, -1
            weights = np.linalg.pinv(rows @ joint @ rows.T, hermitian=True) @ rows @ joint @ wanted
            slopes[b] = weights @ state[sorted({b, *others[schedule.reads]})]
        state = state + (after - tau)[:, None] * slopes
    return state @ state.T


@pytest.mark.parametrize("reads", ["finished", "before", "all"])
def test_euler_steps_equal_the_oracle_for_random_matrices(reads: str) -> None:
    for n in range(4):
        schedule = random_schedule(3, 5, reads, Key(n))
        np.testing.assert_allclose(output_covariance(THREE, schedule).numpy(), oracle(THREE, schedule), atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_unit_vectors_give_the_covariance_of_samples(step: str) -> None:
    """20,000 samples with noise in the context; and the sampler is linear in its noise."""
    finished, schedule = FinishedContext(time=0.2, noise="fresh"), staggered(3, 4, 2)
    found = sample(THREE, schedule, keyed_noise(Key(1), 20_000), step, finished)
    wanted = output_covariance(THREE, schedule, step, finished)
    torch.testing.assert_close(found.T.cov(), wanted, atol=0.03, rtol=0)
    assert float((wanted - output_covariance(THREE, schedule, step)).abs().max()) > 1e-3


def test_each_moving_block_is_one_conditional_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Euler asks once per move, at the times of the row, for what the schedule lets the block read."""
    asked, posterior = [], BlockGaussian.posterior

    def count(self: BlockGaussian, target: State, read: list[State], coupling: str) -> tuple[Tensor, float]:
        asked.append((target.block, tuple(read[1:])))
        return posterior(self, target, read, coupling)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockGaussian, "posterior", count)
    schedule = staggered(3, 4, 2)
    sample(THREE, schedule, keyed_noise(Key(0), 1))
    wanted = [
        (move.block, tuple(State(b, level / 4) for b, level in schedule.context(m, move.block)))
        for m in range(schedule.num_passes)
        for move in schedule.moves(m)
    ]
    assert asked == wanted
    assert len(asked) == 12


def test_bad_arguments_are_refused() -> None:
    noise = keyed_noise(Key(0), 1)
    with pytest.raises(ValueError, match="unknown step 'oiler'"):
        sample(THREE, staggered(3, 2, 0), noise, "oiler")
    with pytest.raises(ValueError, match="all 4 blocks must start as noise"):
        sample(FOUR, staggered(3, 2, 0), noise)
    with pytest.raises(ValueError, match="all 2 blocks must start as noise, at level 2"):
        sample(BlockGaussian(2, 0.5), Schedule(((0, 2), (0, 0)), 2), noise)
    with pytest.raises(ValueError, match="give 3 that fall from 1 to 0"):
        sample(THREE, staggered(3, 2, 0), noise, times=[1.0, 0.0])
    with pytest.raises(ValueError, match="give 3 that fall"):
        sample(THREE, staggered(3, 2, 0), noise, times=[1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="clean copies"):
        sample(THREE, level_major(3, 2), noise, finished=FinishedContext(time=0.1))


# ---- exact schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("step", ["flow_map", "ancestral"])
def test_exact_steps_of_one_block_at_a_time_are_exact(step: str, levels: int) -> None:
    for schedule in (
        staggered(4, levels, levels, "finished"),
        level_major(4, levels, "all"),
        level_major(4, levels),
        masked_order(4, 4, (2, 0, 3, 1)),
    ):
        assert FOUR.error(output_covariance(FOUR, schedule, step)) < 1e-13


def test_level_major_with_fresh_noise_is_exact_for_both_couplings_and_both_readings() -> None:
    """Each pass changes one block by its exact conditional, so each row has the right distribution. With shared noise,
    two levels of one block determine it, so the deterministic step reads an estimate as if it were data."""
    for reads, coupling in product(("all", "two_levels"), ("markov", "shared")):
        schedule = level_major(4, 3, reads)  # type: ignore[arg-type]
        found = output_covariance(FOUR, schedule, "ancestral", coupling=coupling)  # type: ignore[arg-type]
        assert FOUR.error(found) < 1e-13, (reads, coupling)
    assert FOUR.error(output_covariance(FOUR, level_major(4, 3), "flow_map", coupling="shared")) > 0.1


def test_joint_maps_are_exact_for_any_matrix_that_reads_all() -> None:
    """A map with a fixed context is not."""
    for n in range(2):
        schedule = random_schedule(3, 4, "all", Key(10 + n))
        assert THREE.error(output_covariance(THREE, schedule, "joint_map")) < 1e-13
        coupled = any(schedule.is_coupled(m) for m in range(schedule.num_passes))
        assert (THREE.error(output_covariance(THREE, schedule, "flow_map")) > 1e-3) == coupled


def test_one_jump_of_a_full_sequence_is_the_root_of_the_covariance() -> None:
    """Along each eigenvector the map keeps quantiles."""
    variance, basis = torch.linalg.eigh(FOUR.covariance)
    found = transfer(FOUR, staggered(4, 1, 0, "all"), "joint_map")
    torch.testing.assert_close(found, (basis * variance.sqrt()) @ basis.T, atol=1e-13, rtol=0)


def test_collocation_integrates_polynomials() -> None:
    nodes, weights, matrix = collocation(5)
    for power in range(5):
        torch.testing.assert_close(matrix @ nodes**power, nodes ** (power + 1) / (power + 1), atol=1e-14, rtol=0)
    assert float(weights @ nodes**9) == pytest.approx(0.1, abs=1e-14)


@pytest.mark.parametrize(("name", "step"), [pair for pair in lab.CONVERGING if pair[1] in lab.ORDERS])
def test_orders_of_convergence(name: str, step: str) -> None:
    errors = [
        THREE.error(output_covariance(THREE, lab.LINES[name].make(3, S, 2), step, coupling=lab.LINES[name].coupling))
        for S in (24, 48)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(lab.ORDERS[step], abs=0.15)


# ---- schedules with a bias -----------------------------------------------------------------------------------------


def test_two_causal_blocks_lose_half_of_a_small_covariance() -> None:
    """The first order of pair_limit in the correlation, and its closed form without lag."""
    variance, covariance, second = pair_limit(1e-4, 0.0)
    assert (variance, covariance) == (1, pytest.approx(0.5e-4, rel=1e-6))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t, rho = (nodes + 1) / 2, 0.8
    u = (1 - t) ** 2 + t**2
    det = u**2 - ((1 - t) ** 2 * rho) ** 2
    J = rho * (1 - rho**2) ** 0.25 * weights / 2 @ ((1 - t) * t * np.sqrt(u) * det**-1.25)
    _, covariance, second = pair_limit(rho, 0.0)
    assert covariance == pytest.approx(J, abs=1e-10)
    assert second == pytest.approx(math.sqrt(1 - rho**2) + J**2, abs=1e-10)


@pytest.mark.parametrize("lag", [0.0, 0.25, 0.5])
def test_causal_joint_maps_have_the_bias_of_infinitely_many_steps(lag: float) -> None:
    limit = staggered_limit(FOUR, lag, "before")
    assert FOUR.error(limit) > 0.05
    torch.testing.assert_close(output_covariance(FOUR, lagged(4, 4, lag), "joint_map"), limit, atol=1e-7, rtol=0)


def test_more_steps_make_the_causal_pyramid_worse() -> None:
    """At a delay of one pass the lag is 1 / S: exact in one step, and then towards the bias of a full sequence."""
    errors = [FOUR.error(output_covariance(FOUR, staggered(4, S, 1), "flow_map")) for S in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-14
    assert errors[-1] < FOUR.error(staggered_limit(FOUR, 0.0, "before"))


@pytest.mark.parametrize("mode", lab.MODES)
def test_finite_steps_of_two_blocks_equal_scalar_recursions(mode: str) -> None:
    pair = BlockGaussian(2, 0.7)
    finished = FinishedContext.model_validate({"time": 0.15, "noise": mode})
    for delay in (0, 1, 2, 4):
        found = output_covariance(pair, staggered(2, 4, delay), finished=finished)
        first, cross, second = pair_recursion(0.7, staggered(2, 4, delay), finished)
        torch.testing.assert_close(
            found, torch.tensor([[first, cross], [cross, second]], dtype=torch.float64), atol=1e-13, rtol=0
        )


def test_context_limits_of_two_blocks() -> None:
    """k = (1 - a)^2 / ((1 - a)^2 + a^2): the covariance is rho k; the variance 1, or 1 - rho^2 k (1 - k)."""
    rho, a = 0.8, 0.25
    k = (1 - a) ** 2 / ((1 - a) ** 2 + a**2)
    once, none = (
        context_limit(BlockGaussian(2, rho), FinishedContext.model_validate({"time": a, "noise": mode}))
        for mode in ("once", "none")
    )
    assert once[0, 1] == pytest.approx(rho * k)
    assert once[1, 1] == pytest.approx(1)
    assert none[0, 1] == pytest.approx(rho * k)
    assert none[1, 1] == pytest.approx(1 - rho**2 * k * (1 - k))


def test_masked_order_loses_what_tokens_of_one_round_share() -> None:
    """Independent tokens in one round; and the chain rule for two rounds."""
    gaussian = BlockGaussian(6, 0.8)
    one = masked_order(6, 1, Key(0))
    torch.testing.assert_close(output_covariance(gaussian, one, "flow_map"), torch.eye(6, dtype=torch.float64))
    for rounds in (1, 2, 3, 6):
        schedule = masked_order(6, rounds, Key(rounds))
        found = gaussian.divergence(output_covariance(gaussian, schedule, "ancestral"))
        assert found == pytest.approx(independence_divergence(gaussian, schedule), abs=1e-12)
        assert (found > 0.1) == (rounds < 6)


def test_a_gradient_step_of_distribution_smoothing_shrinks_the_covariance() -> None:
    torch.testing.assert_close(smoothed(THREE, 0.3), smoothing_gradient(THREE, 0.3), atol=1e-13, rtol=0)
    small, large = (THREE.error(smoothed(THREE, time)) for time in (0.01, 0.3))
    assert small < 1e-3 < large


# ---- the task ------------------------------------------------------------------------------------------------------


def test_the_checks_can_fail() -> None:
    """Too few Heun steps are far from the limit."""
    far = Agreement(FOUR, (0.5,), (0.8,), 4, 2, [FinishedContext(time=0.1, noise="once")])
    assert far.heun() > 0.1
    assert far.recursion() < 1e-12


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("steps=[4,2]", "must increase"),
        ("lags=[0.3]", "whole number of passes"),
        ("lags=[2]", "lag is in"),
        ("correlation=0", "could be lost"),
        ("rounds=[1,99]", "at least one token"),
    ],
)
def test_bad_options_are_refused(option: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_suite(SUITE, [f"schedule_gaussian.{option}"])


def test_the_suite_at_small_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = [f"schedule_gaussian.{each}" for each in (*SMALL.split(), f"folder={tmp_path}", "bars={}")]
    assert (
        main(
            [
                SUITE,
                "tasks=schedule_gaussian",
                *given,
                "--json",
                str(tmp_path / "rows.json"),
                "--html",
                str(tmp_path / "page.html"),
            ]
        )
        == 0
    )
    rows = {row["name"].partition(".")[2]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    options = lab.ScheduleOptions(steps=(2, 4), lags=(0.5, 1.0), checked_steps=2, tokens=4, rounds=(1, 4))
    assert sorted(rows) == sorted(lab.schedule_rows(options))
    assert rows["exact_full_joint_map"] < 1e-12 < 0.1 < rows["error_full_flow_map_4"]
    assert rows["masked_kl_4"] < 1e-12 < 0.1 < rows["masked_kl_1"]
    assert rows["bias_finished_lag_50"] > rows["bias_causal_lag_50"] > 0.04
    assert (tmp_path / "schedules.png").stat().st_size > 10_000


def test_a_window_of_w_blocks_moves_at_most_w_blocks() -> None:
    schedule = lab.LINES["rolling"].make(6, 6, 3)
    assert schedule == staggered(6, 6, Fraction(2), "all")
    assert max(len(schedule.moves(m)) for m in range(schedule.num_passes)) == 3
