"""The masked-block head: the cost of passes with exact conditionals, the bound, the loss, and a real model.

Legend: B blocks of tokens, K tokens, V vocabulary, W width, N strings of a joint's support, or samples.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from histories import call_behind, text
from masked_calls import K, OracleCall, ancestral_distribution, masked_head, oracle_head, score_in_order, small_call
from tiny_call import VOCABULARY, WIDTH, all_blocks, codes, lesson_of, tiny_head, worst_gradient_error
from torch import Tensor

from eval.experiments.joint.joints import Table, build_joint
from eval.experiments.joint.lower_bounds import random_step_bounds, total_correlation
from eval.experiments.joint.training import Budget, head_of, toy_call, toy_model, train, uniforms
from omni.heads.joint import JointConfig, build_head
from omni.heads.joint.masked import Masked, draw_masks, mask_count_probs, sets_of, spread_uniforms
from omni.heads.joint.masked_sampling import reveal_sizes
from omni.rng import Key
from omni.sequence.placeholders import Blocks

# ---- with an oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parity8", "equal_pairs4", "sticky4", "permutation4", "permutation5"])
def test_passes_with_exact_conditionals_cost_the_lower_bound(name: str) -> None:
    """The divergence from the joint, in the mean over orders. For parity all orders cost the same, so a few are
    enough."""
    joint = build_joint(name)
    assert isinstance(joint, Table)
    head, call, n = oracle_head(joint), OracleCall(joint, len(joint.p)), joint.length
    few = [Key(k).python().sample(range(n), n) for k in range(3)]
    orders = list(itertools.permutations(range(n))) if n < 6 else few
    lower_bounds = random_step_bounds(joint)
    for passes in range(1, n + 1):
        sizes = reveal_sizes(n, passes, "linear")
        costs = [joint.p @ (joint.p.log() - score_in_order(head, call, joint.ids, tuple(o), sizes)) for o in orders]
        assert abs(float(torch.stack(costs).mean()) - lower_bounds[passes - 1]) < 1e-9
    assert abs(lower_bounds[0] - total_correlation(joint)) < 1e-9 and lower_bounds[-1] < 1e-9 < lower_bounds[0]
    stated = {"parity8": [0.693] * 4 + [0.0] * 4, "equal_pairs4": [2.773, 0.924, 0.462, 0.0]}
    assert all(abs(a - b) < 6e-4 for a, b in zip(lower_bounds, stated.get(name, lower_bounds), strict=True))


@torch.no_grad()
def test_the_bound_of_exact_conditionals_is_the_log_probability() -> None:
    for name in ("poker_s6_dealt", "permutation4", "sticky4"):
        joint = build_joint(name)
        assert isinstance(joint, Table)
        found = oracle_head(joint).log_prob(OracleCall(joint, len(joint.p)), joint.ids, Key(0))
        assert found.kind == "bound" and (found.value - joint.p.log()).abs().max() < 1e-9
        assert abs(float(joint.p @ found.value) + joint.entropy()) < 1e-9


# ---- the bound and the loss ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_bound_is_the_mean_over_orders_and_below_the_log_probability_of_revealing_one_by_one(num: int) -> None:
    head, ids = masked_head(4), all_blocks(num)
    call = small_call(len(ids))
    orders = list(itertools.permutations(range(num)))
    chains = torch.stack([score_in_order(head, call, ids, order, [1] * num) for order in orders])
    distribution = ancestral_distribution(head, call, ids, num)
    bound = head.log_prob(call, ids, Key(0)).value
    assert (bound - chains.mean(0)).abs().max() < 1e-12 and abs(float(distribution.sum()) - 1) < 1e-12
    if num == 1:
        assert (bound - distribution.log()).abs().max() < 1e-12
    else:
        assert (bound <= distribution.log() + 1e-12).all() and float(distribution @ (distribution.log() - bound)) > 0.01
    one, two = sets_of(200, 4, 2, 2, Key(0))
    assert (one.sum(-1) == 2).all() and 20 < int((one == two).all(-1).sum()) < 50, "alike one time in six"
    few = masked_head(4, num_samples=2)
    keyed = torch.stack([few.log_prob(call, ids, Key(k)).value for k in range(100)])
    assert torch.equal(few.log_prob(call, ids, Key(3)).value, keyed[3])
    error = keyed.std(0) / 10
    assert (keyed.mean(0) - bound).abs().max() < 5 * error.max() + 1e-12
    assert (error.max() > 1e-3) == (num > 2), "of two tokens, sets of m are at most two: nothing is drawn"


def test_numbers_of_masked_tokens_are_those_of_the_diffusion() -> None:
    times = torch.rand(400_000, 1, dtype=torch.float64, generator=Key(0).generator())
    each = torch.rand(400_000, 6, dtype=torch.float64, generator=Key(1).generator())
    for schedule, share in (("linear", times), ("cosine", torch.cos(math.pi / 2 * times))):
        number = (each < share).sum(-1)
        counts = torch.bincount(number, minlength=7)[1:].double()
        distribution = mask_count_probs(6, schedule)  # type: ignore[arg-type]
        assert (counts / counts.sum() - distribution).abs().max() < 0.003 and abs(float(distribution.sum()) - 1) < 1e-12
    assert (mask_count_probs(6, "cosine")[-1] > 0.3) and mask_count_probs(1, "cosine").tolist() == [1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_masks_of_valid_prefixes(schedule: str) -> None:
    rows, n = 6000, 4
    lengths = [0, 1, 3, 4] * (rows // 4)
    blocks = lesson_of(torch.ones(rows, n, dtype=torch.int64), lengths).blocks
    masked, weights = draw_masks(blocks, schedule, Key(0))  # type: ignore[arg-type]
    assert not (masked & ~blocks.valid).any()
    for length in (1, 3, 4):
        mine = torch.tensor(lengths) == length
        distribution, number = mask_count_probs(length, schedule), masked[mine].sum(-1)  # type: ignore[arg-type]
        assert (number >= 1).all() and (weights[mine] - 1 / (number * distribution[number - 1])).abs().max() < 1e-12
        assert (torch.bincount(number, minlength=length + 1)[1:] / mine.sum() - distribution).abs().max() < 0.02
        for m in range(1, length + 1):
            rows_of_m = masked[mine][number == m]
            sets = codes(rows_of_m.long()).unique(return_counts=True)[1]
            assert len(sets) == math.comb(length, m)
            assert (sets / len(rows_of_m) - 1 / len(sets)).abs().max() < 0.1
    nothing = torch.tensor(lengths) == 0
    assert not masked[nothing].any() and (weights[nothing] == 0).all()


def test_the_loss_is_the_bound_in_the_mean() -> None:
    """4000 names of one block: its loss is an unbiased estimate of the bound, for every schedule and for a prefix
    too."""
    rows, n, block = 4000, 4, torch.tensor([2, 0, 1, 1])
    for length, schedule in itertools.product((4, 3), ("linear", "cosine")):
        head = masked_head(n, schedule=schedule)
        lesson = lesson_of(block.expand(rows, n), [length] * rows)
        term = head.loss(small_call(rows), lesson)["masked"]
        assert term.count == rows * length and term.sum.dtype == torch.float64
        bound = float(head.log_prob(small_call(1), block[None, :length], Key(0)).value)
        masked, weights = draw_masks(lesson.blocks, head.config.schedule, lesson.key)
        distribution = head.log_probs(small_call(rows), lesson.blocks.ids, lesson.blocks.valid & ~masked).detach()
        score = distribution.gather(-1, lesson.blocks.ids.unsqueeze(-1)).squeeze(-1)
        each = -torch.where(masked, score, 0.0).sum(-1) * weights
        assert abs(float(each.sum() - term.sum.detach())) < 1e-8 * rows
        assert abs(float(each.mean()) + bound) < 4 * float(each.std()) / math.sqrt(rows)


def test_terms_of_a_block_depend_on_its_name_alone() -> None:
    ids = torch.randint(0, VOCABULARY, (12, K), generator=Key(1).generator())
    head, lengths = masked_head(), [3, 2, 1, 3, 0, 3] * 2
    whole = lesson_of(ids, lengths)

    def part(rows: list[int]) -> Tensor:
        blocks = whole.blocks
        mine = Blocks(blocks.ids[rows], blocks.valid[rows], tuple(blocks.names[r] for r in rows))
        term = head.loss(small_call(len(rows)), replace(whole, blocks=mine))["masked"]
        assert term.count == sum(lengths[r] for r in rows)
        return term.sum.detach()

    total = part(list(range(12)))
    assert abs(float(part([11, 0, 7, 5]) + part([1, 2, 3, 4, 6, 8, 9, 10]) - total)) < 1e-10
    beyond = replace(whole.blocks, ids=torch.where(whole.blocks.valid, whole.blocks.ids, 2))
    assert torch.equal(head.loss(small_call(12), replace(whole, blocks=beyond))["masked"].sum.detach(), total)
    assert abs(float(head.loss(small_call(12), replace(whole, key=Key(4)))["masked"].sum.detach() - total)) > 1e-3


def test_numbers_are_spread_over_the_names_of_a_step() -> None:
    names = tuple((uid, 17, 0) for uid in range(1000, 1256))
    for k in range(20):
        u = spread_uniforms(names, Key(k))
        assert (torch.histc(u, 16, 0, 1) - 16).abs().max() <= 2, "independent ones are out by 9 or so"
        assert torch.equal(u[10:12], spread_uniforms(names[10:12], Key(k)))
    one = torch.cat([spread_uniforms(((-3, 5, 0),), Key(k)) for k in range(4000)])
    assert ((one >= 0) & (one < 1)).all() and (torch.histc(one, 8, 0, 1) / 500 - 1).abs().max() < 0.2
    python = Key(0).python()
    scattered = tuple((python.randrange(1 << 40), python.randrange(5000), 0) for _ in range(4000))
    assert (torch.histc(spread_uniforms(scattered, Key(0)), 8, 0, 1) / 500 - 1).abs().max() < 0.2


def test_gradients() -> None:
    head, ids = masked_head(4), torch.randint(0, VOCABULARY, (9, 4), generator=Key(3).generator())

    def value() -> Tensor:
        term = head.loss(small_call(9), lesson_of(ids, [4, 3, 2, 1, 4, 4, 3, 4, 0]))["masked"]
        return term.sum / term.count

    assert all(float(g.abs().max()) > 1e-3 for g in torch.autograd.grad(value(), list(head.parameters())))
    assert worst_gradient_error(head, value) < 1e-7


# ---- options, and a real model -------------------------------------------------------------------------------------


def test_flags_and_options() -> None:
    head = masked_head()
    assert head.layout == "block" and head.order == "any" and head.conditional
    assert not head.universal and not head.exact and not head.needs_teacher
    for options, match in (
        ({"gumbel_temperature": 1.0}, 'no effect unless unmasking is "confidence"'),
        ({"unmasking": "confidence", "entropy_bound": 0.1}, 'no effect unless unmasking is "entropy"'),
        ({"unmasking": "random"}, "random"),
        ({"schedule": "cosin"}, "cosin"),
        ({"num_samples": 0}, "num_samples"),
    ):
        with pytest.raises(ValueError, match=match):
            build_head("masked", options, 3, VOCABULARY, WIDTH)
    one, again, other = (tiny_head("masked", 3, seed, size=0.0).parameters() for seed in (0, 0, 1))
    one, again, other = list(one), list(again), list(other)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)) and not torch.equal(one[0], other[0])


def test_probabilities_with_a_cache_equal_those_with_a_batch() -> None:
    n, V = 3, 4
    model = toy_model(JointConfig(head="masked", length=n, adapter_rank=2), V, Key(0), width=16, depth=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name or "embedding" in name:
                parameter.copy_(Key(0).fold("alive", name).normal(tuple(parameter.shape), torch.float64) * 0.5)
    prefix, ids = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[0, 1, 2], [3, 4, 1]])
    head, model = head_of(model), model.eval()
    assert isinstance(head, Masked)
    with torch.inference_mode():
        shown = torch.tensor([[True, False, True], [False, False, False]])
        beside = head.log_probs(toy_call(model, prefix, n), ids, shown)
        behind = call_behind(
            model, [[text([V, a])] for a, _ in prefix.tolist()], [[text([b])] for _, b in prefix.tolist()]
        )
        assert (head.log_probs(behind, ids, shown) - beside).abs().max() < 1e-9
        assert (beside - head.log_probs(toy_call(model, prefix, n), ids, ~shown)).abs().max() > 1e-2
        for passes in (1, 2, 3):
            before = behind.passes
            head.sample(behind, uniforms(2, n, Key(1)), Key(0), passes)
            assert behind.passes == before + passes


def test_a_trained_head_needs_two_passes_for_two_equal_tokens() -> None:
    def pairs(key: Key, rows: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(0, 2, (rows, 1), generator=key.generator())
        return torch.zeros(rows, 0, dtype=torch.int64), first.expand(rows, 2)

    model = toy_model(JointConfig(head="masked", length=2, adapter_rank=16), 2, Key(0), width=32, depth=1)
    losses = train(model, pairs, Budget(backbone_steps=60, head_steps=140, rows=64, rate=1e-2), Key(0))["masked"]
    assert sum(losses[-10:]) / 10 < 0.38 < 0.6 < losses[0], "log 2 / 2 a token at best"
    found = {}
    with torch.inference_mode():
        for passes in (1, 2):
            call = toy_call(model.eval(), torch.zeros(4000, 0, dtype=torch.int64), 2)
            ids = head_of(model).sample(call, uniforms(4000, 2, Key(1)), Key(2), passes).ids
            found[passes] = float((ids[:, 0] == ids[:, 1]).float().mean())
    assert abs(found[1] - 0.5) < 0.05 and found[2] > 0.97
