"""Normalisation of latents by hand: an autoencoder of two channels whose latents are known numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni.codecs import AutoencoderCodec
from omni.codecs.autoencoders import AutoencoderConfig, to_pictures, to_pixels
from omni.rng import Key


class Output(SimpleNamespace):
    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class Doubles(nn.Module):
    """Latents: twice the first colour, and the second plus one, per 2 x 2 pixels; and the inverse as decoder."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {"latent_channels": 2, "block_out_channels": [1, 1], **config}
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.batches: list[int] = []

    def encode(self, pictures: Tensor) -> Output:
        self.batches.append(len(pictures))
        small = pictures[:, :, ::2, ::2]
        return Output(latents=torch.stack([self.weight * small[:, 0], small[:, 1] + 1], 1))

    def decode(self, latents: Tensor) -> Output:
        colours = torch.stack([latents[:, 0] / self.weight, latents[:, 1] - 1, 0 * latents[:, 0]], 1)
        return Output(sample=colours.repeat_interleave(2, 2).repeat_interleave(2, 3))


def codec(mean: tuple[float, ...] = (), deviation: tuple[float, ...] = (), **config: Any) -> AutoencoderCodec:
    described = AutoencoderConfig(class_name="AutoencoderTiny", model={}, mean=mean, deviation=deviation)
    return AutoencoderCodec(described, Doubles(**config))


def grey(*levels: int) -> Tensor:
    """uint8 (B, 2, 2, 3): a picture of each level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)


def test_pixels_and_pictures() -> None:
    pixels = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).view(1, 2, 2, 1).repeat(1, 1, 1, 3)
    pixels[..., 1] = 0
    pictures = to_pictures(pixels)
    assert pictures.shape == (1, 3, 2, 2) and pictures.dtype == torch.float32
    torch.testing.assert_close(pictures[0, 0], torch.tensor([[-1.0, -0.6], [1 / 255, 1.0]]))
    assert (pictures[0, 1] == -1).all() and torch.equal(to_pixels(pictures), pixels)
    odd = torch.tensor([-3.0, -1.002, 1.002, 9.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    assert to_pixels(odd)[0, ..., 0].tolist() == [[0, 0], [255, 255]]
    nearly = torch.tensor([0.6, -0.4, 0.4, 254.6]).view(1, 1, 2, 2).repeat(1, 3, 1, 1) / 127.5 - 1
    assert to_pixels(nearly)[0, ..., 2].tolist() == [[1, 0], [0, 255]]  # rounded, not cut


def test_latents_are_normalised_by_channel() -> None:
    """Raw (2 x, x + 1); mean (0.5, -1), deviation (4, 0.25)."""
    one = codec((0.5, -1.0), (4.0, 0.25))
    pixels = torch.zeros(1, 2, 4, 3, dtype=torch.uint8)
    pixels[:, :, 2:] = 255  # x = -1, then 1
    latents = one.encode(pixels)
    torch.testing.assert_close(latents, torch.tensor([[[[-2.5 / 4, 4.0], [1.5 / 4, 12.0]]]]))
    decoded = one.decode(latents)
    assert torch.equal(decoded[..., :2], pixels[..., :2]) and (decoded[..., 2] == 128).all()
    torch.testing.assert_close(one.denormalised(latents), torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]]))


def test_the_factors_of_the_configuration_are_the_default() -> None:
    for config, mean, deviation in (
        ({}, 0.0, 1.0),
        ({"scaling_factor": 0.5}, 0.0, 2.0),
        ({"scaling_factor": 0.25, "shift_factor": 0.5}, 0.5, 4.0),
        ({"scaling_factor": None, "shift_factor": None}, 0.0, 1.0),
    ):
        one = codec(**config)
        assert one.mean.tolist() == [mean] * 2 and one.deviation.tolist() == [deviation] * 2


@pytest.mark.parametrize(
    ("mean", "deviation"), [((1.0,), (1.0,)), ((1.0, 1.0), ()), ((), (1.0, 1.0)), ((1.0,) * 3,) * 2]
)
def test_one_number_for_every_channel(mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"have {len(mean)} and {len(deviation)} values for 2 channels"):
        codec(mean, deviation)


def test_statistics_are_those_of_all_pictures_together() -> None:
    """Batches of different size: every latent counts once. Levels as x in [-1, 1], by torch in float64."""
    one, levels = codec(), [[0, 255, 30], [90], [200, 7]]
    one.normalise_over([grey(*batch) for batch in levels])
    x = torch.tensor([level for batch in levels for level in batch], dtype=torch.float64) / 127.5 - 1
    raw = torch.stack([2 * x, x + 1])
    torch.testing.assert_close(one.mean, raw.mean(1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.deviation, raw.std(1, correction=0).float(), rtol=1e-5, atol=1e-5)
    kept = one.config()
    torch.testing.assert_close(torch.tensor(kept["mean"]), one.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(kept["deviation"]), one.deviation, rtol=0, atol=1e-6)


def test_a_channel_without_variation_keeps_a_deviation_above_zero() -> None:
    one = codec()
    one.normalise_over([grey(255, 255)])
    assert one.mean.tolist() == [2.0, 2.0] and one.deviation.tolist() == pytest.approx([1e-6] * 2)


def test_many_pictures_are_encoded_in_parts_and_in_order() -> None:
    one = codec()
    pixels = grey(*range(150))
    latents = one.encode(pixels)
    assert sum(one.module.batches) == 150 and max(one.module.batches) <= 64  # type: ignore[operator]
    torch.testing.assert_close(latents[:, 0, 0, 0], 2 * (torch.arange(150) / 127.5 - 1))
    assert torch.equal(one.decode(latents)[..., :2], pixels[..., :2])


def test_another_family_gives_its_weights_alone() -> None:
    """From a codec of the same class the normalisation is copied too."""
    mine, other = codec(), codec((0.5, -1.0), (4.0, 0.25))
    with torch.no_grad():
        other.module.weight.fill_(float(Key(0).normal((1,))))
    mine.copy_from(other)
    assert torch.equal(mine.module.weight, other.module.weight)
    assert mine.mean.tolist() == [0.5, -1.0] and mine.deviation.tolist() == [4.0, 0.25]


def test_a_codec_moves_its_network_and_its_statistics() -> None:
    moved = codec((1.0, 2.0), (3.0, 4.0)).to("meta")
    assert moved.module.weight.is_meta and moved.mean.is_meta and moved.deviation.is_meta
