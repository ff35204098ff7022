"""The sequential head against a plain loop over tokens, and against enumeration of all blocks, in float64."""

from __future__ import annotations

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
from omni.heads.joint.sequential import Sequential
from omni.rng import Key


def sequential(length: int, seed: int = 0) -> Sequential:
    head = tiny_head("sequential", length, seed, size=0.5)
    assert isinstance(head, Sequential)
    return head


def slow_log_prob(head: Sequential, start: list[float], ids: list[int]) -> float:
    """Token by token and number by number, with weights as nested lists."""
    w = {name: p.tolist() for name, p in head.named_parameters()}
    embedding = tiny_call().embed(torch.arange(VOCABULARY)).tolist()
    columns = tiny_call().read(torch.eye(WIDTH, dtype=torch.float64)).T.tolist()

    def norm(x: list[float], weight: list[float]) -> list[float]:
        scale = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
        return [v / scale * g for v, g in zip(x, weight, strict=True)]

    def times(matrix: list[list[float]], x: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]

    total, state = 0.0, start
    for k, x in enumerate(ids):
        logits = times(columns, norm(state, w["norm.weight"]) if k else state)
        total += logits[x] - math.log(sum(math.exp(v) for v in logits))
        both = norm(state, w["step.state_norm.weight"]) + norm(embedding[x], w["step.token_norm.weight"])
        state = times(w["step.merge.weight"], both)
        wide = times(w["step.gate_up.weight"], norm(state, w["step.mlp_norm.weight"]))
        half = len(wide) // 2
        gated = [g / (1 + math.exp(-g)) * u for g, u in zip(wide[:half], wide[half:], strict=True)]
        state = [a + b for a, b in zip(state, times(w["step.down.weight"], gated), strict=True)]
    return total


@pytest.mark.parametrize("length", [1, 2, 4])
def test_log_prob_equals_a_plain_loop(length: int) -> None:
    head, call = sequential(length), tiny_call(5)
    ids = torch.randint(0, VOCABULARY, (5, length), generator=Key(1).generator())
    found = head.log_prob(call, ids, Key(0))
    assert found.kind == "exact"
    for b in range(5):
        expected = slow_log_prob(head, call.start[b].tolist(), ids[b].tolist())
        assert abs(found.value[b].item() - expected) < 1e-10


def test_probabilities_sum_to_one() -> None:
    for length in (1, 2, 3, 5):
        assert (probabilities(sequential(length)).sum(-1) - 1).abs().max() < 1e-10


def test_conditionals_are_ratios_of_marginals_and_a_shorter_block_scores_its_marginal() -> None:
    K = 4
    head, everything = sequential(K), all_blocks(K)
    joint = probabilities(head)[0].view([VOCABULARY] * K)
    call = tiny_call(1, len(everything))
    found = head.conditionals(call, everything)
    assert found.shape == (len(everything), K, VOCABULARY) and found.dtype == torch.float64
    taken = found.gather(-1, everything.unsqueeze(-1)).squeeze(-1)
    assert (taken.sum(-1) - joint.flatten().log()).abs().max() < 1e-10
    for m in range(1, K + 1):
        marginal = joint.flatten(m).sum(-1) if m < K else joint
        distribution = marginal / marginal.sum(-1, keepdim=True)
        expected = distribution.view(-1, VOCABULARY).repeat_interleave(VOCABULARY ** (K - m + 1), 0)
        assert (found[:, m - 1].exp() - expected).abs().max() < 1e-10
        score = head.log_prob(tiny_call(1, VOCABULARY**m), all_blocks(m), Key(0)).value
        assert (score.exp() - marginal.flatten()).abs().max() < 1e-10
        term = head.loss(call, lesson_of(everything, [m] * len(everything)))["sequential"]
        assert term.count == m * len(everything)
        assert abs(term.sum.item() + taken[:, :m].sum().item()) < 1e-8


def test_the_first_distribution_is_the_models_own() -> None:
    head, call = sequential(3), tiny_call(4)
    distribution = head.conditionals(call, torch.zeros(4, 3, dtype=torch.int64))[:, 0]
    assert torch.equal(distribution, call.read(call.start).log_softmax(-1))


def test_samples_have_the_distribution_of_log_prob() -> None:
    K, num = 3, 200_000
    head, u = sequential(K), uniforms(num, K, Key(5))
    distribution = probabilities(head)[0]
    with torch.no_grad():
        assert total_variation(head.sample(tiny_call(1, num), u, Key(0)).ids, distribution) < 0.01
    assert float((distribution - 1 / len(distribution)).abs().sum() / 2) > 0.1


def test_a_sample_is_a_function_of_the_uniforms() -> None:
    head, call, u = sequential(4), tiny_call(50), uniforms(50, 4, Key(2))
    with torch.no_grad():
        draft = head.sample(call, u, Key(0))
        assert draft.log_q is not None and draft.steps == 4
        assert torch.equal(draft.log_q, head.conditionals(call, draft.ids))
        assert torch.equal(draft.ids, (draft.log_q.exp().cumsum(-1) <= u.unsqueeze(-1)).sum(-1))
        assert torch.equal(draft.ids, head.sample(call, u, Key(99)).ids)
        assert torch.equal(draft.ids[:, :2], head.sample(call, u[:, :2], Key(0)).ids)
    assert call.passes == 1


def test_recurrent_drafting_equals_the_conditionals_after_emitted_ids() -> None:
    K = 4
    head, call = sequential(K), tiny_call(6)
    ids = torch.randint(0, VOCABULARY, (6, K), generator=Key(4).generator())
    expected = head.conditionals(call, ids)
    for m in (1, 2, 3):
        walk = head.draft_recurrently(call, ids[:, :m], uniforms(6, K - m, Key(0)))
        found = [walk.send(ids[:, k - 1]) if k > m else next(walk) for k in range(m, K)]
        assert torch.equal(torch.stack(found, 1).log_softmax(-1), expected[:, m:])
        with pytest.raises(StopIteration):
            walk.send(ids[:, -1])
    assert call.passes == 1
    with pytest.raises(ValueError, match="drafts 4 tokens after a hidden state; 4 leave none"):
        head.draft_recurrently(call, ids, uniforms(6, 1, Key(0)))


def test_weights_are_keyed() -> None:
    one, again, other = (list(tiny_head("sequential", 3, seed, size=0.0).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients() -> None:
    head, ids = sequential(4), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])

    def value() -> Tensor:
        term = head.loss(tiny_call(3), lesson_of(ids, [4, 2, 3]))["sequential"]
        return term.sum / term.count

    assert value().dtype == torch.float64
    assert worst_gradient_error(head, value) < 1e-7


def test_invalid_options_are_refused() -> None:
    head, call = sequential(3), tiny_call(2)
    with pytest.raises(ValueError, match="passes = 2"):
        head.sample(call, uniforms(2, 3, Key(0)), Key(0), passes=2)
    with pytest.raises(ValueError, match="1 to 3 tokens a block, not 4"):
        head.log_prob(call, torch.zeros(2, 4, dtype=torch.int64), Key(0))
    with pytest.raises(ValueError, match="expansion"):
        tiny_head("sequential", 3, expansion=0)


def test_with_a_real_model() -> None:
    head = check_behind_a_real_model("sequential", "sequential", {})
    assert isinstance(head, Sequential) and head.length == 3
    assert head.step.merge.weight.shape == (16, 2 * 16)  # the toy model's width; state and token concatenated
