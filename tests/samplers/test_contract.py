"""What every sampler of the registry does, ours and those of installed packages: numbered states, right times, the
distribution of the data with the exact map, keyed noise, rows apart. A new sampler changes nothing here."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian
from torch import Tensor

from omni.rng import Key
from omni.samplers import SAMPLERS, Call, Noise, Sampling, State, Velocity, adds_noise, knobs, run_sampler, time_grid

NAMES = SAMPLERS.names()
POINTS = 20_000


def exact(distribution: Gaussian) -> Velocity:
    one = torch.ones((), dtype=torch.float64)
    return lambda x, t, s: distribution.average(x.double(), one * t, one * s).to(x.dtype)


def keyed(seed: int, start: Tensor) -> Noise:
    return lambda jump: Key(seed).fold(jump).normal(tuple(start.shape), torch.float64)


def states(name: str, start: Tensor, times: list[float], distribution: Gaussian = PLANE, seed: int = 6) -> list[State]:
    return list(run_sampler(SAMPLERS.get(name), exact(distribution), start, times, keyed(seed, start)))


def asked(name: str, start: Tensor, times: list[float]) -> list[Call | State]:
    """All that a sampler yields, in order; F is exact."""
    call, items = exact(PLANE), []
    sampling: Sampling = SAMPLERS.get(name)(start, times, keyed(6, start))
    item = next(sampling, None)
    while item is not None:
        items.append(item)
        item = next(sampling, None) if isinstance(item, State) else sampling.send(call(item.x, item.t, item.s))
    return items


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_states_are_numbered_and_every_jump_is_evaluated(name: str, steps: int) -> None:
    start, times = Key(4).normal((7, 3, 2), torch.float64), time_grid(steps, 2.0)
    items = asked(name, start, times)
    ends = [n for n, item in enumerate(items) if isinstance(item, State)]
    found = [items[n] for n in ends]
    assert [(s.step, s.steps, s.t) for s in found] == [(n, steps, times[n]) for n in range(1, steps + 1)]
    assert ends[-1] == len(items) - 1  # nothing is evaluated for nothing
    assert all(b - a > 1 for a, b in pairwise([-1, *ends]))
    assert all(item.x.dtype == torch.float64 and item.x.shape == start.shape for item in items)
    assert all(0 <= item.s <= item.t <= 1 for item in items if isinstance(item, Call))
    assert all(len(asked(name, start, times)) == len(items) for _ in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_evaluation_is_at_the_start(name: str) -> None:
    """The start is left as it was: other rows may read it."""
    start = Key(4).normal((7, 2), torch.float64)
    before = start.clone()
    first, *_ = asked(name, start, [0.9, 0.4, 0.0])
    assert isinstance(first, Call) and torch.equal(first.x, before) and first.t == 0.9
    assert torch.equal(start, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_the_exact_map_gives_the_data(name: str, distribution: Gaussian) -> None:
    """Samplers without noise end where the map does; others have its mean and covariance."""
    num = POINTS if adds_noise(name) else 500
    start = Key(4).normal((num, distribution.channels), torch.float64)
    end = states(name, start, time_grid(64), distribution)[-1].x
    if adds_noise(name):
        covariance = torch.cov(end.T).reshape(distribution.channels, distribution.channels)
        assert float((end.mean(0) - distribution.mean).abs().max()) < 0.05
        assert float((covariance - distribution.covariance).abs().max()) < 0.05
    else:
        one = torch.ones((), dtype=torch.float64)
        wanted = distribution.map(start, one, 0 * one)
        ends = [states(name, start, time_grid(n), distribution)[-1].x for n in (16, 64)]
        error = [float((end - wanted).abs().max()) for end in ends]
        assert error[1] < 0.1 and (error[1] < 0.5 * error[0] or error[1] < 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_a_pure_function_of_the_jump(name: str) -> None:
    """The same noise gives the same bits; other noise moves only what says it adds some, which needs it."""
    start, times = Key(4).normal((50, 2), torch.float64), time_grid(3)
    runs = [states(name, start, times, seed=seed)[-1].x for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) != adds_noise(name)
    if adds_noise(name):
        with pytest.raises(TypeError, match="noise"):
            run_sampler(SAMPLERS.get(name), exact(PLANE), start, times)
    else:
        assert torch.equal(runs[0], list(run_sampler(SAMPLERS.get(name), exact(PLANE), start, times))[-1].x)


@pytest.mark.parametrize("name", NAMES)
def test_a_knob_that_is_not_there_is_an_error(name: str) -> None:
    start = torch.zeros(1, 2, dtype=torch.float64)
    assert not {"start", "times", "noise"} & set(knobs(name))
    with pytest.raises(TypeError, match="no_such_knob"):
        run_sampler(SAMPLERS.get(name), exact(PLANE), start, [1.0, 0.0], keyed(1, start), no_such_knob=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_stays_exact_where_the_network_is_bf16(name: str) -> None:
    """The network reads bf16, the state is float64: 64 jumps round no more than one evaluation each."""
    start = Key(4).normal((500, 2)).bfloat16()
    seen: set[torch.dtype] = set()

    def call(x: Tensor, t: float, s: float) -> Tensor:
        seen.add(x.dtype)
        return exact(PLANE)(x, t, s)

    times, noise = time_grid(64), keyed(6, start)
    *_, rounded = run_sampler(SAMPLERS.get(name), call, start, times, noise)
    *_, whole = run_sampler(SAMPLERS.get(name), exact(PLANE), start.double(), times, noise)
    assert seen == {torch.bfloat16} and float((rounded.x - whole.x).abs().max()) < 0.1


def test_calls_of_different_samplers_share_a_pass() -> None:
    """What an engine does: one generator a request, and one evaluation for the calls of all, each at its own (t, s).
    Every request has the bits that it has alone."""
    starts = {name: Key(n).normal((3, 2), torch.float64) for n, name in enumerate(NAMES)}
    grids = {name: time_grid(2 + n % 4, 1.0 + n) for n, name in enumerate(NAMES)}
    alone = {name: [s.x for s in states(name, starts[name], grids[name])] for name in NAMES}

    running = {name: SAMPLERS.get(name)(starts[name], grids[name], keyed(6, starts[name])) for name in NAMES}
    waiting = {name: next(sampling) for name, sampling in running.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    passes, one = 0, torch.ones(1, 1, dtype=torch.float64)
    while waiting:
        calls = {name: item for name, item in waiting.items() if isinstance(item, Call)}
        x, t, s = (
            torch.stack(part) for part in zip(*((c.x, one * c.t, one * c.s) for c in calls.values()), strict=True)
        )
        F = PLANE.average(x, t, s)
        passes += 1
        for answer, name in zip(F, calls, strict=True):
            item = running[name].send(answer)
            while isinstance(item, State):
                found[name].append(item.x)
                item = next(running[name], None)
            waiting.pop(name)
            if item is not None:
                waiting[name] = item
    assert passes == max(sum(isinstance(i, Call) for i in asked(n, starts[n], grids[n])) for n in NAMES)
    for name in NAMES:
        assert len(found[name]) == len(alone[name])
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found[name], alone[name], strict=True))


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (), (3,), (1, 3, 2)])
def test_an_answer_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    """It would broadcast."""
    states = run_sampler(SAMPLERS.get("euler"), lambda x, t, s: torch.zeros(shape), torch.zeros(3, 2), [1.0, 0.0])
    with pytest.raises(ValueError, match=r"F\(x, t, s\) has the shape \(.*\), not that of x, \(3, 2\); return a val"):
        next(states)
