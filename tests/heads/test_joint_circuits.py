"""Circuits against plain sums over their latent states, and against enumeration of all blocks, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from real_model import check_behind_a_real_model
from tiny_call import (
    VOCABULARY,
    WIDTH,
    all_blocks,
    lesson_of,
    probabilities,
    tiny_call,
    tiny_head,
    total_variation,
    worst_gradient_error,
)
from torch import Tensor

from eval.experiments.joint.training import uniforms
from omni.heads.joint.circuits import Circuit, Factors
from omni.rng import Key

R = 3
FAMILIES = ("cp", "hmm", "tree")


def circuit(name: str, length: int, seed: int = 0, **options: object) -> Circuit:
    head = tiny_head(name, length, seed, num_states=R, **{"expander_rank": 2, "anneal": 0, "balance": 0, **options})
    assert isinstance(head, Circuit)
    return head


# ---- test oracle: p(x_1 .. x_m) as a sum over every assignment of latent states, in plain Python -------------------


def places(name: str, length: int) -> tuple[list[tuple[int, int]], list[int]]:
    """([(parent, number of the matrix)] of every state but the first, [the state of every token]), by hand."""
    if name == "cp":
        return [], [0] * length
    if name == "hmm":
        return [(k, k) for k in range(length - 1)], list(range(length))
    return {
        1: ([], [0]),
        2: ([], [0, 0]),
        3: ([(0, 0)], [1, 1, 0]),
        4: ([(0, 0), (0, 1)], [1, 1, 2, 2]),
        5: ([(0, 0), (0, 1), (1, 2)], [3, 3, 1, 2, 2]),
        7: ([(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)], [3, 3, 4, 4, 5, 5, 2]),
    }[length]


def slow(
    name: str, factors: Factors, b: int, ids: list[int], length: int, power: float = 1.0
) -> dict[tuple[int, ...], float]:
    """P(z) f(x_1 .. x_m | z)^power for every assignment z of latent states, z[0] the first."""
    root, moves, emissions = (t[b].exp().tolist() for t in (factors.root, factors.moves, factors.emissions))
    edges, of_token = places(name, length)
    found = {}
    for z in itertools.product(range(R), repeat=1 + len(edges)):
        p = root[z[0]]
        for n, (parent, matrix) in enumerate(edges):
            p *= moves[matrix][z[parent]][z[n + 1]]
        for k, x in enumerate(ids):
            p *= emissions[k][z[of_token[k]]][x] ** power
        found[z] = p
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_prob_is_the_sum_over_latent_states(name: str, length: int) -> None:
    head = circuit(name, length)
    ids = Key(1).generator()
    blocks = torch.randint(0, VOCABULARY, (4, length), generator=ids)
    call = tiny_call(4)
    factors = head.factors(call)
    found = head.log_prob(call, blocks, Key(0))
    assert found.kind == "exact"
    for b in range(4):
        expected = sum(slow(name, factors, b, blocks[b].tolist(), length).values())
        assert abs(found.value[b].item() - math.log(expected)) < 1e-10


def test_a_tree_of_seven() -> None:
    head, blocks = circuit("tree", 7), torch.tensor([[0, 2, 1, 1, 0, 2, 2]])
    call = tiny_call(1)
    expected = sum(slow("tree", head.factors(call), 0, blocks[0].tolist(), 7).values())
    assert abs(head.log_prob(call, blocks, Key(0)).value.item() - math.log(expected)) < 1e-10
    assert head.steps == 3


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_are_computed_from_the_start(name: str, rank: int) -> None:
    """Entry by entry: emissions from the expanded start, root and moves linear in it."""
    head, call = circuit(name, 4, expander_rank=rank), tiny_call(2)
    factors, weights = head.factors(call), dict(head.named_parameters())
    assert factors.moves.shape == (2, {"cp": 0, "hmm": 3, "tree": 2}[name], R, R)
    for b, k, r in itertools.product(range(2), range(4), range(R)):
        h = call.start[b]
        full = weights["expand_down"][k, r] @ weights["expand_up"][k, r] if rank else weights["expand"][k, r]
        logits = call.read(h + h @ full + weights["expand_bias"][k, r])
        assert torch.allclose(factors.emissions[b, k, r], logits.log_softmax(-1), atol=1e-10)
        for n in range(factors.moves.shape[1]):
            row = slice((n * R + r) * R, (n * R + r + 1) * R)
            move = weights["moves.weight"][row] @ h + weights["moves.bias"][row]
            assert torch.allclose(factors.moves[b, n, r], move.log_softmax(-1), atol=1e-10)


# ---- enumeration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_sum_to_one(name: str) -> None:
    for length in (1, 2, 3, 5):
        assert (probabilities(circuit(name, length)).sum(-1) - 1).abs().max() < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_conditionals_are_ratios_of_marginals_and_chain_to_the_joint(name: str) -> None:
    K = 4
    head, everything = circuit(name, K), all_blocks(4)
    joint = probabilities(head)[0].view([VOCABULARY] * K)
    call = tiny_call(1, len(everything))
    found = head.conditionals(call, everything)
    assert found.shape == (len(everything), K, VOCABULARY) and found.dtype == torch.float64
    for k in range(K):
        marginal = joint.flatten(k + 1).sum(-1) if k + 1 < K else joint
        log_p = marginal / marginal.sum(-1, keepdim=True)
        expected = log_p.view(-1, VOCABULARY).repeat_interleave(VOCABULARY ** (K - k), 0)
        assert (found[:, k].exp() - expected).abs().max() < 1e-10
    chained = found.gather(-1, everything.unsqueeze(-1)).squeeze(-1).sum(-1)
    assert (chained - joint.flatten().log()).abs().max() < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shorter_block_scores_its_marginal(name: str) -> None:
    K, gamma = 4, 0.7
    head, everything = circuit(name, K, gamma=gamma), all_blocks(4)
    joint = probabilities(head)[0].view([VOCABULARY] * K)
    call = tiny_call(1, len(everything))
    found = head.conditionals(call, everything).gather(-1, everything.unsqueeze(-1)).squeeze(-1)
    for m in range(1, K + 1):
        marginal = (joint.flatten(m).sum(-1) if m < K else joint).flatten()
        score = head.log_prob(tiny_call(1, VOCABULARY**m), all_blocks(m), Key(0)).value
        assert (score.exp() - marginal).abs().max() < 1e-10
        weight = gamma ** torch.arange(m, dtype=torch.float64)
        terms = head.loss(call, lesson_of(everything, [m] * len(everything)))
        assert terms.keys() == {"circuit"}
        expected = -(found[:, :m] * weight).sum(-1).sum().item()
        assert abs(terms["circuit"].sum.item() - expected) < 1e-8
        assert abs(terms["circuit"].count - len(everything) * weight.sum().item()) < 1e-8


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_both_ways_of_sampling_have_the_distribution_of_log_prob(name: str) -> None:
    K, num = 3, 200_000
    head, u = circuit(name, K), uniforms(num, K, Key(5))
    log_p = probabilities(head)[0]
    for draw in (head.sample, head.sample_latent):
        with torch.no_grad():
            parts = [draw(tiny_call(1, len(part)), part, Key(n)).ids for n, part in enumerate(u.split(10_000))]
        assert total_variation(torch.cat(parts), log_p) < 0.01
    uniform = torch.full_like(log_p, 1 / len(log_p))
    assert float((log_p - uniform).abs().sum() / 2) > 0.1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_latent_states_have_their_joint_distribution(name: str, length: int) -> None:
    """Pairs (z_first, z_last) of the ancestral form, against the plain sum."""
    head, num = circuit(name, length), 40_000
    with torch.no_grad():
        factors = head.factors(tiny_call(1, num))
        states = head.states(factors, uniforms(num, length, Key(6)))
    assert states.shape == (num, length)
    of_token = places(name, length)[1]
    expected = torch.zeros(R, R, dtype=torch.float64)
    for z, p in slow(name, factors, 0, [], length).items():
        expected[z[of_token[0]], z[of_token[-1]]] += p
    found = torch.bincount(states[:, 0] * R + states[:, -1], minlength=R * R).double() / num
    assert (found - expected.flatten()).abs().sum() / 2 < 0.015


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_a_function_of_the_uniforms(name: str) -> None:
    head, call, u = circuit(name, 4), tiny_call(50), uniforms(50, 4, Key(2))
    with torch.no_grad():
        draft = head.sample(call, u, Key(0))
        assert draft.log_q is not None and draft.steps == 4
        assert torch.equal(draft.log_q, head.conditionals(call, draft.ids))
        assert torch.equal(draft.ids, head.sample(call, u, Key(99)).ids)
        cumulative = draft.log_q.exp().cumsum(-1)
        by_hand = (cumulative <= u.unsqueeze(-1)).sum(-1)
        assert torch.equal(draft.ids, by_hand)
        assert torch.equal(draft.ids[:, :2], head.sample(call, u[:, :2], Key(0)).ids)
        one, two = (head.sample_latent(call, u, Key(n)).ids for n in (1, 2))
        assert torch.equal(one, head.sample_latent(call, u, Key(1)).ids) and not torch.equal(one, two)
        assert head.sample_latent(call, u, Key(1)).steps == {"cp": 1, "tree": 2, "hmm": 4}[name]
    assert call.passes == 1


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name: str, rank: int) -> None:
    head = circuit(name, 4, expander_rank=rank, anneal=0.5, balance=0.3)
    ids = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])
    for progress in (0.2, 1.0):
        lesson = lesson_of(ids, [4, 2, 3], progress)

        def value(lesson=lesson) -> Tensor:  # noqa: ANN001
            terms = head.loss(tiny_call(3), lesson).values()
            return torch.stack([t.weight * t.sum / t.count for t in terms]).sum()

        assert value().dtype == torch.float64
        assert worst_gradient_error(head, value) < 1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_annealing_softens_responsibilities_and_bounds_the_loss(name: str) -> None:
    """Halfway through annealing the power of emissions is 0.75 = (0.5 + 1) / 2."""
    K, gamma, power = 4, 0.9, 0.75
    head, ids, lengths = circuit(name, K, anneal=0.5), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]), [4, 3]
    call = tiny_call(2)
    factors = head.factors(call)
    expected = 0.0
    for b, m in enumerate(lengths):
        scores = [0.0]
        for k in range(1, m + 1):
            scores.append(math.log(sum(slow(name, factors, b, ids[b, :k].tolist(), K, power).values())) / power)
            expected -= gamma ** (k - 1) * (scores[k] - scores[k - 1])
    losses = [head.loss(call, lesson_of(ids, lengths, p))["circuit"].sum.item() for p in (0.0, 0.25, 0.5, 1.0)]
    assert abs(losses[1] - expected) < 1e-10
    assert losses[0] > losses[1] > losses[2] == losses[3]


@pytest.mark.parametrize("name", FAMILIES)
def test_balance_is_the_missing_entropy_of_states(name: str) -> None:
    K = 3
    head, ids, lengths = circuit(name, K, balance=0.1), torch.tensor([[0, 1, 2], [2, 2, 1], [1, 1, 0]]), [3, 1, 2]
    call = tiny_call(3)
    factors, of_token, expected = head.factors(call), places(name, K)[1], 0.0
    for k in range(K):
        there = [b for b in range(3) if lengths[b] > k]
        use = [0.0] * R
        for b in there:
            terms = slow(name, factors, b, ids[b, : k + 1].tolist(), K)
            for z, p in terms.items():
                use[z[of_token[k]]] += p / sum(terms.values()) / len(there)
        expected += len(there) * (math.log(R) + sum(p * math.log(p) for p in use))
    term = head.loss(call, lesson_of(ids, lengths))["balance"]
    assert term.weight == 0.1 and term.count == 6
    assert abs(term.sum.item() - expected) < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_states_start_distinct_and_near_the_model(name: str) -> None:
    heads = [tiny_head(name, 3, size=0.0, num_states=R, noise=noise) for noise in (0.5, 1e-4)]
    for head in heads:
        assert isinstance(head, Circuit)
        table = head.factors(tiny_call(1)).emissions[0].flatten(0, 1).detach()
        assert torch.pdist(table).min() > 1e-6
    own = tiny_call(1).read(tiny_call(1).start).log_softmax(-1)
    assert (table - own).abs().max() < 1e-2
    again = tiny_head(name, 3, size=0.0, num_states=R, noise=1e-4)
    other = tiny_head(name, 3, seed=1, size=0.0, num_states=R, noise=1e-4)
    same = [torch.equal(a, b) for a, b in zip(heads[1].parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(heads[1].parameters()), next(other.parameters()))


# ---- what is refused, and the real model ----------------------------------------------------------------------------


def test_invalid_options_are_refused() -> None:
    head, call = circuit("hmm", 3), tiny_call(2)
    with pytest.raises(ValueError, match="passes = 2 for"):
        head.sample(call, uniforms(2, 3, Key(0)), Key(0), passes=2)
    with pytest.raises(ValueError, match="1 to 3 tokens a block, not 4"):
        head.sample(call, uniforms(2, 4, Key(0)), Key(0))
    with pytest.raises(ValueError, match="num_states"):
        tiny_head("cp", 3, num_states=1)
    with pytest.raises(ValueError, match="num_states"):
        tiny_head("cp", 3, num_state=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_real_model(name: str) -> None:
    head = check_behind_a_real_model(name, "circuit", {"num_states": 2})
    assert head.width == 16 != WIDTH
