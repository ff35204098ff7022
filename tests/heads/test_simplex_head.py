"""The flow map on the simplex on a small model: passes, keys, losses, and a head trained briefly.

test_simplex_exact compares with the exact map of a known joint.

Legend: B blocks of tokens, K tokens, V ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from real_model import alive_model
from torch import Tensor

from eval.experiments.joint.training import Budget, head_of, toy_batch, toy_call, toy_model, train, uniforms
from omni.heads.joint import JointConfig, LossInputs, build_head
from omni.heads.joint.simplex import (
    BlockFlow,
    Simplex,
    block_items,
    build_targets,
    flow_objective,
    jump_times,
    terms_of,
    velocity_of,
)
from omni.heads.joint.training import BatchCall
from omni.model import Omni
from omni.rng import Key
from omni.samplers import SAMPLERS, run_sampler

V = 3


def tiny(length: int = 3, **options: object) -> tuple[Omni, Simplex]:
    """Width 16, float64; probabilities far from uniform that depend on the state and the times."""
    model = alive_model("simplex", length, V - 1, 20, 0.3, **options)
    head = head_of(model)
    assert isinstance(head, Simplex)
    return model, head


def empty(rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def lesson(model: Omni, ids: Tensor, valid: Tensor | None = None, first: int = 0) -> tuple[BatchCall, LossInputs]:
    """Blocks named first, first + 1, ...; `valid` of each counts."""
    batch, starts, blocks = toy_batch(empty(len(ids)), ids, V - 1)
    call = BatchCall(model, starts, *model.context(batch))
    names = tuple((first + n, 0, 0) for n in range(len(ids)))
    blocks = replace(blocks, names=names, valid=blocks.valid if valid is None else valid)
    return call, LossInputs(blocks, torch.zeros(0), Key(5))


def random_ids(rows: int, length: int = 3) -> Tensor:
    return Key(3).uniform((rows, length)).mul(V).long()


@torch.no_grad()
def test_one_pass_is_the_endpoint_of_noise_and_every_step_costs_a_pass() -> None:
    model, head = tiny()
    u, seen = uniforms(6, 3, Key(0)), []
    call, plain = toy_call(model, empty(6), 3), head.log_endpoint

    def watched(call: BatchCall, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append((x, t, s, plain(call, x, t, s)))
        return seen[-1][-1]

    head.log_endpoint = watched  # type: ignore[method-assign]
    draft = head.sample(call, u, Key(1))
    [(x, t, s, endpoint)] = seen
    assert call.passes == 1 and (t == 1).all() and (s == 0).all()
    assert torch.equal(endpoint.argmax(-1), draft.ids) and draft.log_q is None and draft.steps == 1
    assert torch.allclose(torch.special.ndtr(x[..., 0]), u) and x.dtype == torch.float64
    for passes in (2, 3, 7):
        for sampler in ("flow_map", "euler"):
            seen.clear()
            head.config = head.config.model_copy(update={"sampler": sampler})
            call = toy_call(model, empty(6), 3)
            ids = head.sample(call, u, Key(1), passes).ids
            assert call.passes == passes == len(seen)
            assert torch.equal(seen[0][0], x)
            grid = [1.0, *(float(entry[1][0]) for entry in seen[1:]), 0.0]
            ends = [float(entry[2][0]) for entry in seen]
            assert ends == pytest.approx(grid[1:] if sampler == "flow_map" else grid[:-1], abs=1e-12)
            assert torch.equal(seen[-1][-1].argmax(-1), ids), "ids are read from the last step's probabilities"
            again = [x]
            for (_, _, _, distribution), (before, after) in zip(
                seen, zip(grid[:-1], grid[1:], strict=True), strict=True
            ):
                again.append(after / before * again[-1] + (1 - after / before) * head.scale * distribution.exp())
            assert all(torch.allclose(a, b[0], atol=1e-12) for a, b in zip(again, seen, strict=False))


@torch.no_grad()
def test_samples_are_keyed_and_depend_on_noise_and_times() -> None:
    model, head = tiny()
    call, u = toy_call(model, empty(300), 3), uniforms(300, 3, Key(0))
    ids = head.sample(call, u, Key(1), 2).ids
    assert torch.equal(head.sample(call, u, Key(1), 2).ids, ids)
    assert not torch.equal(head.sample(call, u, Key(2), 2).ids, ids)
    assert not torch.equal(head.sample(call, uniforms(300, 3, Key(9)), Key(1), 2).ids, ids)
    assert head.sample(call, u[:, :2], Key(1)).ids.shape == (300, 2)
    x = Key(4).normal((300, 3, V), torch.float64)
    half, zero = torch.full((300,), 0.5).double(), torch.zeros(300).double()
    endpoint = head.log_endpoint(call, x, half, zero)
    assert (endpoint - head.log_endpoint(call, x, half, half)).abs().max() > 0.01
    assert (endpoint - head.log_endpoint(call, x, half + 0.4, zero)).abs().max() > 0.01
    moved = x.clone()
    moved[:, 2] += 1
    assert (endpoint - head.log_endpoint(call, moved, half, zero))[:, 0].abs().max() > 0.01, "all see one another"


def test_initial_head_equals_the_model() -> None:
    model = toy_model(JointConfig(head="simplex", length=2, adapter_rank=2), V, Key(0), width=16, depth=1)
    head = head_of(model)
    assert isinstance(head, Simplex) and not head.decoder.any() and head.enter.weight.any()
    call, x, t = toy_call(model, empty(2), 2), Key(0).normal((2, 2, V + 1)), torch.full((2,), 0.5)
    read = call.read(call(head.placeholders(call, x, t, t), causal=False)[:, 1:]).log_softmax(-1)
    assert torch.equal(head.log_endpoint(call, x, t, t), read)


# ---- losses --------------------------------------------------------------------------------------------------------


def worst_slope(head: Simplex, value: Callable[[], Tensor], found: dict[str, Tensor]) -> float:
    """Gradients `found` against central differences of `value` along a random direction of each parameter."""
    worst = 0.0
    with torch.no_grad():
        for name, tensor in head.named_parameters():
            direction = Key(2).fold(name).normal(tuple(tensor.shape), torch.float64)
            tensor.add_(1e-5 * direction)
            above = float(value())
            tensor.sub_(2e-5 * direction)
            slope = (above - float(value())) / 2e-5
            tensor.add_(1e-5 * direction)
            worst = max(worst, abs(float((found[name] * direction).sum()) - slope) / max(1.0, abs(slope)))
    return worst


def gradients(head: Simplex, value: Tensor) -> dict[str, Tensor]:
    tensors = dict(head.named_parameters())
    return dict(zip(tensors, torch.autograd.grad(value, list(tensors.values())), strict=True))


def test_the_gradient_is_that_of_the_loss_with_its_targets_held() -> None:
    model, head = tiny(semigroup_share=0.6)
    call, given = lesson(model, random_ids(8))
    task = build_targets(head, call, given)
    assert 0 < task.jumps.sum() < 8 and not task.probs.requires_grad

    def value() -> Tensor:
        terms = terms_of(head, call, task)
        return terms["diagonal"].sum + terms["semigroup"].sum

    terms = head.loss(call, given)
    assert torch.equal(terms["diagonal"].sum + terms["semigroup"].sum, value())
    assert worst_slope(head, value, gradients(head, value())) < 1e-6


def test_jumps_start_at_semigroup_from() -> None:
    """Jumps are a share of blocks; half of them end at 0, half of those start from noise."""
    model, head = tiny(semigroup_share=0.6, semigroup_from=0.3)
    for progress, passes in ((0.29, 1), (0.3, 3)):
        call, given = lesson(model, random_ids(8))
        terms = head.loss(call, replace(given, progress=progress))
        jumps = build_targets(head, call, replace(given, progress=progress)).jumps
        assert terms["semigroup"].count == 3 * jumps.sum() and bool(jumps.any()) == (progress == 0.3)
        own, asked = lesson(model, random_ids(8))[0], []
        own.target = lambda asked=asked, own=own: asked.append(1) or own  # type: ignore[method-assign]
        head.loss(own, replace(given, progress=progress))
        assert own.passes == passes and len(asked) == (passes == 3)
    t, m, s, jumps = jump_times(head, Key(0).uniform((20000, 6), torch.float64), 0.6)
    assert abs(float(jumps.double().mean()) - 0.6) < 0.02 and torch.equal(t[~jumps], s[~jumps])
    assert (t > m)[jumps].all() and (m > s)[jumps].all() and s.min() == 0 and t.max() == 1
    assert abs(float((s[jumps] == 0).double().mean()) - 0.5) < 0.02
    assert abs(float((t[jumps] == 1).double().mean()) - 0.25) < 0.02 and (s[t == 1] == 0).all()


@pytest.mark.parametrize("name", ["flow_matching", "shortcut", "consistency_trajectory"])
def test_the_frameworks_objectives_train_the_head(name: str) -> None:
    """Value and gradient through the head's F, against the objective on a network with a copy as its target."""
    options = {"shortcut": {"bootstrap": 0.6, "num_levels": 2}}.get(name, {})
    model, head = tiny(objective=name, objective_options=options)
    call, given = lesson(model, random_ids(8))
    terms = head.loss(call, given)
    assert set(terms) == {name} and terms[name].count == 8 * 3 and float(terms[name].sum.detach()) > 0
    other, held = tiny(objective=name, objective_options=options)[0], copy.deepcopy(head)
    items, _ = block_items(head, given, torch.float64)
    assert head.objective is not None
    draw = head.objective.draw(items, given.key)
    still = velocity_of(held, lesson(other, random_ids(8))[0])

    class Held(BlockFlow):
        def target(self, graph: bool = False) -> BlockFlow:
            return BlockFlow(still, lambda: still)

    def value() -> Tensor:
        assert head.objective is not None
        return head.objective.loss(Held(velocity_of(head, call), lambda: still), draw).sum

    assert torch.allclose(value(), terms[name].sum, rtol=1e-12)
    assert worst_slope(head, value, gradients(head, head.loss(call, given)[name].sum)) < 1e-6


@torch.no_grad()
def test_f_has_the_jumps_of_the_endpoint() -> None:
    """Jumps of F end where those of D do; below min_time F is finite."""
    model, head = tiny(objective="shortcut", min_time=0.1)
    call, x = toy_call(model, empty(5), 3), Key(0).normal((5, 3, V), torch.float64)
    t, s = torch.linspace(0.2, 0.9, 5).double(), torch.linspace(0.0, 0.5, 5).double()
    distribution, F = head.log_endpoint(call, x, t, s).exp(), velocity_of(head, call)(x, t, s)
    kept = (s / t).view(-1, 1, 1)
    assert torch.allclose(x - (t - s).view(-1, 1, 1) * F, kept * x + (1 - kept) * head.scale * distribution)
    assert velocity_of(head, call)(x, t * 0, s * 0).isfinite().all()
    at_times = lambda x, t, s: velocity_of(head, call)(x, t + 0 * x[:, 0, 0], s + 0 * x[:, 0, 0])  # noqa: E731
    *_, last = run_sampler(SAMPLERS.get("flow_map"), at_times, x, [1.0, 0.0])
    one = torch.ones(5).double()
    assert torch.allclose(last.x, head.scale * head.log_endpoint(call, x, one, 0 * one).exp())


@pytest.mark.parametrize("objective", ["simplex", "shortcut"])
def test_losses_are_keyed_by_block_for_any_packing(objective: str) -> None:
    model, head = tiny(objective=objective)
    ids = random_ids(8)
    whole = head.loss(*lesson(model, ids))
    parts = [head.loss(*lesson(model, ids[n : n + 3], first=n)) for n in (0, 3, 6)]
    for name, term in whole.items():
        assert torch.allclose(term.sum, sum((p[name].sum for p in parts), term.sum * 0), rtol=1e-12)
        assert term.count == sum(p[name].count for p in parts)
        assert torch.equal(head.loss(*lesson(model, ids))[name].sum, term.sum)
    call, given = lesson(model, ids)
    assert any(not torch.equal(head.loss(call, replace(given, key=Key(6)))[n].sum, t.sum) for n, t in whole.items())


@pytest.mark.parametrize("objective", ["simplex", "shortcut"])
def test_a_short_block_repeats_its_last_id(objective: str) -> None:
    model, head = tiny(objective=objective)
    ids = random_ids(4)
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    found = head.loss(*lesson(model, ids, valid))
    assert sum(term.count for term in found.values()) == 9, "the block without ids counts for nothing"
    other = head.loss(*lesson(model, torch.where(valid, ids, (ids + 1) % V), valid))
    longer = ids.clone()
    longer[1, 2], longer[2, 1:] = ids[1, 1], ids[2, 0]
    full = head.loss(*lesson(model, longer[:3]))
    for name, term in found.items():
        assert torch.equal(term.sum, other[name].sum), "ids past the end are not read"
        assert torch.allclose(term.sum, full[name].sum, rtol=1e-12) and term.count == full[name].count
    nothing = head.loss(*lesson(model, ids, torch.zeros_like(valid)))
    assert all(term.count == 0 and float(term.sum.detach()) == 0 for term in nothing.values())


def test_unsupported_calls_and_options_are_refused() -> None:
    model, head = tiny()
    call, u = toy_call(model, empty(2), 3), uniforms(2, 3, Key(0))
    assert (head.universal, head.exact, head.order, head.layout) == (True, False, "any", "block")
    with pytest.raises(NotImplementedError, match="no likelihood"):
        head.log_prob(call, random_ids(2), Key(0))
    with pytest.raises(NotImplementedError, match="no conditionals"):
        head.conditionals(call, random_ids(2))
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        head.sample(call, uniforms(2, 4, Key(0)), Key(0))
    with pytest.raises(ValueError, match="passes = 0 for 3 tokens: this head takes 1 or more"):
        head.sample(call, u, Key(0), 0)
    for options, message in (
        ({"objective": "mean_flow"}, "needs derivatives"),
        ({"objective": "terminal_velocity"}, "guidance"),
        ({"objective": "shortcut", "objective_options": {"guidance_scale": 2.0}}, "null contexts"),
        ({"objective": "shortcut", "objective_options": {"target_decay": 0.99}}, "target_decay = 0.99"),
        ({"objective": "shortcut", "objective_options": {"levels": 2}}, "levels"),
        ({"objective": "short_cut"}, "did you mean 'shortcut'"),
        ({"objective": "next_token"}, "not a flow objective"),
        ({"objective": "shortcut", "semigroup_share": 0.5}, "semigroup_share has no effect"),
        ({"min_time": 0.1}, "min_time has no effect"),
        ({"semigroup_share": 0, "semigroup_weight": 1.0}, "semigroup_weight has no effect"),
        ({"semigroup_share": 0, "semigroup_from": 0.5}, "semigroup_from has no effect"),
        ({"scale": 0.0}, "scale"),
    ):
        with pytest.raises(ValueError, match=message):
            build_head("simplex", options, 3, V, 16)
    assert flow_objective("shortcut", {}).target_decay is None  # type: ignore[attr-defined]
    assert head.objective is None


def test_a_trained_head_couples_its_tokens_in_one_pass() -> None:
    """Two equal tokens of two: every product has TV .414 or more, and half of its samples are equal."""

    def pairs(key: Key, rows: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(0, 2, (rows, 1), generator=key.generator())
        return empty(rows), first.expand(rows, 2)

    config = JointConfig(head="simplex", length=2, adapter_rank=16)
    model = toy_model(config, 2, Key(0), width=32, depth=1)
    train(model, pairs, Budget(backbone_steps=40, head_steps=100, rows=64, rate=1e-2), Key(0))
    with torch.no_grad():
        for passes in (1, 2):
            call = toy_call(model.eval(), empty(4000), 2)
            ids = head_of(model).sample(call, uniforms(4000, 2, Key(1)), Key(2), passes).ids
            assert (ids[:, 0] == ids[:, 1]).float().mean() > 0.9 and (ids < 2).float().mean() > 0.98
            assert abs(float(ids[:, 0].float().mean()) - 0.5) < 0.2
