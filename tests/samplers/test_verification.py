"""Verification: emitted tokens have the distribution of autoregressive decoding, for any draft. A control has not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample, uniform_interval
from omni.samplers.token import token_log_probs
from omni.samplers.verification import block, coupled, rejection

V, K, N = 4, 3, 200_000


def chain(key: Key, sharp: float = 1.5) -> Tensor:
    """Log-probabilities of a random sequence model after k = 0..K tokens: a table (V^k, V) each."""
    return [(key.fold(k).normal((V**k, V), torch.float64) * sharp).log_softmax(-1) for k in range(K + 1)]  # type: ignore


def code(ids: Tensor) -> Tensor:
    """(B, k) -> (B,): prefixes as numbers."""
    out = torch.zeros(len(ids), dtype=torch.int64)
    for k in range(ids.shape[1]):
        out = out * V + ids[:, k]
    return out


def distributions(tables: list[Tensor], ids: Tensor, upto: int) -> Tensor:
    """(B, upto, V): log-probabilities after each prefix of ids."""
    return torch.stack([tables[k][code(ids[:, :k])] for k in range(upto)], 1)


def uniform(key: Key, *shape: int) -> Tensor:
    return key.uniform(shape, torch.float64)


def draft_from(tables: list[Tensor], u: Tensor) -> Tensor:
    ids = torch.zeros(len(u), 0, dtype=torch.int64)
    for k in range(K):
        ids = torch.cat([ids, inverse_cdf_sample(tables[k][code(ids)], u[:, k]).unsqueeze(1)], 1)
    return ids


def emitted_distribution(verified_ids: Tensor, accepted: Tensor, p: list[Tensor], key: Key) -> Tensor:
    """Emission completed to K tokens by plain decoding, as frequencies over V^K."""
    u = uniform(key, len(accepted), K)
    ids = verified_ids[:, :0]
    for k in range(K):
        drawn = inverse_cdf_sample(p[k][code(ids)], u[:, k])
        ids = torch.cat([ids, torch.where(k <= accepted, verified_ids[:, k], drawn).unsqueeze(1)], 1)
    return torch.bincount(code(ids), minlength=V**K) / len(ids)


def exact_distribution(p: list[Tensor]) -> Tensor:
    out = []
    for ids in itertools.product(range(V), repeat=K):
        row = torch.tensor([ids])
        out.append(float(distributions(p, row, K).gather(-1, row.unsqueeze(-1)).sum().exp()))
    return torch.tensor(out, dtype=torch.float64)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().sum() / 2)


TOLERANCE = 0.5 * (2 * V**K / (torch.pi * N)) ** 0.5  # the mean total variation of N draws on V^K like atoms, at most


@pytest.mark.parametrize("kind", ["coupled", "rejection", "block"])
@pytest.mark.parametrize("setting", [(1.0, 1.0), (0.7, 0.9)])
def test_lossless(kind: str, setting: tuple[float, float]) -> None:
    """At temperature and top-p of the target too; the drafter is another random chain."""
    p = [token_log_probs(table, *setting) for table in chain(Key(1))]
    q = chain(Key(2))
    key = Key(3).fold(kind)
    draft = draft_from(q, uniform(key.fold("draft"), N, K))
    log_p, log_q, u = distributions(p, draft, K + 1), distributions(q, draft, K), uniform(key.fold("u"), N, K + 1)
    if kind == "coupled":
        verified = coupled(draft, log_p, u)
    else:
        verified = {"rejection": rejection, "block": block}[kind](draft, log_q, log_p, uniform(key.fold("c"), N, K), u)
    assert 0 < float(verified.accepted.double().mean()) < K
    assert (
        distance(emitted_distribution(verified.ids, verified.accepted, p, key.fold("rest")), exact_distribution(p))
        < 1.5 * TOLERANCE
    )


def test_the_control_is_found_out() -> None:
    """Unverified drafts, and rejection with a wrong q, have another distribution."""
    p, q, other = chain(Key(1)), chain(Key(2)), chain(Key(5))
    draft = draft_from(q, uniform(Key(6), N, K))
    assert distance(torch.bincount(code(draft), minlength=V**K) / N, exact_distribution(p)) > 20 * TOLERANCE
    wrong = rejection(
        draft,
        distributions(other, draft, K),
        distributions(p, draft, K + 1),
        uniform(Key(8), N, K),
        uniform(Key(9), N, K + 1),
    )
    assert distance(emitted_distribution(wrong.ids, wrong.accepted, p, Key(7)), exact_distribution(p)) > 20 * TOLERANCE


def test_rejection_holds_where_the_draft_knows_its_own_noise() -> None:
    """q_k depends on the noise of earlier tokens, not on their ids (arXiv 2512.21323, mode C)."""
    p, q = chain(Key(1)), chain(Key(2))
    u = uniform(Key(3), N, K)
    ids, log_q = torch.zeros(N, 0, dtype=torch.int64), []
    for k in range(K):
        bent = (q[k][code(ids)] + 3 * (u[:, :k].sum(1, keepdim=True) % 1) * torch.arange(V)).log_softmax(-1)
        log_q.append(bent)
        ids = torch.cat([ids, inverse_cdf_sample(bent, u[:, k]).unsqueeze(1)], 1)
    for function in (rejection, block):
        verified = function(
            ids, torch.stack(log_q, 1), distributions(p, ids, K + 1), uniform(Key(4), N, K), uniform(Key(5), N, K + 1)
        )
        assert (
            distance(emitted_distribution(verified.ids, verified.accepted, p, Key(6)), exact_distribution(p))
            < 1.5 * TOLERANCE
        )


def test_coupled_output_is_plain_decoding_of_the_same_noise_whatever_the_drafter() -> None:
    p = chain(Key(1))
    u = uniform(Key(2), 500, K + 1)
    plain = torch.zeros(500, 0, dtype=torch.int64)
    for k in range(K + 1):
        plain = torch.cat([plain, inverse_cdf_sample(p[k][code(plain)], u[:, k]).unsqueeze(1)], 1)
    for drafter in range(3):
        draft = draft_from(chain(Key(10 + drafter)), uniform(Key(drafter), 500, K)) if drafter else plain[:, :K]
        verified = coupled(draft, distributions(p, draft, K + 1), u)
        for b in range(500):
            n = int(verified.accepted[b]) + 1
            assert verified.ids[b, :n].tolist() == plain[b, :n].tolist()
        assert drafter or (verified.accepted == K).all()


def test_block_keeps_at_least_as_many_as_rejection() -> None:
    p, q = chain(Key(1), 1.0), chain(Key(2), 1.0)
    draft = draft_from(q, uniform(Key(3), N, K))
    arguments = (
        distributions(q, draft, K),
        distributions(p, draft, K + 1),
        uniform(Key(4), N, K),
        uniform(Key(5), N, K + 1),
    )
    means = [float(f(draft, *arguments).accepted.double().mean()) for f in (rejection, block)]
    assert means[1] > means[0] - 0.005


def test_rejection_accepts_as_often_as_two_distributions_allow() -> None:
    """P(keep the first) = 1 - TV(p, q), and no coupling does better."""
    p, q = chain(Key(1)), chain(Key(2))
    draft = draft_from(q, uniform(Key(3), N, K))
    verified = rejection(
        draft,
        distributions(q, draft, K),
        distributions(p, draft, K + 1),
        uniform(Key(4), N, K),
        uniform(Key(5), N, K + 1),
    )
    wanted = 1 - distance(p[0][0].exp(), q[0][0].exp())
    assert abs(float((verified.accepted > 0).double().mean()) - wanted) < 0.005


def test_greedy_is_coupled_at_temperature_zero() -> None:
    scores = Key(1).normal((5, K + 1, V))
    best = scores.argmax(-1)
    verified = coupled(best[:, :K], token_log_probs(scores, 0.0), uniform(Key(2), 5, K + 1))
    assert torch.equal(verified.ids, best) and (verified.accepted == K).all()


def test_noise_and_its_interval() -> None:
    """Any noise of an id's interval picks that id; ids of probability zero are never picked."""
    distribution = token_log_probs(Key(1).normal((2000, 9), torch.float64) * 6, 1.0, 0.8)
    ids = inverse_cdf_sample(distribution, uniform(Key(2), 2000))
    assert (distribution.gather(-1, ids.unsqueeze(-1)) > -torch.inf).all()
    low, width = uniform_interval(distribution, ids)
    for share in (1e-6, 0.5, 1 - 1e-6):
        inside = low + share * width
        assert (inverse_cdf_sample(distribution, inside) == ids).double().mean() > 0.999
    assert (inverse_cdf_sample(distribution, torch.full((2000,), 1 - 2**-53, dtype=torch.float64)) >= 0).all()


def test_token_log_probs_keep_the_smallest_set_with_the_mass() -> None:
    distribution = token_log_probs(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 1.0, 0.7)
    assert torch.allclose(distribution.exp(), torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64))
