"""The mixture over one number against quadrature, its bounds, and a block that it couples.

Legend: B blocks of tokens, K tokens, V ids, M values of lambda.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from real_model import alive_model
from torch import Tensor

from eval.experiments.joint.training import Budget, head_of, toy_batch, toy_call, toy_model, train, uniforms
from omni.heads.joint import JointConfig, LossInputs
from omni.heads.joint.latent_mixture import LatentMixture
from omni.heads.joint.noise_kinds import uniforms_by_name
from omni.heads.joint.training import BatchCall
from omni.model import Omni
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

K, V = 3, 3


def tiny(**options: object) -> tuple[Omni, LatentMixture]:
    """Width 16, float64; probabilities far from uniform that depend on lambda."""
    model = alive_model("latent_mixture", K, V - 1, 10, 0.5, **{"frequencies": 1, **options})
    head = head_of(model)
    assert isinstance(head, LatentMixture)
    return model, head


def empty(rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def all_blocks() -> Tensor:
    return torch.cartesian_prod(*[torch.arange(V)] * K)


def exact_distribution(model: Omni, head: LatentMixture, grid: int = 4000) -> Tensor:
    """(V^K,): the mean over lambda of a product of distributions, by the midpoint rule."""
    distributions = head.log_probs(toy_call(model, empty(grid), K), (torch.arange(grid).double() + 0.5) / grid).exp()
    return torch.stack([distributions[:, torch.arange(K), ids].prod(-1).mean() for ids in all_blocks()])


@torch.no_grad()
def test_samples_and_bounds_against_the_exact_distribution() -> None:
    model, head = tiny(num_samples=64)
    distribution, N = exact_distribution(model, head), 40000
    assert abs(float(distribution.sum()) - 1) < 1e-12
    marginals = [torch.stack([distribution[all_blocks()[:, k] == v].sum() for v in range(V)]) for k in range(K)]
    product = torch.stack([torch.stack([marginals[k][x] for k, x in enumerate(ids)]).prod() for ids in all_blocks()])
    assert (product - distribution).abs().sum() / 2 > 0.04, "lambda ties the tokens of this head"
    call = toy_call(model, empty(N), K)
    ids = head.sample(call, uniforms(N, K, Key(0)), Key(1)).ids
    assert call.passes == 1
    code = (ids * V ** torch.arange(K - 1, -1, -1)).sum(-1)
    assert (torch.bincount(code, minlength=V**K) / N - distribution).abs().sum() / 2 < 0.015
    rows = all_blocks().repeat(20, 1)
    call, means = toy_call(model, empty(len(rows)), K), {}
    for M in (1, 4, 64):
        offsets = Key(2).fold(M).uniform((len(rows), M), torch.float64)
        value = head.mixture(call, rows, torch.ones_like(rows).bool(), offsets).view(20, -1)
        means[M] = float((distribution * value.mean(0)).sum())
    exact = float((distribution * distribution.log()).sum())
    assert means[1] < means[4] < exact and means[1] < exact - 0.02 and abs(means[64] - exact) < 1e-3
    assert (value.exp().mean(0) - distribution).abs().sum() / 2 < 0.005, "q itself has no bias"
    stated = head.log_prob(call, rows, Key(2))
    assert (
        stated.kind == "bound" and abs(float((distribution * stated.value.view(20, -1).mean(0)).sum()) - exact) < 2e-3
    )


def lesson(model: Omni, ids: Tensor, valid: Tensor) -> tuple[BatchCall, LossInputs]:
    batch, starts, blocks = toy_batch(empty(len(ids)), ids, V - 1)
    call = BatchCall(model, starts, *model.context(batch))
    return call, LossInputs(replace(blocks, valid=valid), torch.zeros(0), Key(5))


def test_the_loss_is_log_mean_exp_over_valid_prefixes_and_its_gradient_is_right() -> None:
    model, head = tiny(num_latents=5)
    ids = Key(3).uniform((4, K)).mul(V).long()
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    call, given = lesson(model, ids, valid)
    term = head.loss(call, given)["latent_mixture"]
    offsets = uniforms_by_name(given.blocks.names, (5,), given.key.fold("latents"))
    expected = 0.0
    for b, length in enumerate((3, 2, 1, 0)):
        mean = 0.0
        for m in range(5):
            distributions = head.log_probs(call, ((m + offsets[:, m]) / 5)).detach()[b]
            mean += math.prod(math.exp(float(distributions[k, ids[b, k]])) for k in range(length)) / 5
        expected -= math.log(mean)
    assert abs(float(term.sum.detach()) - expected) < 1e-4 and term.count == 6
    other = replace(given, blocks=replace(given.blocks, ids=torch.where(valid, ids, (ids + 1) % V)))
    assert torch.equal(head.loss(call, other)["latent_mixture"].sum, term.sum)

    def value() -> Tensor:
        return -head.mixture(call, ids, valid, offsets).sum()

    tensors = dict(head.named_parameters())
    found = torch.autograd.grad(value(), list(tensors.values()))
    assert torch.allclose(
        torch.autograd.grad(term.sum, [head.decoder])[0], dict(zip(tensors, found, strict=True))["decoder"], rtol=1e-5
    )
    with torch.no_grad():
        for (name, tensor), gradient in zip(tensors.items(), found, strict=True):
            direction = Key(2).fold(name).normal(tuple(tensor.shape), torch.float64)
            tensor.add_(1e-5 * direction)
            above = float(value())
            tensor.sub_(2e-5 * direction)
            slope = (above - float(value())) / 2e-5
            tensor.add_(1e-5 * direction)
            assert abs(float((gradient * direction).sum()) - slope) < 1e-6 * max(1.0, abs(slope)), name


@torch.no_grad()
def test_given_lambda_ids_are_sampled_from_log_q() -> None:
    """The requirement of rejection verification: ids are sampled from log_q, and log_q does not depend on the
    uniforms."""
    model, head = tiny()
    call = toy_call(model, empty(50), K)
    u = uniforms(50, K, Key(0))
    for passes in (1, 3):
        call = toy_call(model, empty(50), K)
        draft = head.sample(call, u, Key(1), passes)
        assert call.passes == passes and draft.log_q is not None
        assert torch.equal(inverse_cdf_sample(draft.log_q, u), draft.ids)
        assert torch.equal(head.sample(call, u, Key(1), passes).ids, draft.ids)
    first, other = (head.sample(call, uniforms(50, K, Key(n)), Key(1)) for n in (0, 1))
    assert first.log_q is not None and other.log_q is not None
    assert torch.equal(first.log_q, other.log_q) and not torch.equal(first.ids, other.ids)
    again = head.sample(call, u, Key(2))
    assert again.log_q is not None and not torch.equal(again.log_q, first.log_q)
    short = head.sample(call, u[:, :2], Key(1))
    assert torch.equal(short.ids, first.ids[:, :2]), "fewer tokens are the first of a whole block"
    with pytest.raises(ValueError, match="passes = 2 for 3 tokens: this head takes a divisor"):
        head.sample(call, u, Key(1), 2)
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        head.sample(call, uniforms(50, 4, Key(0)), Key(1))


def test_a_trained_mixture_couples_its_tokens() -> None:
    """Two equal tokens of two: every product has TV .414 or more."""

    def pairs(key: Key, rows: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(0, 2, (rows, 1), generator=key.generator())
        return empty(rows), first.expand(rows, 2)

    config = JointConfig(head="latent_mixture", length=2, adapter_rank=16, options={"num_latents": 4, "frequencies": 1})
    model = toy_model(config, 2, Key(0), width=32, depth=1)
    budget = Budget(backbone_steps=120, head_steps=80, rows=64, rate=1e-2)
    losses = train(model, pairs, budget, Key(0))["latent_mixture"]
    assert sum(losses[-10:]) / 10 < 0.45 < 0.6 < losses[0], "a token costs log 2 / 2 at best, and log 2 under a product"
    with torch.no_grad():
        ids = head_of(model.eval()).sample(toy_call(model, empty(4000), 2), uniforms(4000, 2, Key(1)), Key(2)).ids
    assert (ids[:, 0] == ids[:, 1]).float().mean() > 0.9
    assert abs(float(ids[:, 0].float().mean()) - 0.5) < 0.2
