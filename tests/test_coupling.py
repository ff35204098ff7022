"""A coupling gives every answer an equal share of the noise, and leaves all of it standard normal."""

from __future__ import annotations

import pytest
import torch

from omni.coupling import (
    Coupling,
    Share,
    by_halves,
    into_shares,
    numbers,
    place_of,
    pooled,
    principal_directions,
    quiet_directions,
)
from omni.document import Choice
from omni.rng import Key

SIZE = (6, 12)  # positions, channels
BITS = 5
ITEM = torch.tensor([[0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 2, -1]])


def families() -> dict[str, dict[str, torch.Tensor]]:
    members, places = Key(1).normal((12, *SIZE)), Key(2).normal((5, *SIZE))
    return {"member": {"fruit": members[:7], "tool": members[7:] * 2}, "places": {"two": places}}


def directions() -> torch.Tensor:
    return quiet_directions([one for groups in families().values() for one in groups.values()], 2, BITS)


COUPLING = Coupling(families(), ("places", "member"), BITS)


def test_the_whole_of_an_item_is_its_own_mean_wherever_it_stands() -> None:
    x = Key(4).normal((2, 6, 3), torch.float64)
    found = pooled(x, ITEM, 3)
    wanted = torch.stack([x[n == ITEM].sum(0) / int((n == ITEM).sum()) ** 0.5 for n in range(3)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pooled(x[:1, 2:4], None, 1), wanted[1:2])
    noise = pooled(Key(5).normal((4000, 9, 2)), None, 4000)
    torch.testing.assert_close(noise.std(0), torch.ones(2), atol=0.05, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 7, 31, 32])
def test_shares_divide_the_numbers_evenly(count: int) -> None:
    shares = [Share(0, place, count).numbers(BITS) for place in range(count)]
    assert [number for share in shares for number in share] == list(range(32))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(place_of(number, count, BITS) == place for place, share in enumerate(shares) for number in share)


def test_every_number_is_as_likely_and_says_the_signs() -> None:
    noise = Key(5).normal((32_000, *SIZE))
    found = numbers(pooled(noise, None, len(noise)), directions().view(2, BITS, -1))
    for family in range(2):
        assert float((found[:, family].bincount(minlength=32) / 1000 - 1).abs().max()) < 0.15
    code = noise[0].sum(0) @ directions()[1].T
    assert found[0, 1] == sum(16 >> i for i in range(BITS) if code[i] > 0)


def test_noise_is_moved_into_its_shares_and_stays_standard_normal() -> None:
    """Each answer as often as the other: together they are the noise that a sampler draws."""
    num = 35 * 120
    both = [
        (COUPLING.share(Choice("places", "two", j)), COUPLING.share(Choice("member", "fruit", i)))
        for i in range(7)
        for j in range(5)
    ]
    at = Key(3).uniform((num, 2)).tolist()
    ranges = [[share.numbers(BITS) for share in pair] for pair in both]
    drawn = [[r[int(u * len(r))] for r, u in zip(ranges[n % 35], at[n], strict=True)] for n in range(num)]
    wanted = torch.tensor(drawn)
    item = torch.arange(num)[:, None].expand(-1, SIZE[0])
    moved = into_shares(Key(7).normal((num, *SIZE)), item, wanted, directions())
    assert torch.equal(numbers(pooled(moved, None, num), directions()), wanted)
    noise = moved.flatten(1)
    assert float(noise.mean(0).abs().max()) < 4.5 / num**0.5
    assert float((noise.T.cov() - torch.eye(noise.shape[1])).abs().max()) < 7 / num**0.5
    code = pooled(moved, None, num) @ directions().flatten(0, 1).T
    assert float((code.pow(4).mean(0) - 3).abs().max()) < 0.75


def test_only_signs_change_and_only_of_who_has_a_share() -> None:
    noise, V = Key(3).normal((2, 6, 12), torch.float64), directions().double()
    moved = into_shares(noise, ITEM, torch.tensor([[3, -1], [-1, -1], [17, 30]]), V)
    assert torch.equal(moved[ITEM == 1], noise[ITEM == 1]) and torch.equal(moved[ITEM < 0], noise[ITEM < 0])
    assert numbers(pooled(moved, ITEM, 3), V)[[0, 2, 2], [0, 0, 1]].tolist() == [3, 17, 30]
    before, after = (pooled(x, ITEM, 3) @ V.flatten(0, 1).T for x in (noise, moved))
    torch.testing.assert_close(after.abs(), before.abs(), atol=2e-2, rtol=0)  # directions are rounded to bfloat16
    torch.testing.assert_close(after[0, BITS:], before[0, BITS:], atol=2e-2, rtol=0)
    for n in (0, 2):
        change = (moved - noise)[n == ITEM]
        torch.testing.assert_close(change, change[:1].expand_as(change))


def test_directions_are_quiet_and_at_right_angles() -> None:
    answers = Key(8).normal((500, *SIZE)) * torch.linspace(0.1, 2, 12)
    V = quiet_directions([answers], 2, 4)
    flat = V.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(8), atol=1e-2, rtol=0)
    loud = (pooled(answers, None, 500) @ flat.T).std(0).view(2, 4)
    assert bool((loud[:, 1:] > loud[:, :-1]).all()) and float(loud.max()) < 1.5
    assert torch.equal(V, V.bfloat16().float())
    with pytest.raises(ValueError, match="2 numbers of 7 bits want as many channels, latents have 12"):
        quiet_directions([answers], 2, 7)


def test_numbers_that_begin_alike_are_of_answers_that_are_alike() -> None:
    points = torch.tensor([[1.0, 5], [-1, 2], [2, -3], [-2, -4], [-3, 9]])
    assert by_halves(points) == [3, 4, 2, 1, 0]
    y = families()["member"]["fruit"]
    V = principal_directions((y - y.mean(0)).flatten(1), BITS)
    order = by_halves((y - y.mean(0)).flatten(1) @ V.T)
    low, high = order[:3], order[3:]
    code = (y - y.mean(0)).flatten(1) @ V[0]
    assert float(code[low].max()) <= float(code[high].min())


def test_orders_that_are_known_are_kept() -> None:
    made = Coupling(families(), ("places", "member"), BITS)
    turned = {"member": {"fruit": made.orders["member"]["fruit"][::-1]}}
    again = Coupling(families(), ("places", "member"), BITS, turned)
    assert (
        again.orders["member"]["fruit"] == turned["member"]["fruit"] and again.orders["places"] == made.orders["places"]
    )
    assert [again.share(Choice("member", "fruit", i)).place for i in range(7)] == [
        6 - made.share(Choice("member", "fruit", i)).place for i in range(7)
    ]
    assert turned == {"member": {"fruit": made.orders["member"]["fruit"][::-1]}}
    with pytest.raises(ValueError, match="'fruit' of 'member' has 7 answers and the model knows an order of 6"):
        Coupling(families(), ("places", "member"), BITS, {"member": {"fruit": list(range(6))}})


@pytest.mark.parametrize(
    "choice, said",
    [
        (Choice("member", "frut", 0), "no group 'frut' of 'member' in the coupling; it has: fruit, tool"),
        (Choice("place", "two", 0), "it has: none"),
        (Choice("member", "fruit", 7), "answer 7 of 'fruit', which has 7"),
    ],
)
def test_unknown_choices_are_named(choice: Choice, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        COUPLING.share(choice)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"answers of sizes \[\(4, 2\), \(5, 2\)\]"):
        Coupling({"a": {"b": torch.zeros(3, 4, 2)}, "c": {"d": torch.zeros(3, 5, 2)}}, ("a", "c"), 2)
    with pytest.raises(ValueError, match="'c' has no number in heads.flow.choices, which has: a"):
        Coupling({"c": {"d": torch.zeros(3, 5, 2)}}, ("a",), 2)
    with pytest.raises(ValueError, match="5 answers for 4 numbers; use more choice_bits"):
        Coupling({"a": {"b": torch.zeros(5, 4, 2)}}, ("a",), 2)
