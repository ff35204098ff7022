"""The pieces of the training kit that loops share: schedules, averages, optimisers, guards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.guard import DeviceGuard
from train.optim.ema import AveragedModel, Ema, warmed_decay
from train.optim.kernels import KernelOptimiser
from train.optim.optimiser import Optimiser
from train.optim.schedule import fall, rise, rise_over


def layer(value: float = 0.0) -> nn.Linear:
    made = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        made.weight.fill_(value)
    return made


def test_a_rise_ends_at_one() -> None:
    assert [rise(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0] and rise(0, 0) == 1.0
    assert rise_over(0.0, 0.1) == pytest.approx(0.01) and rise_over(0.5, 0.1) == rise_over(0.0, 0.0) == 1.0


def test_a_fall_goes_from_one_to_its_least_factor() -> None:
    for decay in ("linear", "cosine", "wsd"):
        assert fall(0.0, decay, 0.1) == 1.0
        assert fall(1.0, decay, 0.1) == fall(1.5, decay, 0.1) == pytest.approx(0.1)
    assert [fall(f, "wsd", 0.0, 0.5) for f in (0.4, 0.5, 0.75)] == [1.0, 1.0, 0.5] and fall(0.7, "none") == 1.0
    assert fall(1 / 3, "cosine") == pytest.approx(0.75)


def test_the_decay_of_an_average_may_begin_otherwise_and_be_counted_by_the_caller() -> None:
    assert warmed_decay(0.9, 0) == 0.1 and warmed_decay(0.9, 0, start=11) == 1 / 11 and warmed_decay(0.9, 999) == 0.9
    live = layer()
    ema = Ema(live, 0.9, start=11)
    with torch.no_grad():
        live.weight.fill_(1.0)
    ema.update(4)
    assert ema.averages["weight"].tolist()[0] == pytest.approx([1 - 5 / 15] * 2) and ema.num_updates == 5


@pytest.mark.parametrize("warms_up", [True, False])
def test_an_average_that_is_a_model_follows_as_the_tensors_do(warms_up: bool) -> None:
    live = layer()
    average, expected = AveragedModel(live, 0.5, warms_up), 0.0
    assert not average.model.weight.requires_grad and average.model is not live
    for number in range(1, 6):
        with torch.no_grad():
            live.weight.fill_(float(number))
        average.update()
        decay = min(0.5, number / (number + 9)) if warms_up else 0.5
        expected = decay * expected + (1 - decay) * number
    assert average.model.weight.tolist()[0] == pytest.approx([expected] * 2, rel=1e-6) and average.num_updates == 5
    average.restart()
    assert torch.equal(average.model.weight, live.weight) and average.num_updates == 0


def test_an_optimiser_multiplies_the_rates_of_its_parts() -> None:
    a, b = layer(1.0), layer(1.0)
    parts = {"a": torch.optim.SGD(a.parameters(), lr=0.5), "b": torch.optim.SGD(b.parameters(), lr=0.1)}
    optimiser = Optimiser(parts, clip=math.sqrt(4))
    for module in (a, b):
        module.weight.grad = torch.full((1, 2), 2.0)
    assert float(optimiser.clip()) == pytest.approx(4.0)
    optimiser.step(0.5)
    assert a.weight.tolist()[0] == pytest.approx([0.75] * 2) and b.weight.tolist()[0] == pytest.approx([0.95] * 2)
    optimiser.zero_grad()
    assert a.weight.grad is None and optimiser.members() == {"a": ["0"], "b": ["0"]}


def test_a_refusal_on_the_device_changes_nothing_and_is_counted() -> None:
    live = layer(1.0)
    optimiser = Optimiser({"adam": torch.optim.Adam(live.parameters(), lr=0.1, fused=True)})
    guard = DeviceGuard(1, torch.device("cpu"))
    for gradient, moved in ((1.0, True), (math.nan, False), (math.inf, False)):
        before = live.weight.detach().clone()
        live.weight.grad = torch.full((1, 2), gradient)
        assert not guard.too_many
        optimiser.step(1.0, guard.refuses(optimiser.clip()))
        assert torch.equal(before, live.weight) != moved
    assert guard.too_many and int(guard.num_skipped) == 2
    guard.restart()
    assert not guard.too_many and int(guard.num_skipped) == 0
    with pytest.raises(AssertionError, match="not fused"):
        Optimiser({"adam": torch.optim.Adam(live.parameters())}).step(1.0, torch.zeros(()))


def test_kernels_move_in_place_and_are_saved_by_number() -> None:
    module = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = KernelOptimiser(module, 0.01)
    before = module.weight.detach().clone()
    module(torch.ones(1, 2, 4, 4)).square().mean().backward()
    optimiser.clip()
    optimiser.step(1e-2)
    optimiser.zero_grad()
    assert not torch.equal(before, module.weight) and module.weight.grad is None
    assert {name.rsplit("/", 1)[0] for name in optimiser.state_tensors()} == {"muon/0", "adam/0"}
