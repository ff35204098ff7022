"""Lower bounds against published numbers, closed forms, and exhaustive searches."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import pytest
import torch

from eval.experiments.joint.distances import of_distribution
from eval.experiments.joint.joints import Table, table
from eval.experiments.joint.lab import known_table
from eval.experiments.joint.lower_bounds import (
    accepted_by_marginals,
    best_mixture,
    best_step_bounds,
    cp_rank,
    cut_rank,
    emitting_states,
    least_product_tv,
    marginal_product,
    marginals_tv,
    random_step_bounds,
    subset_entropies,
    total_correlation,
)
from omni.rng import Key

LN2 = math.log(2)


# ---- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "correlation", "marginals", "least", "accepted"),
    [
        ("poker_s4", 1.386, 0.750, 0.5000, 1.250),
        ("poker_s5", 1.332, 0.720, 0.4649, 1.280),
        ("poker_s6", 1.330, 0.722, 0.4880, 1.278),
        ("poker_s6_dealt", 0.703, 0.501, 0.4051, 1.499),
        ("poker_s4_dealt", 0.312, 0.163, 0.0870, 1.837),
        ("parity2", LN2, 0.5, 0.4142, 1.5),
        ("parity3", LN2, 0.5, 0.4912, 2.5),
        ("parity4", LN2, 0.5, 0.4994, 3.5),
        ("parity8", LN2, 0.5, 0.5000, 7.5),
        ("permutation3", 1.504, 0.778, 0.649, 1.889),
        ("permutation4", 2.367, 0.906, 0.777, 2.219),
        ("permutation5", 3.260, 0.962, 0.895, 2.510),
        ("equal_pairs4", 2.773, 0.938, 0.750, 1.5625),
        ("word_problem4", 1.792, 0.833, 0.812, 3.167),
    ],
)
def test_bounds_of_products(name: str, correlation: float, marginals: float, least: float, accepted: float) -> None:
    joint = known_table(name)
    assert total_correlation(joint) == pytest.approx(correlation, abs=6e-4)
    assert marginals_tv(joint) == pytest.approx(marginals, abs=6e-4)
    assert accepted_by_marginals(joint) == pytest.approx(accepted, abs=6e-4)
    assert least_product_tv(joint, Key(0), restarts=16) == pytest.approx(least, abs=1.5e-3)


def test_least_products_in_closed_form() -> None:
    """Perfect matchings of n words: 1 - 1 / sqrt n where it is whole; S5 and S6 by hand."""
    for n in (4, 9):
        joint = table("matching", torch.arange(n).unsqueeze(1).expand(-1, 2), n)
        assert least_product_tv(joint, Key(1), restarts=32) == pytest.approx(1 - n**-0.5, abs=1e-4)
    assert least_product_tv(known_table("poker_s5"), Key(1)) == pytest.approx(2 * math.sqrt(0.4) - 0.8, abs=5e-4)
    assert least_product_tv(known_table("poker_s6"), Key(1)) == pytest.approx(2 / math.sqrt(3) - 2 / 3, abs=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_least_product_of_a_random_joint_equals_a_grid_search(seed: int) -> None:
    """Two bits: the best product on a grid of 400 x 400 is no better, and hardly worse."""
    p = Key(seed).uniform((4,), torch.float64)
    joint = table("random", torch.tensor(list(product((0, 1), repeat=2))), 2, p)
    a = torch.linspace(0, 1, 401, dtype=torch.float64)
    q = torch.stack([1 - a, a], 1)[:, None, :, None] * torch.stack([1 - a, a], 1)[None, :, None, :]
    grid = float((joint.full() - q).abs().sum((-1, -2)).min() / 2)
    found = least_product_tv(joint, Key(0), restarts=16)
    assert found - 1e-9 <= grid <= found + 2e-3


def test_the_product_of_marginals_has_least_divergence_and_not_least_distance() -> None:
    joint = known_table("poker_s6_dealt")
    marginals = joint.marginals()
    product_distribution = marginals[0][:, None] * marginals[1]
    found = of_distribution(joint, product_distribution)
    assert found.tv == pytest.approx(marginals_tv(joint)) and found.valid == pytest.approx(0.499, abs=6e-4)
    assert found.forward_kl == pytest.approx(total_correlation(joint))
    assert float(marginal_product(joint).sum()) == pytest.approx(found.valid)
    for n in range(50):
        moved = (marginals * (1 + 0.3 * Key(n).uniform((2, 10), torch.float64))).clamp(min=1e-9)
        moved /= moved.sum(-1, keepdim=True)
        assert of_distribution(joint, moved[0][:, None] * moved[1]).forward_kl > found.forward_kl


def test_lower_bounds_of_products_are_keyed() -> None:
    joint = known_table("permutation3")
    assert least_product_tv(joint, Key(5), 2, 3) == least_product_tv(joint, Key(5), 2, 3)


def slow_accepted(joint: Table) -> float:
    """Over all strings of all lengths."""
    full, m, total = joint.full(), joint.marginals(), 0.0
    for k in range(1, joint.length + 1):
        for string in product(range(joint.vocab_size), repeat=k):
            reach = 1.0
            for j in range(k):
                above = float(full[string[:j]].sum())
                reach *= min(float(full[string[: j + 1]].sum()) / above, float(m[j, string[j]])) if above else 0.0
            total += reach
    return total


@pytest.mark.parametrize("name", ["sticky3", "permutation3", "group_words4"])
def test_accepted_tokens_by_enumeration(name: str) -> None:
    assert accepted_by_marginals(known_table(name)) == pytest.approx(slow_accepted(known_table(name)), abs=1e-9)


# ---- several steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "best", "random"),
    [
        ("parity8", [LN2, 0], [LN2, LN2, LN2, LN2, 0]),
        ("permutation4", [2.367, 0.981, 0.288, 0], []),
        ("permutation5", [3.260, 1.427, 0.629, 0.223, 0], []),
        ("equal_pairs4", [2.773, 0], [2.773, 0.924, 0.462, 0]),
        ("sticky6", [2.229, 0.238, 0], [2.229, 0.818, 0.394, 0.322, 0.209]),
        ("very_sticky6", [4.757, 0.599, 0], [4.757, 1.758, 0.842, 0.794, 0.681]),
        ("word_problem4", [1.792, 0], [1.792, 1.792, 0]),
    ],
)
def test_lower_bounds_of_several_steps(name: str, best: list[float], random: list[float]) -> None:
    joint = known_table(name)
    assert best_step_bounds(joint)[: len(best)] == pytest.approx(best, abs=6e-4)
    assert random_step_bounds(joint)[: len(random)] == pytest.approx(random, abs=6e-4)
    assert best_step_bounds(joint)[-1] == pytest.approx(0, abs=1e-9)
    assert all(a <= b + 1e-9 for a, b in zip(best_step_bounds(joint), random_step_bounds(joint), strict=True))


def ordered_partitions(items: tuple[int, ...]):  # noqa: ANN201
    if not items:
        yield []
    for size in range(1, len(items) + 1):
        for first in combinations(items, size):
            for rest in ordered_partitions(tuple(i for i in items if i not in first)):
                yield [first, *rest]


def slow_cost(joint: Table, sets: list[tuple[int, ...]]) -> float:
    """The divergence of the joint from the distribution of the sampler of these sets, by its probabilities."""
    log_q, done = torch.zeros(len(joint.p), dtype=torch.float64), []
    for chosen in sets:
        for k in chosen:
            log_q += _mass(joint, [*done, k]).log() - _mass(joint, done).log()
        done += chosen
    return float((joint.p * (joint.p.log() - log_q)).sum())


def _mass(joint: Table, places: list[int]) -> torch.Tensor:
    """(N,): the marginal probability of every string's ids at these places."""
    same = (joint.ids[:, None, places] == joint.ids[None, :, places]).all(-1)
    return (same * joint.p).sum(-1)


@pytest.mark.parametrize("name", ["permutation4", "group_words4", "very_sticky3", "poker_s6_dealt"])
def test_steps_equal_a_search_over_ordered_partitions(name: str) -> None:
    joint = known_table(name)
    found = [math.inf] * joint.length
    equal: dict[int, list[float]] = {}
    for sets in ordered_partitions(tuple(range(joint.length))):
        cost = slow_cost(joint, sets)
        found[len(sets) - 1] = min(found[len(sets) - 1], cost)
        sizes = [len(chosen) for chosen in sets]
        if sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1:
            equal.setdefault(len(sets), []).append(cost)
    assert best_step_bounds(joint) == pytest.approx(found, abs=1e-9)
    means = [sum(equal[n]) / len(equal[n]) for n in sorted(equal)]
    assert random_step_bounds(joint) == pytest.approx(means, abs=1e-9)


def test_entropies_of_subsets() -> None:
    joint = known_table("permutation4")
    H = subset_entropies(joint)
    assert H[0] == 0 and H[-1] == pytest.approx(joint.entropy())
    assert H[0b0101] == pytest.approx(math.log(12)) and H[0b1000] == pytest.approx(math.log(4))


@pytest.mark.slow
def test_lower_bounds_of_sudoku() -> None:
    joint = known_table("sudoku")
    assert total_correlation(joint) == pytest.approx(16.518, abs=6e-4)
    assert float(marginal_product(joint).sum()) == pytest.approx(6.7e-8, rel=0.01)
    assert best_step_bounds(joint, 4) == pytest.approx([16.518, 1.269, 0.288, 0], abs=6e-4)
    random = random_step_bounds(joint)
    wanted = {1: 16.518, 2: 6.012, 3: 3.698, 4: 2.229, 6: 1.480, 8: 0.739}
    assert {n: random[n - 1] for n in wanted} == pytest.approx(wanted, abs=6e-4)


# ---- mixtures and ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank", "kl"),
    [
        ("poker_s4", 2, 0.693), ("poker_s4", 3, 0.347), ("poker_s4", 4, 0),
        ("poker_s5", 2, 0.659), ("poker_s5", 3, 0.277), ("poker_s6", 2, 0.637), ("poker_s6", 3, 0.231),
        ("poker_s6", 4, 0),
    ],
)  # fmt: skip
def test_best_mixtures(name: str, rank: int, kl: float) -> None:
    joint = known_table(name)
    found = best_mixture(joint, rank, Key(0), restarts=24)
    assert found.kl == pytest.approx(kl, abs=1e-3)
    distribution = torch.einsum("r,ri,rj->ij", found.weights, found.factors[:, 0], found.factors[:, 1])
    assert of_distribution(joint, distribution).forward_kl == pytest.approx(found.kl, abs=1e-6)
    assert (found.at(joint.ids) - distribution.flatten()[joint.codes]).abs().max() < 1e-12


def test_a_mixture_of_one_is_the_product_of_marginals() -> None:
    for name in ("permutation3", "poker_s6_dealt"):
        assert best_mixture(known_table(name), 1, Key(0), 2, 5).kl == pytest.approx(
            total_correlation(known_table(name))
        )


@pytest.mark.parametrize(
    ("name", "rank", "cut"),
    [
        ("poker_s4", 4, 4), ("poker_s5", 4, 4), ("poker_s6", 4, 4), ("parity2", 2, 2), ("parity6", 32, 2),
        ("permutation3", 6, 3), ("permutation4", 24, 6), ("permutation5", 120, 10), ("equal_pairs4", 16, 4),
        ("word_problem4", 216, 6), ("sudoku", 288, 72), ("sticky3", None, 4),
    ],
)  # fmt: skip
def test_ranks(name: str, rank: int | None, cut: int) -> None:
    assert cp_rank(known_table(name)) == rank and cut_rank(known_table(name)) == cut


@pytest.mark.parametrize(("name", "states"), [("parity3", 4), ("parity8", 4), ("permutation5", 30), ("equal_pairs4", 4),
                                              ("word_problem4", 36), ("permutation3", 6), ("sudoku", 96)])  # fmt: skip
def test_states_of_a_chain_whose_tokens_depend_on_the_state_alone(name: str, states: int) -> None:
    assert emitting_states(known_table(name)) == (states, states)


def test_the_sufficient_states_suffice_and_fewer_do_not() -> None:
    """Three tokens are independent given the middle state, so fewer states than products do not suffice. The chain of
    prefix classes and tokens, multiplied out, is the joint."""
    joint = known_table("parity3")
    assert best_mixture(joint, 3, Key(0), restarts=48).kl > 0.1 > 1e-3 > best_mixture(joint, 4, Key(0), restarts=48).kl
    distribution = torch.zeros(2, 2, 2, dtype=torch.float64)
    states = list(product((0, 1), repeat=2))  # (parity before, token)
    for path in product(states, repeat=3):
        linked = all((path[k][0] + path[k][1]) % 2 == path[k + 1][0] for k in range(2)) and path[0][0] == 0
        ends_even = (path[2][0] + path[2][1]) % 2 == 0
        if linked and ends_even:
            distribution[tuple(token for _, token in path)] += 0.25
    assert of_distribution(joint, distribution).tv < 1e-12


def test_two_rows_that_differ_in_one_place_leave_the_rank_open() -> None:
    free = table("free", torch.tensor(list(permutations(range(3))) + [(0, 0, 0), (0, 0, 1)]), 3)
    assert cp_rank(free) is None
