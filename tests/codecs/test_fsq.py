"""Finite scalar quantisation: the allowed values, the tokens, the gradient; and its codec."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.codecs import FiniteScalarQuantiser, FsqCodec
from omni.rng import Key
from tests.codecs.test_codec import CONFIGS, pictures

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=5).map(tuple)


@given(LEVELS, st.integers(0, 99), st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_every_channel_has_exactly_its_levels(levels: tuple[int, ...], seed: int, spread: float) -> None:
    quantiser = FiniteScalarQuantiser(levels)
    codes = quantiser.quantise(spread * Key(seed).normal((64, len(levels), 3)))
    assert codes.abs().max() <= 1
    for i, n in enumerate(levels):
        steps = codes[:, i] * (n // 2)
        torch.testing.assert_close(steps, steps.round())
        assert steps.min() >= -(n // 2) and steps.max() <= (n - 1) // 2
    torch.testing.assert_close(quantiser.snap(codes), codes)


@given(LEVELS)
@settings(max_examples=30, deadline=None)
def test_tokens_number_all_codes_once(levels: tuple[int, ...]) -> None:
    quantiser = FiniteScalarQuantiser(levels)
    tokens = torch.arange(min(quantiser.num_codes, 5000))
    codes = quantiser.codes(tokens)
    assert torch.equal(quantiser.tokens(codes), tokens)
    assert len(torch.unique(codes, dim=0)) == len(tokens)


def test_all_levels_are_reached_and_the_middle_is_near_zero() -> None:
    levels = (8, 5, 2)
    quantiser = FiniteScalarQuantiser(levels)
    raw = torch.linspace(-6, 6, 2001)[:, None].expand(-1, 3)
    codes = quantiser.quantise(raw)
    assert [len(codes[:, i].unique()) for i in range(3)] == list(levels)
    assert codes[1000, :2].abs().max() == 0


def test_the_gradient_is_that_of_the_bounding_function() -> None:
    quantiser = FiniteScalarQuantiser((5,))
    raw = torch.tensor([[-0.7], [0.0], [1.3]], requires_grad=True)
    quantiser.quantise(raw).sum().backward()
    reach = 4 * 1.001 / 2
    expected = (1 - raw.detach().tanh() ** 2) * reach / 2
    torch.testing.assert_close(raw.grad, expected)


def test_bad_levels_and_tokens_raise() -> None:
    with pytest.raises(ValueError, match=r"two or more each, got \(8, 1\)"):
        FiniteScalarQuantiser((8, 1))
    with pytest.raises(ValueError, match="must lie in 0 .. 39, got up to 40"):
        FiniteScalarQuantiser((8, 5)).codes(torch.tensor([40]))


def test_codec_tokens_determine_the_picture() -> None:
    codec = FsqCodec.initialised(CONFIGS["fsq"], "test", Key(0))
    codec.normalise_over([pictures(8, 16, 16)])
    pixels = pictures(2, 16, 16, seed=3)
    latents = codec.encode(pixels)
    tokens = codec.tokens(latents)
    assert tokens.shape == (2, 4, 4) and tokens.dtype == torch.int64
    torch.testing.assert_close(codec.from_tokens(tokens), latents, atol=1e-5, rtol=1e-5)
    shaken = latents + 0.02 / codec.deviation  # less than half a level
    assert torch.equal(codec.decode(shaken), codec.decode(latents))
