"""Samplers and time grids: order, distribution, count of evaluations on exact Gaussian flows; options; keyed noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gaussian import LINE, PLANE, Gaussian
from scripted import living
from torch import Tensor

import omni
from omni.cli.commands import parse
from omni.cli.options import options_of
from omni.generation.events import BlockDone
from omni.generation.options import GenerationOptions
from omni.rng import Key
from omni.samplers import (
    GRIDS,
    SAMPLERS,
    Noise,
    Sampling,
    State,
    Velocity,
    adds_noise,
    from_diffusers,
    knobs,
    num_steps,
    run_sampler,
    time_grid,
)  # fmt: skip

POINTS = 20_000


class Exact:
    """The exact F of a distribution, counting its evaluations."""

    def __init__(self, distribution: Gaussian) -> None:
        self.distribution, self.evaluations = distribution, 0

    def __call__(self, x: Tensor, t: float, s: float) -> Tensor:
        self.evaluations += 1
        one = torch.ones((), dtype=torch.float64)
        return self.distribution.average(x.double(), one * t, one * s).to(x.dtype)


def keyed(key: Key, *shape: int) -> Noise:
    return lambda jump: key.fold(jump).normal(shape, torch.float64)


def last(name: str, start: Tensor, times: list[float], call: Velocity | None = None, **options: float) -> Tensor:
    call = call or Exact(PLANE if start.shape[-1] == 2 else LINE)
    return list(run_sampler(SAMPLERS.get(name), call, start, times, keyed(Key(6), *start.shape), **options))[-1].x


# ---- samplers of ours; what every sampler does is in test_contract.py --------------------------------------------


def test_what_samplers_say_of_themselves() -> None:
    assert [n for n in ("ddim", "euler", "flow_map", "gamma", "heun", "restart") if adds_noise(n)] == [
        "gamma",
        "restart",
    ]
    assert knobs("gamma") == ["gamma"] and knobs("euler") == []


def test_the_state_stays_exact_where_the_network_is_bf16() -> None:
    """The network sees bf16, the state does not: 64 jumps round no more than one evaluation each."""
    start = Key(4).normal((500, 2)).bfloat16()
    wanted = last("flow_map", start.double(), time_grid(64))
    assert float((last("flow_map", start, time_grid(64)) - wanted).abs().max()) < 0.02


# ---- order of convergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("flow_map", math.inf)])
@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_order_of_convergence_on_the_gaussian_flow(name: str, order: float, distribution: Gaussian) -> None:
    """Against the exact map: errors fall as steps^-order; the flow-map sampler is exact in any number of steps."""
    start = Key(4).normal((500, distribution.channels), torch.float64)
    one = torch.ones((), dtype=torch.float64)
    wanted = distribution.map(start, one, 0 * one)
    error = {n: float((last(name, start, time_grid(n)) - wanted).abs().max()) for n in (1, 2, 64, 128)}
    if order == math.inf:
        assert max(error.values()) < 1e-12
    else:
        assert error[1] > 0.01 and abs(math.log2(error[64] / error[128]) - order) < 0.1


def test_a_wrong_heun_is_of_first_order() -> None:
    """The test above can fail: with the second velocity taken at t instead of s the order is one."""
    start, errors = Key(4).normal((500, 1), torch.float64), []
    one = torch.ones((), dtype=torch.float64)
    for steps in (64, 128):
        x, times = start, time_grid(steps)
        for t, s in zip(times[:-1], times[1:], strict=True):
            u = LINE.velocity(x, one * t)
            x = x + (s - t) * (u + LINE.velocity(x + (s - t) * u, one * t)) / 2
        errors.append(float((x - LINE.map(start, one, 0 * one)).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.1


def test_ddim_is_euler_on_this_path() -> None:
    start = Key(4).normal((50, 1), torch.float64)
    a, b = (last(name, start, time_grid(7, 3.0)) for name in ("euler", "ddim"))
    assert float((a - b).abs().max()) < 1e-14


# ---- samplers that add noise ---------------------------------------------------------------------------------------


def distribution_error(states: list[State], distribution: Gaussian) -> float:
    """The largest error of mean and covariance over all states, in deviations of its Monte Carlo error."""
    worst = 0.0
    for state in states:
        t = torch.tensor(state.t, dtype=torch.float64)
        covariance = (1 - t) ** 2 * distribution.covariance + t**2 * torch.eye(distribution.channels)
        spread = covariance.diag()
        found = torch.cov(state.x.T).reshape(distribution.channels, distribution.channels)
        mean = (state.x.mean(0) - (1 - t) * distribution.mean) / (spread / POINTS).sqrt()
        second = (found - covariance) / ((spread[:, None] * spread + covariance**2) / POINTS).sqrt()
        worst = max(worst, float(mean.abs().max()), float(second.abs().max()))
    return worst


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("name", "gamma"), [("restart", None), ("gamma", 0.3), ("gamma", 0.8), ("gamma", 1.0)])
@pytest.mark.parametrize("distribution", [LINE, PLANE])
def test_added_noise_keeps_the_distribution(distribution: Gaussian, name: str, gamma: float | None, steps: int) -> None:
    """With the exact map every state has the distribution of its time, within Monte Carlo error."""
    start = Key(4).normal((POINTS, distribution.channels), torch.float64)
    options = {} if gamma is None else {"gamma": gamma}
    noise = keyed(Key(6), *start.shape)
    states = list(run_sampler(SAMPLERS.get(name), Exact(distribution), start, time_grid(steps), noise, **options))
    assert distribution_error(states, distribution) < 4


def spoiled(
    call: Velocity, start: Tensor, times: list[float], noise: Noise, gamma: float, error: str
) -> Iterator[State]:
    """The sampler gamma with one mistake."""
    x, kept, steps = start, math.sqrt(1 - gamma**2), len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        middle = kept * s if error == "end in t, not in eta" else kept * s / (1 - s + kept * s)
        x = x + (middle - t) * call(x, t, middle)
        scale = 1.0 if error == "data not scaled" else (1 - s) / (1 - middle)
        size = gamma * s / (1 - s) if error == "noise in eta, not in t" else gamma * s
        x = scale * x + size * noise(0 if error == "the same noise again" else n)
        yield State(n + 1, steps, s, x)


def test_wrong_bookkeeping_is_caught() -> None:
    start, noise = Key(4).normal((POINTS, 2), torch.float64), keyed(Key(6), POINTS, 2)
    mistakes = ("end in t, not in eta", "data not scaled", "noise in eta, not in t", "the same noise again")
    found = {
        e: distribution_error(list(spoiled(Exact(PLANE), start, time_grid(4), noise, 0.8, e)), PLANE) for e in mistakes
    }
    assert min(found.values()) > 8, found
    assert distribution_error(list(spoiled(Exact(PLANE), start, time_grid(4), noise, 0.8, "none")), PLANE) < 4


def test_gamma_goes_from_the_flow_map_to_restart() -> None:
    start, times = Key(4).normal((500, 2), torch.float64), time_grid(5, 1.7)
    assert torch.equal(last("gamma", start, times, gamma=0.0), last("flow_map", start, times))
    assert float((last("gamma", start, times, gamma=1.0) - last("restart", start, times)).abs().max()) < 1e-12
    assert float((last("gamma", start, times, gamma=0.5) - last("restart", start, times)).abs().max()) > 0.1
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        last("gamma", start, times, gamma=1.5)


def test_restart_asks_for_jumps_to_the_data_alone() -> None:
    asked = []

    def call(x: Tensor, t: float, s: float) -> Tensor:
        asked.append((t, s))
        return x

    last("restart", Key(4).normal((5, 2)), [1.0, 0.6, 0.2, 0.0], call)
    assert asked == [(1.0, 0.0), (0.6, 0.0), (0.2, 0.0)]


# ---- grids ---------------------------------------------------------------------------------------------------------


def test_uniform_grid_and_shift() -> None:
    assert time_grid(2) == [1.0, 0.5, 0.0]
    assert time_grid(2, shift=3.0) == [1.0, 0.75, 0.0]
    assert time_grid(2, start=0.994) == [0.994, 0.497, 0.0]
    assert time_grid(2, shift=3.0, start=0.8) == pytest.approx([0.8, 0.6, 0.0], abs=1e-15)
    assert time_grid(3, shift=0.1)[0] == 1.0


def test_edm_grid_is_karras_in_eta() -> None:
    """eta_i^(1/7) is uniform from 80 to .002, then 0; the numbers were computed by hand."""
    times = time_grid(5, grid="edm")
    eta = [t / (1 - t) for t in times]
    assert eta[0] == pytest.approx(80) and eta[-2] == pytest.approx(0.002) and times[-1] == 0 and len(times) == 6
    assert [e ** (1 / 7) for e in eta[:-1]] == pytest.approx([1.87017, 1.50552, 1.14087, 0.77622, 0.41157], abs=1e-4)
    assert times[0] == pytest.approx(80 / 81)
    assert time_grid(1, grid="edm") == pytest.approx([80 / 81, 0])
    assert time_grid(4, grid="edm", start=0.994)[0] == 0.994  # IMM's: from eta = 165.7
    with pytest.raises(ValueError, match="'edm' cannot start at 1"):
        time_grid(4, grid="edm", start=1.0)


def test_midpoint_grid_is_two_jumps() -> None:
    assert time_grid(2, grid="midpoint") == pytest.approx([1.0, 0.58333333, 0.0])
    assert time_grid(2, grid="midpoint", start=0.994)[0] == 0.994
    with pytest.raises(ValueError, match="'midpoint' has 2 steps, got steps = 8"):
        time_grid(8, grid="midpoint")
    with pytest.raises(ValueError, match="cannot start at 0.5"):
        time_grid(2, grid="midpoint", start=0.5)


def test_times_can_be_given() -> None:
    assert time_grid(2, grid=[0.9877, 0.45, 0]) == [0.9877, 0.45, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2, "shift": 0.0}, "shift must be positive, got 0.0"),
        ({"steps": 2, "start": 1.5}, r"start time must be in \(0, 1\], got 1.5"),
        ({"steps": 2, "grid": "edn"}, "unknown grid 'edn'; did you mean 'edm'"),
        ({"steps": 2, "grid": [1.0, 0.5, 0.5, 0.0]}, "has 3 steps, got steps = 2"),
        ({"steps": 3, "grid": [1.0, 0.5, 0.5, 0.0]}, "must decrease, and 0.5 follows 0.5"),
        ({"steps": 1, "grid": [1.0, 0.1]}, r"\[1.0, 0.1\] must go from noise \(at most 1\) to data \(0\)"),
        ({"steps": 1, "grid": [1000.0, 0.0]}, "must go from noise"),
        ({"steps": 1, "grid": [0.0]}, "must go from noise"),
        ({"steps": 2, "grid": [1.0, 0.5, 0.0], "shift": 2.0}, "leave the shift 2.0 out"),
        ({"steps": 2, "grid": [1.0, 0.5, 0.0], "start": 0.9}, "leave the start time 0.9 out"),
    ],
)
def test_impossible_grids_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_grid(**arguments)


@pytest.mark.parametrize("grid", GRIDS.names())
def test_a_grid_decreases_from_noise_to_data(grid: str) -> None:
    fixed = num_steps(grid)
    for steps in [1, 2, 4, 8, 32] if fixed is None else [fixed]:
        for shift in (0.5, 1.0, 5.0):
            times = time_grid(steps, shift, grid)
            assert len(times) == steps + 1 and times[0] > 0.98 and times[-1] == 0
            assert all(a > b for a, b in zip(times[:-1], times[1:], strict=True))


# ---- diffusers -----------------------------------------------------------------------------------------------------


def test_the_flow_map_scheduler_of_diffusers_takes_our_jumps() -> None:
    """Its sigmas and timesteps become our times, and its `step` is our jump, in any number of steps and with shift."""
    module = pytest.importorskip("diffusers.schedulers.scheduling_flow_map_euler_discrete")
    start, call = Key(4).normal((20, 2), torch.float64), Exact(PLANE)
    for steps, shift in ((1, 1.0), (4, 1.0), (4, 5.0)):
        scheduler = module.FlowMapEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        times = from_diffusers(sigmas=scheduler.sigmas)
        assert times == pytest.approx(time_grid(steps, shift), abs=1e-15)
        assert from_diffusers(timesteps=scheduler.timesteps) == pytest.approx(times, abs=1e-15)
        theirs = start
        for t, s in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0.0)], strict=True):
            F = call(theirs, float(t) / 1000, float(s) / 1000)
            theirs = scheduler.step(F, t, theirs, r_timestep=s).prev_sample
        assert float((theirs - last("flow_map", start, times)).abs().max()) < 1e-12


def test_the_flow_matching_scheduler_of_diffusers_takes_our_euler_steps() -> None:
    module = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = module.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    times = from_diffusers(sigmas=scheduler.sigmas)
    assert from_diffusers(timesteps=scheduler.timesteps) == pytest.approx(times, abs=1e-6)  # theirs are float32
    theirs = start = Key(4).normal((20, 2))
    for t, time in zip(scheduler.timesteps, times[:-1], strict=True):
        theirs = scheduler.step(Exact(PLANE)(theirs, time, time), t, theirs).prev_sample
    assert float((theirs - last("euler", start, times)).abs().max()) < 1e-5


def test_lists_on_their_way_to_diffusers_get_their_last_zero() -> None:
    assert from_diffusers(sigmas=[1.0, 0.6]) == [1.0, 0.6, 0.0] == from_diffusers(timesteps=[1000, 600, 0])
    assert from_diffusers(timesteps=[10, 4], num_train_timesteps=10) == [1.0, 0.4, 0.0]
    for wrong in ({"sigmas": [1000.0, 600.0]}, {"sigmas": [0.0, 0.4, 1.0]}, {"sigmas": []}, {}, {"timesteps": []}):
        with pytest.raises(ValueError, match=r"must go from noise|must decrease|one of the two"):
            from_diffusers(**wrong)


# ---- options and the engine ----------------------------------------------------------------------------------------


def test_options_name_the_nearest_sampler_and_grid() -> None:
    for wrong, message in (
        ({"sampler": "hein"}, "unknown sampler 'hein'; did you mean 'heun'"),
        ({"grid": "unifrom"}, "unknown grid 'unifrom'; did you mean 'uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationOptions(**wrong)
    with pytest.raises(ValueError, match="gamma = 0.5 means nothing to the sampler 'euler'; take sampler 'gamma'"):
        GenerationOptions(gamma=0.5).resolved({})
    with pytest.raises(ValueError, match="gamma = 2: must be a number from 0 to 1"):
        GenerationOptions(gamma=2, sampler="gamma").resolved({})
    with pytest.raises(ValueError, match="generation.json: sampler = 'eulr'"):
        GenerationOptions().resolved({"sampler": "eulr"})


def test_the_request_goes_before_the_models_own_grid() -> None:
    own = {"steps": 4, "grid": [1.0, 0.5, 0.0], "sampler": "gamma", "gamma": 0.3}
    plain = GenerationOptions().resolved(own).picture
    assert plain.times() == [1.0, 0.5, 0.0] and plain.steps == 2 and plain.gamma == 0.3
    assert GenerationOptions(steps=4).resolved(own).picture.times() == time_grid(4)
    assert GenerationOptions(sampler="flow_map").resolved(own).picture.gamma is None
    assert GenerationOptions(sampler="gamma").resolved({}).picture.gamma == 0.5  # so a record of it is whole
    edm = GenerationOptions(grid="edm").resolved({"steps": 3, "start_time": 1.0})
    assert edm.picture.times() == time_grid(3, grid="edm")
    assert GenerationOptions(grid="midpoint").resolved({}).picture.steps == 2
    as_given = GenerationOptions(grid=(0.9, 0.4, 0.0)).resolved({"shift": 3.0, "steps": 8})
    assert as_given.picture.times() == [0.9, 0.4, 0.0]
    later = GenerationOptions(start_time=0.994, steps=2).resolved({"shift": 1.0})
    assert later.picture.times() == [0.994, 0.497, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32])
def test_the_command_line_names_budget_and_sampler(steps: int) -> None:
    words = ["--steps", str(steps), "--sampler", "gamma", "--gamma", "0.4", "--grid", "edm", "--start-time", "0.994"]
    options = options_of(parse(["generate", "draw", *words, "--shift", "2"])).resolved({}).picture
    assert (options.steps, options.sampler, options.gamma, options.grid) == (steps, "gamma", 0.4, "edm")
    assert options.times() == time_grid(steps, 2.0, "edm", 0.994)


def test_the_command_line_refuses_in_one_line() -> None:
    assert options_of(parse(["generate", "x", "--grid", "1,0.6,0"])).picture.grid == (1.0, 0.6, 0.0)
    for words, message in (
        (["--sampler", "eular"], "sampler = 'eular': unknown sampler 'eular'; did you mean 'euler'"),
        (["--grid", "edmm"], "unknown grid 'edmm'; did you mean 'edm'"),
        (["--grid", "1,x"], "or a list of times such as"),
        (["--gamma", "2"], "must be a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            options_of(parse(["generate", "x", *words]))
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tiny_model) -> omni.Omni:  # noqa: ANN001
    return living(tiny_model)


def pixels(reply: omni.Reply) -> Tensor:
    return torch.tensor(list(reply.images[0].tobytes()))


@pytest.mark.parametrize(("name", "gamma"), [("restart", None), ("gamma", 0.6), ("heun", None)])
def test_a_picture_depends_on_its_seed_alone(model: omni.Omni, name: str, gamma: float | None) -> None:
    """Alone and in a batch, whatever the others' seeds and samplers are; another seed is another picture."""
    plain = GenerationOptions(steps=3, max_tokens=1, max_images=1, force_image=True, image_size=(8, 8))
    mine = plain.changed({"sampler": name, "gamma": gamma})
    others = plain.model_copy(update={"sampler": "euler", "steps": 2})
    prompts = ["a", "draw something long", "b", "c"]
    together = model.generate_batch(prompts, [mine, mine, others, mine], seeds=[5, 6, 5, 7])
    for row in (0, 1, 3):
        alone = model.generate_batch([prompts[row]], [mine], seeds=[[5, 6, 5, 7][row]])[0]
        assert int((pixels(alone) - pixels(together[row])).abs().max()) <= 1
    same, other = (model.generate_batch(["a"], [mine], seeds=[seed])[0] for seed in (5, 6))
    assert torch.equal(pixels(same), pixels(model.generate_batch(["a"], [mine], seeds=[5])[0]))
    assert int((pixels(same) - pixels(other)).abs().max()) > 8


def test_evaluations_are_counted_as_they_are_made(model: omni.Omni) -> None:
    """Heun's second velocity and every branch of guidance count; the transformer's own calls say so."""
    refine, passes = model.transformer.refine, []

    def counted(hidden, stream, memory, condition, item):  # noqa: ANN001, ANN202
        passes.append(len(condition))  # one for each block
        return refine(hidden, stream, memory, condition, item)

    model.transformer.refine = counted  # type: ignore[method-assign]
    try:
        for options, evaluations in (
            ({"steps": 4}, 4),
            ({"steps": 4, "sampler": "heun"}, 7),
            ({"steps": 2, "guidance": 2.0}, 4),  # without pictures in the formula, two branches
            ({"steps": 2, "guidance": 2.0, "image_guidance": 1.5}, 6),
            ({"steps": 2, "guidance": 2.0, "image_guidance": 2.0}, 4),  # text and pictures are dropped together
            ({"grid": "midpoint", "sampler": "restart"}, 2),
        ):
            passes.clear()
            size = {"force_image": True, "image_size": (8, 8), "max_tokens": 1}
            events = list(omni.Engine(model).stream("draw", **options, **size))
            [done] = [event for event in events if isinstance(event, BlockDone)]
            assert done.part.evaluations == evaluations == sum(passes)
        reply = model.generate("draw", steps=3, **size)
        assert reply.evaluations == 3 * len(reply.images) > 0
    finally:
        del model.transformer.refine


def test_a_later_start_has_less_noise(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """x at t is t eps without data: EDM's y = eta eps."""
    seen: list[tuple[float, Tensor]] = []

    def watch(start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
        seen.append((times[0], start))
        yield State(1, 1, 0.0, start)

    monkeypatch.setitem(SAMPLERS._items, "euler", watch)
    for t in (1.0, 0.9):
        model.generate("x", force_image=True, image_size=(8, 8), max_tokens=1, steps=1, start_time=t, sampler="euler")
    assert [t for t, _ in seen] == [1.0, 0.9]
    assert torch.allclose(seen[1][1], 0.9 * seen[0][1])


def test_an_unknown_option_names_the_nearest(model: omni.Omni) -> None:
    with pytest.raises(ValueError, match="unknown key 'step'; did you mean 'steps'"):
        model.generate("draw", step=3)
