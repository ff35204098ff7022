"""The push-forward head against enumeration and against a test oracle, and a head trained briefly.

Legend: B blocks of tokens, K tokens, S numbers of a token's noise, V ids of a task, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from histories import call_behind, text
from torch import Tensor

from eval.experiments.joint.training import Budget, head_of, toy_batch, toy_call, toy_model, train, uniforms
from omni.heads.joint import JointConfig, LossInputs, build_head
from omni.heads.joint.noise_kinds import NoiseKind
from omni.heads.joint.push_forward import PushForward, block_bound, build_targets, semigroup_targets, terms_of
from omni.heads.joint.training import BatchCall, teacher_log_probs
from omni.model import Omni
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample, uniform_interval
from omni.sequence.placeholders import Blocks

KINDS: tuple[NoiseKind, ...] = ("uniform", "tree", "gumbel")


# ---- an oracle behind the contract ---------------------------------------------------------------------------------


@dataclass
class OracleCall:
    """A perfectly trained backbone: its categorical output is the true chain, its decode output the token of the noise.
    Hidden states are [logits of C (V), logits of O (V), two scratch numbers]."""

    joint: Tensor  # (V,) * K
    noise: Tensor  # placeholders hold it unchanged
    rows: int
    passes: int = 0

    @property
    def start(self) -> Tensor:
        return self._hidden(torch.zeros(self.rows, 0, dtype=torch.int64))

    def __call__(self, inputs: Tensor, causal: bool = True, clean: int = 0) -> Tensor:
        self.passes += 1
        ids, out = torch.zeros(self.rows, 0, dtype=torch.int64), [self.start]
        for j in range(inputs.shape[1]):
            distribution = out[-1][:, : self.joint.shape[0]]
            now = inputs[:, j, 0].long() if j < clean else inverse_cdf_sample(distribution, inputs[:, j, 1])
            ids = torch.cat([ids, now.unsqueeze(-1)], 1)
            out.append(self._hidden(ids))
        return torch.stack(out, 1)

    def _hidden(self, ids: Tensor) -> Tensor:
        V, K = self.joint.shape[0], self.joint.ndim
        mass = self.joint[tuple(ids.T)].reshape(self.rows, *self.joint.shape[ids.shape[1] :]) if ids.shape[1] else (
            self.joint.expand(self.rows, *self.joint.shape)
        )  # fmt: skip
        distribution = (
            torch.full((self.rows, V), 1 / V) if ids.shape[1] == K else mass.reshape(self.rows, V, -1).sum(-1)
        )
        own = torch.nn.functional.one_hot(ids[:, -1], V) * 80.0 if ids.shape[1] else torch.zeros(self.rows, V)
        return torch.cat(
            [distribution.double().log().clamp(min=-99), own.double(), torch.zeros(self.rows, 2).double()], -1
        )

    def embed(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids.unsqueeze(-1).double(), (0, 2 * self.joint.shape[0] + 1))

    def read(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.joint.shape[0]]

    def read_all(self, hidden: Tensor) -> Tensor:
        return self.read(hidden)

    def target(self) -> OracleCall:
        return self


def oracle_head(V: int, K: int, **options: object) -> PushForward:
    """Placeholders hold the uniform in their second number; the decode matrix selects O's logits instead of C's."""
    head = build_head("push_forward", options, K, V, 2 * V + 2).double()
    assert isinstance(head, PushForward)
    head.noise.embed = lambda noise: torch.nn.functional.pad(noise, (1, 2 * V))
    with torch.no_grad():
        head.decoder.zero_()
        head.decoder[:V, V : 2 * V] = torch.eye(V)
        head.decoder[:V, :V] = -torch.eye(V)
    return head


def _joint(V: int, K: int) -> Tensor:
    p = Key(4).uniform((V,) * K, torch.float64) ** 4
    return p / p.sum()


def test_with_an_oracle_every_number_of_passes_equals_autoregressive_decoding() -> None:
    V, K, N = 3, 4, 500
    call, u = OracleCall(_joint(V, K), torch.zeros(0), N), uniforms(N, K, Key(0))
    plain = torch.zeros(N, 0, dtype=torch.int64)
    for k in range(K):
        plain = torch.cat([plain, inverse_cdf_sample(call._hidden(plain)[:, :V], u[:, k]).unsqueeze(-1)], 1)
    for options in ({}, {"first": "decode"}, {"mode": "categorical"}):
        head = oracle_head(V, K, **options)
        for passes in (1, 2, 4):
            draft = head.sample(call, u, Key(1), passes)
            assert torch.equal(draft.ids, plain)
            assert (draft.log_q is None) == ("mode" not in options)
            if draft.log_q is not None:
                assert torch.equal(inverse_cdf_sample(draft.log_q, u), plain)


def test_losses_of_an_oracle_are_its_entropy_and_zero() -> None:
    V, K, N = 3, 4, 2000
    joint = _joint(V, K)
    call, u = OracleCall(joint, torch.zeros(0), N), uniforms(N, K, Key(0))
    ids = oracle_head(V, K).sample(call, u, Key(0)).ids
    teacher = torch.stack([call._hidden(ids[:, :k])[:, :V].log_softmax(-1) for k in range(K)], 1)
    blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.bool), tuple((n, 0, 0) for n in range(N)))
    for step in range(3):  # both cuts of the semigroup
        for intervals in ("teacher", "own"):
            head = oracle_head(V, K, semigroup_share=0.4, intervals=intervals)
            terms = head.loss(call, LossInputs(blocks, teacher, Key(step)))
            assert all(float(terms[name].sum.detach()) < 1e-9 for name in ("decode", "semigroup"))
            assert terms["decode"].count + terms["semigroup"].count == N * K
            assert abs(terms["semigroup"].count / (N * K) - 0.4) < 0.05
            entropy = float(terms["categorical"].sum.detach()) / terms["categorical"].count * (K - 1)
            first = joint.reshape(V, -1).sum(-1)
            expected = float(-(joint * joint.log()).sum() + (first * first.log()).sum())
            assert abs(entropy - expected) < 0.15
    wrong = replace(call, joint=joint.flip(0))
    call.target = lambda: wrong  # type: ignore[method-assign]
    terms = oracle_head(V, K).loss(call, LossInputs(blocks, teacher, Key(0)))
    assert float(terms["semigroup"].sum.detach()) > 1.0


def test_the_semigroup_is_cut_in_both_ways_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a run has no step in it: the documents of a batch decide where its blocks are cut."""
    V, K = 3, 4
    head, call, seen = oracle_head(V, K), OracleCall(_joint(V, K), torch.zeros(0), 2), set()
    sample_in_passes = head.sample_in_passes

    def listening(*arguments: Any) -> Any:
        seen.add(tuple(arguments[2]))
        return sample_in_passes(*arguments)

    monkeypatch.setattr(head, "sample_in_passes", listening)
    ids = torch.zeros(2, K, dtype=torch.int64)
    for step in range(16):
        blocks = Blocks(ids, ids == 0, ((step, 0, 0), (step, 0, 1)))
        noise = uniforms(2, K, Key(step)).unsqueeze(-1)
        semigroup_targets(head, call, noise, LossInputs(blocks, torch.zeros(0), Key(3)))
    assert seen == {(1, 3), (2, 2)}


# ---- the head on a small model -------------------------------------------------------------------------------------


def tiny(K: int, V: int, seed: int = 0, **options: object) -> tuple[Omni, PushForward]:
    """A model of width 16 in float64; probabilities are far from uniform and the head is not at its start."""
    config = JointConfig(head="push_forward", length=K, adapter_rank=2, options=options)
    model = toy_model(config, V, Key(seed), width=16, depth=1).double().eval()
    with torch.no_grad():
        model.token.embedding.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if ".up." in name or "decoder" in name or "placeholder" in name:
                draws = Key(seed).fold("alive", name).normal(tuple(parameter.shape), torch.float64)
                parameter.copy_(draws * (1.0 if ".up." in name else 0.3))
    head = head_of(model)
    assert isinstance(head, PushForward)
    return model, head


def lesson(model: Omni, ids: Tensor, key: Key, valid: Tensor | None = None) -> tuple[BatchCall, LossInputs]:
    batch, starts, blocks = toy_batch(torch.zeros(len(ids), 0, dtype=torch.int64), ids, model.config.vocab_size - 1)
    if valid is not None:
        blocks = replace(blocks, valid=valid)
    hidden, memory = model.context(batch)
    call = BatchCall(model, starts, hidden, memory)
    return call, LossInputs(blocks, teacher_log_probs(model, hidden, starts, blocks), key)


def empty(rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def exact_distribution(model: Omni, head: PushForward, K: int, grid: int) -> Tensor:
    """(V^K,) distribution of categorical mode in one pass, uniform noise: the volume of the noise of each block, by
    midpoints of the interval of every token, token by token."""
    V = head.vocab_size
    noise, mass, code = torch.zeros(1, 0, 1).double(), torch.ones(1).double(), torch.zeros(1, dtype=torch.int64)
    for k in range(K):
        call = toy_call(model, empty(len(noise)), K)
        hidden = call(head.placeholders(noise, call))[:, -1] if k else call.start
        distribution = call.read(hidden).double().log_softmax(-1)
        steps = grid if k < K - 1 else 1
        middle = (torch.arange(steps).double() + 0.5) / steps
        rows = torch.arange(len(noise)).repeat_interleave(V * steps)
        ids = torch.arange(V).repeat_interleave(steps).repeat(len(noise))
        lower, width = uniform_interval(distribution[rows], ids)
        u = lower + width * middle.repeat(len(noise) * V)
        noise = torch.cat([noise[rows], u.view(-1, 1, 1)], 1)
        mass, code = mass[rows] * width / steps, code[rows] * V + ids
    return torch.zeros(V**K).double().index_add(0, code, mass)


def all_blocks(V: int, K: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(V)] * K)


@torch.no_grad()
def test_bounds_are_ordered_below_the_exact_log_probability() -> None:
    """Enumeration of V^K blocks: probabilities by volumes of noise = the histogram of samples; ELBO < IWAE < the exact
    log."""
    K, V = 3, 3
    model, head = tiny(K, V - 1, frequencies=1, mode="categorical", num_samples=32)
    distribution = exact_distribution(model, head, K, 24)
    assert abs(float(distribution.sum()) - 1) < 1e-12
    N = 40000
    ids = head.sample(toy_call(model, empty(N), K), uniforms(N, K, Key(0)), Key(0)).ids
    code = (ids * V ** torch.arange(K - 1, -1, -1)).sum(-1)
    assert (torch.bincount(code, minlength=V**K) / N - distribution).abs().sum() / 2 < 0.015
    everything = all_blocks(V, K).repeat(20, 1)
    call = toy_call(model, empty(len(everything)), K)
    found = {M: block_bound(head, call, everything, Key(5), M).view(20, -1) for M in (1, 8, 32)}
    means = {M: (distribution * value.mean(0)).sum() for M, value in found.items()}
    errors = {M: (distribution**2 * value.var(0) / 20).sum().sqrt() for M, value in found.items()}
    exact = (distribution * distribution.log()).sum()
    assert means[1] + 4 * errors[1] < means[8] and means[8] + 3 * errors[8] < means[32] + 1e-3
    assert means[32] < exact + 4 * errors[32] and exact - means[32] < 0.2 * (exact - means[1])
    assert (found[32].exp().mean(0) / distribution - 1).abs().max() < 0.15, "the mean of q itself has no bias"
    stated = head.log_prob(call, everything, Key(5))
    assert stated.kind == "bound" and torch.equal(stated.value.view(20, -1), found[32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intervals", ["teacher", "own"])
def test_gradients_against_central_differences(kind: NoiseKind, intervals: str) -> None:
    """Of `loss`, against differences of the same pass with fixed noise and targets."""
    target = {"categorical_target": "teacher"} if intervals == "teacher" else {"decay": 0.8}
    model, head = tiny(3, 4, noise=kind, intervals=intervals, semigroup_share=0.5, **target)
    ids = Key(3).uniform((6, 3)).mul(4).long()
    call, given = lesson(model, ids, Key(1))

    def total(terms: dict) -> Tensor:
        return sum((t.weight * t.sum for t in terms.values()), torch.zeros(()))

    task = build_targets(head, call, given)
    assert task.fresh.any() and not task.fresh.all()
    names = [name for name, _ in head.named_parameters()] + ["adapter"]
    adapters = model.joint.adapters  # type: ignore[union-attr]
    assert adapters is not None
    tensors = [*head.parameters(), adapters.layers[0].parts["down"].up.weight]  # type: ignore[union-attr]
    found = torch.autograd.grad(total(head.loss(call, given)), tensors)
    with torch.no_grad():
        for name, tensor, gradient in zip(names, tensors, found, strict=True):
            direction = Key(2).fold(name).normal(tuple(tensor.shape), torch.float64)
            sides = []
            for step in (1e-5, -2e-5):
                tensor.add_(step * direction)
                sides.append(float(total(terms_of(head, call, task, given.teacher))))
            tensor.add_(1e-5 * direction)
            expected = (sides[0] - sides[1]) / 2e-5
            assert abs(float((gradient * direction).sum()) - expected) < 1e-5 * max(1.0, abs(expected)), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_valid_prefix_counts_and_an_impossible_token_ends_it(kind: NoiseKind) -> None:
    K = 4
    model, head = tiny(K, 5, noise=kind, semigroup_share=0)
    ids = Key(3).uniform((3, K)).mul(5).long()
    valid = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    call, given = lesson(model, ids, Key(1), valid)
    terms = head.loss(call, given)
    assert (terms["decode"].count, terms["categorical"].count) == (6, 4)
    other = replace(given.blocks, ids=torch.where(valid, ids, (ids + 1) % 5))
    again = head.loss(call, replace(given, blocks=other))
    assert all(torch.equal(terms[name].sum, again[name].sum) for name in terms)
    teacher = given.teacher.clone()
    teacher[1, 2, ids[1, 2]] = -math.inf
    fewer = head.loss(call, replace(given, teacher=teacher))
    assert (fewer["decode"].count, fewer["categorical"].count) == (4, 2)
    assert all(torch.isfinite(term.sum) for term in fewer.values())
    own = build_head("push_forward", {"intervals": "own", "noise": kind}, K, 6, 16).double()
    assert own.loss(call, given)["decode"].count + own.loss(call, given)["semigroup"].count == 6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_counted_and_samples_keyed(kind: NoiseKind) -> None:
    K = 4
    model, head = tiny(K, 5, noise=kind)
    u = uniforms(200, K, Key(0))
    for mode in ("decode", "categorical"):
        head.config = head.config.model_copy(update={"mode": mode})
        for passes in (1, 2, 4):
            call = toy_call(model, empty(200), K)
            first = head.sample(call, u, Key(1), passes)
            assert call.passes == (passes if passes < K else K - 1), "the context's own pass says the first token"
            assert torch.equal(first.ids, head.sample(call, u, Key(1), passes).ids)
            assert torch.equal(first.ids, head.sample(call, u, Key(2), passes).ids) == (kind == "uniform")
            distribution = call.read(call.start).log_softmax(-1)
            noise = head.noise.prior(u, Key(1))
            assert torch.equal(first.ids[:, 0], head.noise.choose(distribution, noise[:, 0]))
            if first.log_q is not None:
                assert torch.equal(head.noise.choose(first.log_q, noise), first.ids)
    plain = empty(200)
    for k in range(K):  # K passes are autoregressive decoding
        call = toy_call(model, plain, 1)
        now = head.noise.choose(call.read(call.start), noise[:, k])
        plain = torch.cat([plain, now.unsqueeze(-1)], 1)
    assert torch.equal(plain, head.sample(toy_call(model, empty(200), K), u, Key(1), K).ids)


@torch.no_grad()
def test_draft_with_a_cache_equals_draft_with_a_batch() -> None:
    model, head = tiny(4, 5)
    u = uniforms(1, 4, Key(0))
    for mode in ("decode", "categorical"):
        head.config = head.config.model_copy(update={"mode": mode})
        for passes in (1, 2):
            behind = call_behind(model, [[text([5, 1])]], [[text([3])]])
            found = head.sample(behind, u, Key(1), passes)
            assert behind.passes == passes
            other = head.sample(toy_call(model, torch.tensor([[1, 3]]), 4), u, Key(1), passes)
            assert torch.equal(found.ids, other.ids)


def test_invalid_requests_name_the_way_out() -> None:
    _, head = tiny(4, 5)
    call = OracleCall(_joint(6, 2), torch.zeros(0), 1)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        head.sample(call, uniforms(1, 5, Key(0)), Key(0))
    with pytest.raises(ValueError, match="passes = 3 for 4 tokens: this head takes a divisor"):
        head.sample(call, uniforms(1, 4, Key(0)), Key(0), 3)
    for options in (
        {"mode": "categorical", "first": "decode"},
        {"semigroup_share": 0, "semigroup_weight": 0.5},
        {"noise": "gumbel", "frequencies": 4},
        {"categorical_weight": 0, "categorical_target": "teacher"},
        {"decode_weight": 0, "categorical_weight": 0, "semigroup_share": 0},
    ):
        with pytest.raises(ValueError, match="leave|set"):
            build_head("push_forward", options, 4, 6, 16)


# ---- trained -------------------------------------------------------------------------------------------------------


def pairs(key: Key, rows: int) -> tuple[Tensor, Tensor]:
    """Two equal tokens of four."""
    first = torch.randint(0, 4, (rows, 1), generator=key.generator())
    return empty(rows), first.expand(rows, 2)


def test_a_trained_head_uses_its_noise() -> None:
    """Equal pairs: any product has TV .5 or more; with the noise of other blocks the head is no better."""
    config = JointConfig(head="push_forward", length=2, adapter_rank=16, options={"semigroup_share": 0.0})
    model = toy_model(config, 4, Key(0), width=32, depth=1)
    budget = Budget(backbone_steps=120, head_steps=200, rows=64, rate=1e-2)
    losses = train(model, pairs, budget, Key(0))
    assert losses["decode"][-1] < 0.3 * losses["decode"][0]
    head, N = head_of(model.eval()), 4000
    assert isinstance(head, PushForward)
    with torch.no_grad():
        call, u = toy_call(model, empty(N), 2), uniforms(N, 2, Key(1))
        for mode in ("decode", "categorical"):
            ids = head.sample_in_passes(call, u.unsqueeze(-1), [2], mode, "pick").ids
            assert (ids[:, 0] == ids[:, 1]).float().mean() > 0.8, mode
            shuffled = call(head.placeholders(u.roll(1, 0).unsqueeze(-1), call))
            if mode == "decode":
                second = head.decode(call, shuffled[:, 2]).argmax(-1)
            else:
                second = inverse_cdf_sample(call.read(shuffled[:, 1]), u[:, 1])
            assert (ids[:, 0] == second).float().mean() < 0.35
