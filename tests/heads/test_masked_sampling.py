"""Samples of a masked-block head in one pass and in more, against enumeration and against a plain loop over tokens.

Legend: B blocks of tokens, K tokens, V vocabulary, W width, N strings of a joint's support, or samples.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from masked_calls import K, OracleCall, ancestral_distribution, masked_head, oracle_head, small_call
from tiny_call import all_blocks, total_variation

from eval.experiments.joint.joints import Table, build_joint, equal_pairs
from eval.experiments.joint.training import uniforms
from omni.heads.joint.masked import Masked
from omni.heads.joint.masked_sampling import reveal_sizes
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample


@torch.no_grad()
def draw_slowly(head: Masked, uniform: list[float], passes: int, gumbel: list[list[float]]) -> list[int]:
    """One block, token by token; `gumbel`: a list for each pass. For "confidence" and "entropy"."""
    n = len(uniform)
    ids: list[int | None] = [None] * n
    for i in range(passes):
        shown = torch.tensor([[x is not None for x in ids]])
        distribution = head.log_probs(small_call(1), torch.tensor([[x or 0 for x in ids]]), shown)[0]
        hidden = [k for k in range(n) if ids[k] is None]
        drawn = {k: int(inverse_cdf_sample(distribution[k], torch.tensor(uniform[k]))) for k in hidden}
        if head.config.unmasking == "confidence":
            heat = head.config.gumbel_temperature * (passes - 1 - i) / passes
            hidden.sort(key=lambda k: -float(distribution[k, drawn[k]]) - heat * gumbel[i][k])
            size = reveal_sizes(n, passes, head.config.schedule)[i]
        else:
            entropy = {k: -float((distribution[k].exp() * distribution[k]).sum()) for k in hidden}
            hidden.sort(key=lambda k: entropy[k])
            size = 1
            while size < len(hidden) and sum(entropy[k] for k in hidden[:size]) <= head.config.entropy_bound:
                size += 1
            size = max(size, math.ceil(len(hidden) / (passes - i)))
        for k in hidden[:size]:
            ids[k] = drawn[k]
        if None not in ids:
            break
    return [int(x) for x in ids if x is not None]


# ---- drawing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_pass_samples_from_its_log_q() -> None:
    num = 200_000
    head, call, u = masked_head(), small_call(num), uniforms(num, K, Key(5))
    draft = head.sample(call, u, Key(0))
    assert call.passes == 1 and draft.log_q is not None and draft.log_q.dtype == torch.float64
    everything = all_blocks(K)
    distributions = head.conditionals(small_call(len(everything)), everything)
    distribution = distributions.gather(-1, everything.unsqueeze(-1)).squeeze(-1).sum(-1).exp()
    assert (
        abs(float(distribution.sum()) - 1) < 1e-12
        and float((distribution - 1 / len(distribution)).abs().sum() / 2) > 0.2
    )
    assert total_variation(draft.ids, distribution) < 0.01
    assert (distributions[0] - draft.log_q[0]).abs().max() < 1e-12 and torch.equal(
        draft.ids, inverse_cdf_sample(draft.log_q, u)
    )


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_passes_have_the_mean_distribution_over_orders(schedule: str) -> None:
    num = 100_000
    head, everything, u = masked_head(4, schedule=schedule), all_blocks(4), uniforms(num, 4, Key(6))
    distributions = {}
    for passes in (1, 2, 4):
        distributions[passes] = ancestral_distribution(head, small_call(len(everything)), everything, passes)
        assert abs(float(distributions[passes].sum()) - 1) < 1e-10
        call = small_call(num)
        draft = head.sample(call, u, Key(1), passes)
        assert call.passes == passes and (draft.log_q is None) == (passes > 1)
        assert total_variation(draft.ids, distributions[passes]) < 0.016  # exact samples: .01
    assert all((distributions[4] - distributions[n]).abs().sum() / 2 > 0.05 for n in (1, 2)), (
        "passes of this head differ"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"unmasking": "confidence", "gumbel_temperature": 0.0},
        {"unmasking": "confidence", "gumbel_temperature": 0.8, "schedule": "cosine"},
        {"unmasking": "entropy", "entropy_bound": 0.7},
        {"unmasking": "entropy", "entropy_bound": 0.0},
    ],
)
def test_confident_and_certain_tokens_first(options: dict[str, object]) -> None:
    rows, n = 40, 5
    head, u = masked_head(n, **options), uniforms(rows, n, Key(2))
    draws = torch.stack([Key(0).fold("confidence", i).uniform((rows, n), torch.float64) for i in range(n)], 1)
    gumbel, found_orders = (-(-draws.log()).log()).tolist(), set()
    for passes in range(1, n + 1):
        call = small_call(rows)
        found = head.sample(call, u, Key(0), passes).ids
        assert found.tolist() == [
            draw_slowly(head, row, passes, noise) for row, noise in zip(u.tolist(), gumbel, strict=True)
        ]
        assert call.passes <= passes and (call.passes == passes or options["unmasking"] == "entropy")
        found_orders.add(str(found.tolist()))
    assert len(found_orders) > 1, "passes of this head differ"


@torch.no_grad()
def test_a_large_bound_needs_fewer_passes_and_gumbel_noise_shuffles() -> None:
    rows, n = 500, 4
    u = uniforms(rows, n, Key(2))
    call = small_call(rows)
    free = masked_head(n, unmasking="entropy", entropy_bound=100.0).sample(call, u, Key(0), n)
    assert call.passes == 1 and torch.equal(free.ids, masked_head(n).sample(call, u, Key(0)).ids)
    sharp, loose = (masked_head(n, unmasking="confidence", gumbel_temperature=t) for t in (0.0, 1e6))
    first, other = (sharp.sample(small_call(rows), u, Key(k), 3).ids for k in (0, 1))
    assert torch.equal(first, other), "without noise nothing is keyed"
    first, other = (loose.sample(small_call(rows), u, Key(k), 3).ids for k in (0, 1))
    assert not torch.equal(first, other)


def test_sizes_of_reveals() -> None:
    assert reveal_sizes(8, 3, "linear") == [3, 3, 2] and reveal_sizes(7, 5, "linear") == [2, 2, 1, 1, 1]
    assert reveal_sizes(8, 4, "cosine") == [1, 2, 2, 3] and reveal_sizes(16, 2, "cosine") == [5, 11]
    for num, schedule in itertools.product(range(1, 20), ("linear", "cosine")):
        for passes in range(1, num + 1):
            sizes = reveal_sizes(num, passes, schedule)
            assert len(sizes) == passes and sum(sizes) == num and min(sizes) >= 1


@torch.no_grad()
def test_samples_are_keyed_and_a_function_of_the_uniforms() -> None:
    head, u = masked_head(4), uniforms(300, 4, Key(3))
    for passes in (1, 3):
        ids, again, other = (head.sample(small_call(300), u, Key(k), passes).ids for k in (0, 0, 9))
        assert torch.equal(ids, again) and torch.equal(ids, other) == (passes == 1)
    short, whole = head.sample(small_call(300), u[:, :2], Key(0)), head.sample(small_call(300), u, Key(0))
    assert short.log_q is not None and whole.log_q is not None
    assert torch.equal(short.log_q, whole.log_q[:, :2]), "tokens that nobody asked for are masks, as ever"
    for passes in (0, 5, -1):
        with pytest.raises(ValueError, match=f"passes = {passes} for 4 tokens: this head takes 1 to 4"):
            head.sample(small_call(300), u, Key(0), passes)
    with pytest.raises(ValueError, match="passes = 3 for 2 tokens"):
        head.sample(small_call(300), u[:, :2], Key(0), 3)
    with pytest.raises(ValueError, match="1 to 4 tokens a block, not 5"):
        head.sample(small_call(300), uniforms(300, 5, Key(0)), Key(0))


@torch.no_grad()
def test_with_exact_conditionals_n_passes_sample_the_joint() -> None:
    num = 20_000
    for joint in (equal_pairs("pairs", 2), build_joint("parity4")):
        assert isinstance(joint, Table)
        found = {}
        for passes in range(1, 5):
            ids = oracle_head(joint).sample(OracleCall(joint, num), uniforms(num, 4, Key(1)), Key(2), passes).ids
            everything = torch.tensor(list(itertools.product(range(2), repeat=4)))
            distribution = ancestral_distribution(oracle_head(joint), OracleCall(joint, 16), everything, passes)
            frequency = torch.bincount((ids * torch.tensor([8, 4, 2, 1])).sum(-1), minlength=16) / num
            assert (frequency - distribution).abs().sum() / 2 < 0.02
            found[passes] = float((distribution - joint.full().flatten()).abs().sum() / 2)
        assert found[4] < 1e-12 and found[1] > 0.4 and found[1] >= found[2] - 1e-12 >= found[3] - 2e-12
