"""Samplers, grids, token probabilities and draft verification on numbers that can be followed by hand."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from omni.rng import Key
from omni.samplers import SAMPLERS, from_diffusers, num_steps, run_sampler, time_grid
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.samplers.token import sample_token, token_log_probs, token_uniform
from omni.samplers.verification import LOSSLESS, VERIFICATIONS, Verified, _finish, agreed, block, coupled, rejection

TIMES = [1.0, 0.75, 0.5, 0.0]


def network(x: Tensor, t: float, s: float) -> Tensor:
    """An F that depends on all it is given."""
    return 2 * x + 10 * t + s


def path(name: str, start: float, times: list[float] = TIMES, **options: float) -> list[float]:
    noise = lambda jump: torch.tensor([float(jump + 1)])  # noqa: E731
    first = torch.tensor([start], dtype=torch.float64)
    states = list(run_sampler(SAMPLERS.get(name), network, first, times, noise, **options))
    assert [(state.step, state.steps, state.t) for state in states] == [
        (n, len(times) - 1, time) for n, time in enumerate(times[1:], 1)
    ]
    return [float(state.x) for state in states]


# ---- one jump of each sampler of ours, from (x, t) to s, on floats: the formulas of the files' heads ----------------


def f(x: float, t: float, s: float) -> float:
    return 2 * x + 10 * t + s


def euler(x: float, t: float, s: float, eps: float) -> float:
    return x + (s - t) * f(x, t, t)


def flow_map(x: float, t: float, s: float, eps: float) -> float:
    return x + (s - t) * f(x, t, s)


def heun(x: float, t: float, s: float, eps: float) -> float:
    first = f(x, t, t)
    second = f(x + (s - t) * first, s, s)
    return x + (s - t) * (first if s == 0 else (first + second) / 2)


def restart(x: float, t: float, s: float, eps: float) -> float:
    return (1 - s) * (x - t * f(x, t, 0.0)) + s * eps


def gamma(x: float, t: float, s: float, eps: float, gamma: float = 0.5) -> float:
    eta = math.sqrt(1 - gamma**2) * s / (1 - s)
    middle = eta / (1 + eta)
    return (1 - s) / (1 - middle) * (x + (middle - t) * f(x, t, middle)) + gamma * s * eps


FORMULAS = {"euler": euler, "ddim": euler, "heun": heun, "flow_map": flow_map, "restart": restart, "gamma": gamma}


def by_hand(name: str, x: float, times: list[float] = TIMES, **options: float) -> list[float]:
    """The noise of jump n is n + 1."""
    out = []
    for n, (t, s) in enumerate(pairwise(times)):
        x = FORMULAS[name](x, t, s, n + 1.0, **options)
        out.append(x)
    return out


@pytest.mark.parametrize("name", FORMULAS)
def test_every_jump_is_its_formula(name: str) -> None:
    assert path(name, 3.0) == pytest.approx(by_hand(name, 3.0), rel=1e-9)
    assert path(name, -1.0, [0.9, 0.2, 0.0]) == pytest.approx(by_hand(name, -1.0, [0.9, 0.2, 0.0]), rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_gamma_is_its_formula(gamma: float) -> None:
    assert path("gamma", 3.0, gamma=gamma) == pytest.approx(by_hand("gamma", 3.0, gamma=gamma), rel=1e-9)
    for wrong in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"gamma must be in \[0, 1\], got {wrong}; 0 adds no noise, 1 is restart"):
            path("gamma", 3.0, gamma=wrong)


@pytest.mark.parametrize(("name", "evaluations"), [(name, 5 if name == "heun" else 3) for name in FORMULAS])
def test_evaluations_are_counted(name: str, evaluations: int) -> None:
    seen: list[torch.dtype] = []

    def call(x: Tensor, t: float, s: float) -> Tensor:
        seen.append(x.dtype)
        return x

    start = torch.ones(2, dtype=torch.bfloat16)
    list(run_sampler(SAMPLERS.get(name), call, start, TIMES, lambda jump: torch.ones(2)))
    assert seen == [torch.bfloat16] * evaluations


# ---- grids ---------------------------------------------------------------------------------------------------------


def test_grids_by_hand() -> None:
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0] and time_grid(1) == [1.0, 0.0]
    assert time_grid(2, start=1.0) == time_grid(2) and time_grid(2, grid=(1.0, 0.3, 0.0)) == [1.0, 0.3, 0.0]
    assert time_grid(4, shift=2.0) == pytest.approx([1.0, 6 / 7, 2 / 3, 0.4, 0.0])
    assert time_grid(2, shift=0.5, start=0.5) == pytest.approx([0.5, 1 / 6, 0.0])
    assert time_grid(1, grid="edm", start=0.5) == [0.5, 0.0]
    assert time_grid(2, grid="edm") == pytest.approx([80 / 81, 0.002 / 1.002, 0.0], rel=1e-9)
    eta = [t / (1 - t) for t in time_grid(3, grid="edm", start=0.5)[:3]]
    assert eta == pytest.approx([1.0, ((1 + 0.002 ** (1 / 7)) / 2) ** 7, 0.002])
    low = [t / (1 - t) for t in time_grid(2, grid="edm", start=0.001)[:2]]  # below .002: half of the start
    assert low == pytest.approx([0.001 / 0.999, 0.0005 / 0.999])
    assert time_grid(2, grid="midpoint", shift=2.0) == pytest.approx([1.0, 2 * 1.4 / (2.4 + 1.4), 0.0])
    assert time_grid(2, grid="midpoint", start=0.6) == pytest.approx([0.6, 1.4 / 2.4, 0.0])
    with pytest.raises(ValueError, match="stops at 0.5833, so it cannot start at 0.58333"):
        time_grid(2, grid="midpoint", start=1.4 / 2.4)
    assert [num_steps(grid) for grid in ("uniform", "edm", "midpoint", [1.0, 0.0], [1.0, 0.5, 0.0], [])] == [
        None, None, 2, 1, 2, 1
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be at least 1, got -1; one step is"),
        ({"steps": 1, "shift": -1.0}, "shift must be positive, got -1.0"),
        ({"steps": 1, "shift": math.nan}, "shift must be positive, got nan"),
        ({"steps": 1, "start": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"steps": 1, "start": 1.01}, r"must be in \(0, 1\], got 1.01"),
        ({"steps": 1, "grid": []}, r"the times \[\] must go from noise"),
        ({"steps": 1, "grid": [1.5, 0.0]}, r"the times \[1.5, 0.0\] must go from noise \(at most 1\)"),
        ({"steps": 1, "grid": [0.0, 0.0]}, "must go from noise"),
        ({"steps": 2, "grid": [1.0, -0.1, 0.0]}, r"must decrease, and 0.0 follows -0.1"),
        ({"steps": 2, "grid": [0.5, 1.0, 0.0]}, r"must decrease, and 1.0 follows 0.5"),
        ({"steps": 3, "grid": [1.0, 0.12345678, 0.0]}, r"the grid \[1.0, 0.123457, 0.0\] has 2 steps, got steps = 3"),
        ({"steps": 1, "grid": "midpoint"}, "the grid 'midpoint' has 2 steps, got steps = 1"),
        ({"steps": 1, "grid": [1.0, 0.0], "shift": 2.0, "start": 0.9}, "leave the shift 2.0 out"),
        ({"steps": 1, "grid": [1.0, 0.0], "start": 1.0}, "leave the start time 1.0 out"),
    ],
)
def test_impossible_times_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_grid(**arguments)


def test_times_of_schedulers_by_hand() -> None:
    assert from_diffusers(sigmas=[1.0]) == [1.0, 0.0] == from_diffusers(timesteps=[1000.0, 0.0])
    assert from_diffusers(timesteps=torch.tensor([800, 200])) == [0.8, 0.2, 0.0]
    for wrong in ({"sigmas": [1.0], "timesteps": [1000.0]}, {}):
        with pytest.raises(ValueError, match="one of the two"):
            from_diffusers(**wrong)
    with pytest.raises(ValueError, match="must go from noise"):
        from_diffusers(sigmas=[0.0])


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_probabilities_of_tokens_by_hand() -> None:
    score = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).double().log()

    def distribution(temperature: float, top_p: float = 1.0, top_k: int = 0) -> list[list[float]]:
        found = token_log_probs(score.float(), temperature, top_p, top_k)
        assert found.dtype == torch.float64
        return [pytest.approx(row, abs=1e-6) for row in found.exp().tolist()]

    assert distribution(1.0) == [[0.1, 0.4, 0.2, 0.3], [0.25] * 4]
    squares = [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]
    assert [squares, [0.25] * 4] == distribution(0.5)
    assert distribution(0.0) == [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert distribution(1.0, 0.69) == [[0.0, 4 / 7, 0.0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0.0]]
    assert distribution(1.0, 0.1) == [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert distribution(1.0, 0.89) == [[0.0, 4 / 9, 2 / 9, 3 / 9], [0.25] * 4]
    assert distribution(1.0, 0.5)[1] == [0.5, 0.5, 0.0, 0.0]  # exactly half the mass is in two of four
    assert distribution(1.0, 1.0, 2) == [[0.0, 4 / 7, 0.0, 3 / 7], [0.25] * 4]  # equal scores are kept
    assert distribution(1.0, 0.5, 3)[0] == [0.0, 4 / 7, 0.0, 3 / 7]  # first the 3 likeliest, then the nucleus
    for k in (4, 9):
        assert distribution(1.0, 1.0, k) == [[0.1, 0.4, 0.2, 0.3], [0.25] * 4]
    assert distribution(0.0, 1.0, 2)[0] == [0.0, 1.0, 0.0, 0.0]


def test_a_token_is_drawn_by_its_keys_uniform() -> None:
    score = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for number in range(20):
        key = Key(number)
        u = token_uniform(key)
        assert u == key.python().random() and 0 <= u < 1
        assert sample_token(score, 1.0, 1.0, key) == sum(u >= edge for edge in (0.1, 0.5, 0.7))
        assert sample_token(score, 0.0, 1.0, key) == 1
        assert sample_token(score, 1.0, 0.5, key) == (1 if u < 4 / 7 else 3)
        assert sample_token(score, 1.0, 1.0, key, 2) == (1 if u < 4 / 7 else 3)


# ---- draft verification --------------------------------------------------------------------------------------------


def log(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_names_of_verifications() -> None:
    assert LOSSLESS == ("coupled", "rejection", "block") and (*LOSSLESS, "none") == VERIFICATIONS


def test_coupled_by_hand() -> None:
    plain = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 2, 3]])
    draft = torch.tensor([[1, 2], [1, 0], [0, 2], [1, 2]])
    verified = agreed(draft, plain)
    assert verified.accepted.tolist() == [2, 1, 0, 0] and torch.equal(verified.ids, plain)
    log_p = log([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    verified = coupled(torch.tensor([[1, 0]]), log_p, torch.tensor([[0.6, 0.3, 0.95]]))
    assert verified.ids.tolist() == [[1, 1, 1]] and verified.accepted.tolist() == [1]


P = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]
Q = [[0.25, 0.25, 0.5], [0.4, 0.3, 0.3]]


def judge(function, draft: list[int], coins: list[float], uniforms: list[float]) -> tuple[int, list[int]]:  # noqa: ANN001
    """(kept, emitted ids)."""
    verified: Verified = function(
        torch.tensor([draft]), log(Q), log(P), torch.tensor([coins]).double(), torch.tensor([uniforms]).double()
    )
    accepted = int(verified.accepted)
    return accepted, verified.ids[0, : accepted + 1].tolist()


def test_rejection_by_hand() -> None:
    """Ratios of ids 2, 0: .2 / .5 = .4 and .1 / .4 = .25. Excess of P over Q: (.25, .05, 0), then (0, .3, 0)."""
    assert judge(rejection, [2, 0], [0.39, 0.24], [0.5, 0.5, 0.3]) == (2, [2, 0, 1])
    assert judge(rejection, [2, 0], [0.39, 0.26], [0.5, 0.999, 0.3]) == (1, [2, 1])
    assert judge(rejection, [2, 0], [0.41, 0.24], [0.82, 0.5, 0.3]) == (0, [0])  # .25 / .3 = .83
    assert judge(rejection, [2, 0], [0.41, 0.24], [0.84, 0.5, 0.3]) == (0, [1])
    assert judge(rejection, [0, 1], [0.999, 0.999], [0.5, 0.5, 0.5]) == (2, [0, 1, 2])  # ratios 2 and 2
    assert judge(rejection, [0, 1], [1.0, 0.999], [0.5, 0.5, 0.1]) == (2, [0, 1, 0])


def test_block_by_hand() -> None:
    """Weights of [2, 0]: 1, .4, .1. Excess after one kept: max(0, .4 P1 - Q1) = 0; so length 1 is kept with chance
    0 / (0 + .6) = 0, length 2 with .1. Of [0, 0]: 1, 1, .25; max(0, P1 - Q1) = (0, .3, 0): .3 / (.3 + 0) = 1."""
    assert judge(block, [2, 0], [0.0, 0.09], [0.5, 0.5, 0.3]) == (2, [2, 0, 1])
    assert judge(block, [2, 0], [0.0, 0.11], [0.82, 0.5, 0.3]) == (0, [0])
    assert judge(block, [2, 0], [0.0, 0.11], [0.84, 0.5, 0.3]) == (0, [1])
    assert judge(block, [0, 0], [0.999, 0.26], [0.5, 0.999, 0.3]) == (1, [0, 1])
    assert judge(block, [0, 0], [0.999, 0.24], [0.5, 0.5, 0.3]) == (2, [0, 0, 1])
    # [1, 0]: ratio 1.2 counts as 1, then .25; so does a weight that grows later: [2, 1] has 1, .4, .8.
    assert judge(block, [1, 0], [0.5, 0.26], [0.5, 0.0, 0.3]) == (1, [1, 1])
    assert judge(block, [2, 1], [0.5, 0.79], [0.5, 0.5, 0.7]) == (2, [2, 1, 2])
    assert judge(block, [2, 1], [0.5, 0.81], [0.5, 0.5, 0.7]) == (0, [0])


def test_where_rounding_leaves_no_excess_the_token_comes_from_the_target() -> None:
    p = log([[0.2, 0.8], [0.5, 0.5]])
    for function in (rejection, block):
        verified = function(torch.tensor([[1]]), p[:, :1], p, torch.tensor([[1.0]]), torch.tensor([[0.1, 0.9]]))
        assert verified.accepted.tolist() == [0] and verified.ids[0, 0] == 0


def test_rows_are_judged_apart() -> None:
    draft = torch.tensor([[2, 0], [0, 1], [2, 0]])
    coins = torch.tensor([[0.41, 0.0], [0.5, 0.5], [0.3, 0.9]]).double()
    uniforms = torch.tensor([[0.84, 0, 0], [0, 0, 0.3], [0, 0.5, 0]]).double()
    verified = rejection(draft, log(Q).expand(3, -1, -1), log(P).expand(3, -1, -1), coins, uniforms)
    assert verified.accepted.tolist() == [0, 2, 1]
    assert verified.ids.shape == (3, 3) and verified.ids[0, 0] == 1
    assert verified.ids[1].tolist() == [0, 1, 1] and verified.ids[2, :2].tolist() == [2, 1]
    assert draft.tolist() == [[2, 0], [0, 1], [2, 0]]  # as it was


def test_pick_is_the_first_id_whose_sum_is_above_the_noise() -> None:
    distribution = torch.tensor([0.1, 0.0, 0.4, 0.5, 0.0]).log()
    for u, wanted in ((0.0, 0), (0.09, 0), (0.11, 2), (0.49, 2), (0.51, 3), (1 - 2**-53, 3)):
        assert int(inverse_cdf_sample(distribution, torch.tensor(u, dtype=torch.float64))) == wanted


def test_states_and_verdicts_do_not_change() -> None:
    [state] = run_sampler(SAMPLERS.get("euler"), network, torch.ones(1), [1.0, 0.0])
    for part in (state, agreed(torch.ones(1, 1), torch.ones(1, 2))):
        with pytest.raises(FrozenInstanceError):
            setattr(part, next(iter(vars(part))), None)


def test_where_rounding_leaves_no_excess_the_token_is_drawn_from_p() -> None:
    """Row 0 has an excess, on id 2 alone; row 1 has none, and p puts all on id 1."""
    draft, accepted = torch.tensor([[0, 0], [0, 0]]), torch.tensor([1, 2])
    excess, p = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    excess[0, 1, 2] = 0.25
    p[0, 1, 0], p[1, 2, 1] = 1.0, 1.0
    verified = _finish(draft, accepted, excess, p, torch.full((2, 3), 0.5))
    assert verified.ids[0, :2].tolist() == [0, 2] and verified.ids[1].tolist() == [0, 0, 1]
    assert verified.accepted.tolist() == [1, 2]
