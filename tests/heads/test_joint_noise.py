"""Noise and its inverse: the id of a noise, and the prior from the noise of random tokens.

Legend: N samples, S numbers of a token's noise, V ids.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eval.experiments.joint.training import uniforms
from omni.heads.joint.noise_kinds import SMALLEST, TINY, NoiseKind, build_noise
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

KINDS: tuple[NoiseKind, ...] = ("uniform", "tree", "gumbel")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [2, 7, 64])
def test_inverted_noise_maps_to_its_token(kind: NoiseKind, vocab_size: int) -> None:
    """Also for uniforms at the edges, and for tokens of small probability beside zeros."""
    noise, N = build_noise(kind, vocab_size, 8, 4), 1600
    for n, sharpness in enumerate((1.0, 6.0)):
        log_p = Key(n).fold("law").normal((N, vocab_size), torch.float64).mul(sharpness)
        log_p[::3, 0] = -math.inf
        log_p[1::2] -= 15.0 * (log_p[1::2] < 0)
        log_p = log_p.log_softmax(-1)
        free = Key(n).uniform((N, noise.size), torch.float64)
        for ids in (log_p.exp().multinomial(1, generator=Key(n).generator())[:, 0], log_p.argmin(-1)):
            sure = log_p.gather(-1, ids.unsqueeze(-1))[:, 0] > math.log(SMALLEST)
            assert sure.any()
            for draws in (free, torch.zeros_like(free), torch.full_like(free, 1 - TINY)):
                found = noise.invert(log_p, ids, draws)
                assert found.isfinite().all() and torch.equal(noise.choose(log_p, found)[sure], ids[sure])
                if kind != "gumbel":
                    assert found[sure].min() >= 0 and found[sure].max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_inverted_noise_of_random_tokens_is_the_prior(kind: NoiseKind) -> None:
    """Kolmogorov-Smirnov in every number, and no correlation between two: noise must not reveal ids."""
    N, V = 20000, 5
    noise = build_noise(kind, V, 8, 4)
    log_p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05], dtype=torch.float64).log()
    ids = inverse_cdf_sample(log_p.expand(N, V), Key(0).fold("ids").uniform((N,), torch.float64))
    found = noise.invert(log_p.expand(N, V), ids, Key(1).uniform((N, noise.size), torch.float64))
    u = (-(-found).exp()).exp() if kind == "gumbel" else found
    assert _ks(u) < 1.95 < _ks(u[ids != 0]), "conditioning on the token must show"
    correlation = torch.corrcoef((u - 0.5).T).reshape(noise.size, noise.size) - torch.eye(noise.size)
    assert correlation.abs().max() < 4.5 / math.sqrt(N)


def _ks(u: Tensor) -> float:
    """sqrt(N) times the largest distance of an empirical distribution function (columns of (N, S)) from the uniform."""
    at = u.sort(0).values
    steps = torch.arange(1, len(u) + 1, dtype=torch.float64).unsqueeze(-1) / len(u)
    return math.sqrt(len(u)) * float(torch.maximum(steps - at, at - steps + 1 / len(u)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_noise_from_the_prior_gives_the_distribution(kind: NoiseKind) -> None:
    N, V = 40000, 6
    noise = build_noise(kind, V, 8, 4)
    p = torch.tensor([0.3, 0.0, 0.1, 0.35, 0.0, 0.25], dtype=torch.float64)
    u = uniforms(N, 1, Key(0))
    free = noise.prior(u, Key(1))
    assert free.shape == (N, 1, noise.size)
    ids = noise.choose(p.log().expand(N, 1, V), free)
    assert (torch.bincount(ids.flatten(), minlength=V) / N - p).abs().max() < 0.012
    assert not torch.isin(ids, torch.tensor([1, 4])).any()
    if kind == "uniform":
        assert torch.equal(ids, inverse_cdf_sample(p.log().expand(N, 1, V), u))
    if kind == "tree":
        assert torch.equal(ids >= 4, inverse_cdf_sample(p.log().expand(N, 1, V), u) >= 4), (
            "the root's branch is plain decoding's"
        )


def test_a_tree_by_hand() -> None:
    noise = build_noise("tree", 5, 8, 4)
    p = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
    for draw in Key(0).uniform((200, 3), torch.float64):
        low, high, u = 0, 8, draw.tolist()
        for level in range(3):
            middle = (low + high) // 2
            left, right = float(p[low:middle].sum()), float(p[middle:high].sum())
            low, high = (middle, high) if right > 0 and u[level] * (left + right) >= left else (low, middle)
        assert int(noise.choose(p.log(), draw)) == low
