"""Known joints: their definitions, exact oracles, keyed samples, and distances of distributions from them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from eval.experiments.joint.distances import of_distribution, of_samples, of_support, sampling_error
from eval.experiments.joint.joints import JOINTS, SIZED_JOINTS, Joint, Table, bigram, build_joint, codes, sticky, table
from eval.experiments.joint.lab import known_table
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

SMALL = (
    "poker_s4", "poker_s5", "poker_s6", "poker_s6_dealt", "equal_pairs3", "parity5", "permutation4", "sticky3",
    "word_problem3", "group_words4", "bigram2",
)  # fmt: skip


# ---- definitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vocab_size", "length", "strings", "entropy"),
    [
        ("poker_s4", 10, 2, 4, 1.386), ("poker_s5", 10, 2, 5, 1.609), ("poker_s6", 10, 2, 6, 1.792),
        ("poker_s6_dealt", 10, 2, 6, 0.861), ("poker_s4_dealt", 10, 2, 4, 0.312), ("equal_pairs4", 4, 4, 16, 2.773),
        ("parity8", 2, 8, 128, 7 * math.log(2)), ("permutation5", 5, 5, 120, 4.787),
        ("word_problem4", 6, 4, 216, 5.375), ("sudoku", 4, 16, 288, 5.663),
    ],
)  # fmt: skip
def test_sizes_and_entropies(name: str, vocab_size: int, length: int, strings: int, entropy: float) -> None:
    joint = known_table(name)
    assert (joint.vocab_size, joint.length, len(joint.p)) == (vocab_size, length, strings)
    assert joint.ids.dtype == torch.int64 and joint.p.dtype == torch.float64
    assert joint.entropy() == pytest.approx(entropy, abs=6e-4)
    assert float(joint.p.sum()) == pytest.approx(1, abs=1e-12) and (joint.codes.diff() > 0).all()


def test_rules_of_the_strings() -> None:
    hands = {" ".join(known_table("poker_s6").words[i] for i in row) for row in known_table("poker_s6").ids.tolist()}
    assert hands == {"high card", "one pair", "two pair", "full house", "straight flush", "royal flush"}
    assert (known_table("parity6").ids.sum(-1) % 2 == 0).all() and len(known_table("parity6").p) == 32
    assert all(sorted(row) == [0, 1, 2, 3] for row in known_table("permutation4").ids.tolist())
    pairs = known_table("equal_pairs3").ids
    assert (pairs[:, ::2] == pairs[:, 1::2]).all() and len(pairs) == 9
    grids = known_table("sudoku").ids.view(-1, 4, 4)
    boxes = grids.view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    for groups in (grids, grids.transpose(1, 2), boxes):
        assert (groups.sort(-1).values == torch.arange(4)).all()


def test_group_words_multiply_in_a_group_that_does_not_commute() -> None:
    from eval.experiments.joint.joints import compose, symmetric_group

    elements = symmetric_group(3)
    assert any(compose(a, b) != compose(b, a) for a, b in product(elements, elements))
    for row in known_table("word_problem4").ids.tolist():
        whole = elements[0]
        for letter in row[:-1]:
            whole = compose(whole, elements[letter])
        assert whole == elements[row[-1]]
    letters = [(0, 1, 2), (1, 0, 2), (0, 2, 1)]
    found = set()
    for word in product(range(3), repeat=4):
        whole = elements[0]
        for letter in word:
            whole = compose(whole, letters[letter])
        if whole == (0, 1, 2):
            found.add(word)
    assert {tuple(row) for row in known_table("group_words4").ids.tolist()} == found


# ---- oracles and samples -------------------------------------------------------------------------------------------


def slow_conditionals(joint: Table, ids: Tensor) -> Tensor:
    """By adding up the probabilities of all strings with the prefix."""
    out = torch.zeros(*ids.shape, joint.vocab_size, dtype=torch.float64)
    for b, row in enumerate(ids.tolist()):
        for k in range(len(row)):
            for string, p in zip(joint.ids.tolist(), joint.p.tolist(), strict=True):
                if string[:k] == row[:k]:
                    out[b, k, string[k]] += p
    total = out.sum(-1, keepdim=True)
    return torch.where(total > 0, out / total, 1 / joint.vocab_size)


@pytest.mark.parametrize("name", SMALL)
def test_conditionals_equal_those_of_the_enumerated_distribution(name: str) -> None:
    joint = known_table(name)
    ids = torch.cat([joint.ids[:12], torch.zeros(1, joint.length, dtype=torch.int64)])
    found = joint.conditionals(ids).exp()
    assert (found - slow_conditionals(joint, ids)).abs().max() < 1e-12
    assert (found.sum(-1) - 1).abs().max() < 1e-12
    chain = joint.conditionals(joint.ids).gather(-1, joint.ids.unsqueeze(-1)).squeeze(-1).sum(-1)
    assert (chain - joint.p.log()).abs().max() < 1e-10
    assert (joint.log_prob(joint.ids) - joint.p.log()).abs().max() < 1e-10


@pytest.mark.parametrize("name", (*SMALL, "sudoku", "large_bigram4"))
def test_samples_are_keyed_and_follow_the_distribution(name: str) -> None:
    joint, num = build_joint(name), 2_000 if name == "large_bigram4" else 20_000
    ids = joint.draw(Key(0), num)
    assert torch.equal(ids, joint.draw(Key(0), num)) and not torch.equal(ids, joint.draw(Key(1), num))
    assert ids.shape == (num, joint.length) and ids.dtype == torch.int64
    scores = joint.log_prob(ids)
    assert -float(scores.mean()) == pytest.approx(joint.entropy(), abs=5 * float(scores.std()) / num**0.5 + 1e-9)
    if isinstance(joint, Table):
        assert of_samples(joint, ids).tv < 2 * sampling_error(joint, num) + 1e-9


def test_the_autoregressive_oracle_samples_the_joint() -> None:
    """Token by token with the oracle, from common noise: autoregressive decoding of a perfect model."""
    joint, num = known_table("permutation4"), 20_000
    u, ids = Key(3).uniform((num, 4), torch.float64), torch.zeros(num, 4, dtype=torch.int64)
    for k in range(4):
        ids[:, k] = inverse_cdf_sample(joint.conditionals(ids)[:, k], u[:, k])
    found = of_samples(joint, ids)
    assert found.valid == 1 and found.coverage == 1 and found.tv < 2 * sampling_error(joint, num)


def test_a_chain_and_its_table_agree() -> None:
    for chain in (sticky("s", 4), bigram("b", 3, vocab_size=6)):
        listed = chain.listed()
        assert listed.entropy() == pytest.approx(chain.entropy(), abs=1e-9)
        ids = chain.draw(Key(0), 50)
        assert (listed.conditionals(ids) - chain.conditionals(ids)).abs().max() < 1e-9
        assert (listed.log_prob(ids) - chain.log_prob(ids)).abs().max() < 1e-9
    with pytest.raises(ValueError, match="too many to list"):
        bigram("b", 4).listed()


def test_strings_outside_of_the_support() -> None:
    joint = known_table("poker_s6")
    others = torch.tensor([[0, 3], [10, 1], [0, 10]])  # "high pair", and ids past the words
    assert joint.log_prob(others).tolist() == [-math.inf] * 3 and joint.find(others).tolist() == [-1] * 3
    with pytest.raises(ValueError, match="shorter block"):
        codes(torch.zeros(1, 64, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poker_s7", "poker_s"),
        ("parity", "needs a number"),
        ("paritty4", "did you mean 'parity'"),
        ("sudok", "did you mean 'sudoku'"),
    ],
)
def test_unknown_joints_name_the_nearest_kind(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_joint(name)


def test_every_registered_joint_can_be_built() -> None:
    for name in (*JOINTS.names(), *(f"{kind}3" for kind in SIZED_JOINTS.names())):
        joint: Joint = build_joint(name)
        assert joint.name == name and joint.draw(Key(0), 3).shape == (3, joint.length)


def test_tables_merge_equal_strings_and_drop_zero_weights() -> None:
    ids = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0]])
    joint = table("t", ids, 2, torch.tensor([1.0, 2.0, 1.0, 0.0]))
    assert joint.ids.tolist() == [[0, 1], [1, 1]] and joint.p.tolist() == [0.5, 0.5]
    assert joint.full().tolist() == [[0, 0.5], [0, 0.5]]


# ---- distances -----------------------------------------------------------------------------------------------------


def test_distances_of_a_distribution_follow_their_definitions() -> None:
    joint = known_table("permutation3")
    q = Key(0).uniform((3, 3, 3), torch.float64)
    q /= q.sum()
    p, found = joint.full(), of_distribution(joint, q)
    assert found.tv == pytest.approx(float((p - q).abs().sum() / 2))
    assert found.valid == pytest.approx(float(q[p > 0].sum())) and found.coverage == 1
    assert found.forward_kl == pytest.approx(float((p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum()))
    assert found.reverse_kl == math.inf and found.entropy == pytest.approx(float(-(q * q.log()).sum()))
    inside = torch.where(p > 0, q, 0.0)
    inside /= inside.sum()
    legal = of_distribution(joint, inside)
    assert legal.reverse_kl == pytest.approx(float((inside[p > 0] * (inside[p > 0] / p[p > 0]).log()).sum()))
    assert of_support(joint, inside.flatten()[joint.codes].log()).tv == pytest.approx(legal.tv)
    itself = of_distribution(joint, p)
    assert itself.tv < 1e-12 and abs(itself.forward_kl) < 1e-12 and abs(itself.reverse_kl) < 1e-12


def test_distances_of_samples_by_hand() -> None:
    joint = known_table("parity2")  # 00 and 11
    found = of_samples(joint, torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]]))
    assert (found.tv, found.valid, found.coverage) == (0.5, 0.75, 0.5)
    assert found.forward_kl == found.reverse_kl == math.inf
    assert found.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    whole = of_samples(joint, torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]]))
    assert whole.tv == 0 and whole.reverse_kl == pytest.approx(0) and whole.forward_kl == pytest.approx(0)
    assert of_samples(joint, torch.tensor([[2, 0], [5, 5]])).valid == 0  # ids past the words


def test_the_distance_of_exact_samples_equals_its_formula() -> None:
    for name, num in (("permutation5", 2000), ("poker_s6_dealt", 300)):
        joint = known_table(name)
        mean = sum(of_samples(joint, joint.draw(Key(n), num)).tv for n in range(100)) / 100
        assert sampling_error(joint, num) == pytest.approx(mean, rel=0.06)
    assert sampling_error(known_table("permutation5"), 400_000) == pytest.approx(0.0069, abs=1e-4)
    assert sampling_error(known_table("parity8"), 400_000) == pytest.approx(0.0071, abs=1e-4)


def test_invalid_distributions_raise() -> None:
    joint = known_table("parity2")
    with pytest.raises(ValueError, match="sum 1"):
        of_distribution(joint, torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="log-probabilities"):
        of_support(joint, torch.zeros(2))
