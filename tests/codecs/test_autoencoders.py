"""The diffusers adapter, on tiny random instances of the real classes, against the classes."""

from __future__ import annotations

import inspect
import json
import sys
from typing import get_args

import pytest
import torch

from omni.checkpoint import publish
from omni.codecs import AutoencoderCodec, FsqCodec, autoencoders, load_codec
from omni.codecs.autoencoder_config import NUMBERS_OF_LAYERS, AutoencoderConfig
from omni.codecs.autoencoders import pictures_per_pass, to_pictures
from omni.codecs.networks import _rms_norm, use_fused_norms
from omni.errors import DamagedError
from omni.rng import Key
from tests.codecs.test_codec import CONFIGS, TINY_DC, pictures

diffusers = pytest.importorskip("diffusers")

MODELS = {
    "AutoencoderKL": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "scaling_factor": 0.4,
        "shift_factor": 0.1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
        "latent_channels": 4,
    },
    "AutoencoderDC": {**TINY_DC, "scaling_factor": 0.5},
}
STRIDES = {"AutoencoderKL": 2, "AutoencoderTiny": 2, "AutoencoderDC": 4}


def codec_of(name: str) -> AutoencoderCodec:
    config = {"kind": "autoencoder", "class_name": name, "model": MODELS[name]}
    return AutoencoderCodec.initialised(config, "test", Key(0))


def reference_latents(name: str, module, picture: torch.Tensor) -> torch.Tensor:
    encoded = module.encode(picture)
    if name == "AutoencoderKL":
        return (encoded.latent_dist.mode() - module.config.shift_factor) * module.config.scaling_factor
    return encoded.latents if name == "AutoencoderTiny" else encoded.latent * module.config.scaling_factor


@pytest.mark.parametrize("name", MODELS)
class TestAdapter:
    def test_latents_equal_those_of_the_class(self, name: str) -> None:
        codec = codec_of(name)
        pixels = pictures(2, 16, 16)
        with torch.no_grad():
            expected = reference_latents(name, codec.module, to_pictures(pixels)).permute(0, 2, 3, 1)
        assert codec.spec.stride == (1, STRIDES[name], STRIDES[name])
        torch.testing.assert_close(codec.encode(pixels), expected, atol=1e-5, rtol=1e-4)

    def test_diffusers_checkpoint_directory(self, name: str, tmp_path) -> None:
        codec = codec_of(name)
        codec.module.save_pretrained(tmp_path)
        loaded = load_codec(tmp_path)
        pixels = pictures(1, 16, 16)
        assert torch.equal(loaded.encode(pixels), codec.encode(pixels))
        loaded.save(tmp_path / "ours")
        ours = load_codec(tmp_path / "ours")
        assert torch.equal(ours.encode(pixels), codec.encode(pixels))  # float32 weights stay float32
        assert torch.equal(ours.decode(ours.encode(pixels)), codec.decode(codec.encode(pixels)))
        again = ours.save(tmp_path / "again")
        files = sorted(p.name for p in again.iterdir())
        assert files == ["config.json", "manifest.json", "model.safetensors"]
        assert all((again / f).read_bytes() == (tmp_path / "ours" / f).read_bytes() for f in files)

    def test_bf16_is_close(self, name: str) -> None:
        codec = codec_of(name)
        pixels = pictures(1, 16, 16)
        exact = codec.encode(pixels)
        codec.precision = "bfloat16"
        assert (codec.encode(pixels) - exact).abs().max() < 0.05 * (1 + exact.abs().max())


@pytest.mark.parametrize("count", [1, 4])
def test_batches_have_one_shape_and_do_not_affect_results(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each picture is one batch; elsewhere the last batch is padded. A result does not depend on its batch."""
    assert [pictures_per_pass(*x) for x in (("cpu", 64, 64), ("cuda", 64, 64), ("cuda", 1024, 768))] == [1, 64, 1]
    monkeypatch.setattr(autoencoders, "pictures_per_pass", lambda device, height, width: count)
    codec, passes = codec_of("AutoencoderDC"), []
    network = codec.encode_pictures
    codec.encode_pictures = lambda x: passes.append(len(x)) or network(x)  # type: ignore[method-assign]
    pixels = (Key(0).uniform((6, 32, 32, 3)) * 255).byte()
    together = codec.encode(pixels)
    assert passes == [count] * -(-6 // count)
    assert all(torch.equal(codec.encode(pixels[i : i + 1])[0], together[i]) for i in range(6))
    assert codec.encode(pixels[:0]).shape == (0, *together.shape[1:])


def test_weights_are_keyed_by_name() -> None:
    one, same = codec_of("AutoencoderDC"), codec_of("AutoencoderDC")
    other = AutoencoderCodec.initialised(CONFIGS["autoencoder"], "test", Key(1))
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, same.module.state_dict()[name])
    assert not torch.equal(one.module.encoder.conv_out.weight, other.module.encoder.conv_out.weight)


MEAN, STD = [-1.6, 1.9, -1.4, 2.5], [8.5, 5.9, 6.5, 5.2]


def kl_codec(**settings: object) -> AutoencoderCodec:
    model = {**MODELS["AutoencoderKL"], "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": None, **settings}
    return AutoencoderCodec.initialised({"class_name": "AutoencoderKL", "model": model}, "test", Key(0))


def test_a_vae_with_its_own_statistics_is_normalised_by_them(tmp_path) -> None:
    """As diffusers' pipelines decode: raw = z latents_std / scaling_factor + latents_mean."""
    codec = kl_codec(latents_mean=MEAN, latents_std=STD)
    assert torch.equal(codec.mean, torch.tensor(MEAN))
    assert torch.equal(codec.deviation, torch.tensor([17.0, 11.8, 13.0, 10.4]))
    pixels = pictures(1, 16, 16)
    raw = codec.encode_pictures(to_pictures(pixels)).permute(0, 2, 3, 1)
    z = codec.encode(pixels)
    torch.testing.assert_close(z * torch.tensor(STD) / 0.5 + torch.tensor(MEAN), raw, atol=1e-5, rtol=1e-5)
    codec.save(tmp_path / "ours")
    assert torch.equal(load_codec(tmp_path / "ours").encode(pixels), z)
    codec.module.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_codec(tmp_path / "theirs").encode(pixels), z)


@pytest.mark.parametrize(
    ("settings", "mean", "deviation"),
    [
        ({}, 0.0, 2.0),
        ({"scaling_factor": None}, 0.0, 1.0),
        ({"scaling_factor": None, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 3.0),
        ({"shift_factor": 0.25}, 0.25, 2.0),
        ({"shift_factor": 0.0, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 6.0),
    ],
)
def test_null_factors_are_one_and_zero(settings: dict, mean: float, deviation: float) -> None:
    codec = kl_codec(**settings)
    assert codec.mean.tolist() == [mean] * 4 and codec.deviation.tolist() == [deviation] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents_mean": MEAN}, "come together"),
        ({"latents_std": STD}, "come together"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "3 and 4 values for 4 channels"),
        ({"latents_mean": MEAN, "latents_std": [*STD[:3], 0.0]}, "deviation of channel 3 is 0.0"),
        ({"latents_mean": MEAN, "latents_std": [-8.5, *STD[1:]]}, "deviation of channel 0 is -17.0"),
        ({"latents_mean": MEAN, "latents_std": [float("nan"), *STD[1:]]}, "deviation of channel 0 is nan"),
        ({"latents_mean": [float("inf"), *MEAN[1:]], "latents_std": STD}, "mean of channel 0 is inf"),
        ({"scaling_factor": 0.0}, "scaling_factor = 0.0 must be a positive number"),
        ({"scaling_factor": -1.0}, "scaling_factor = -1.0 must be"),
        ({"scaling_factor": float("nan")}, "scaling_factor = nan must be"),
        ({"shift_factor": 0.1, "latents_mean": MEAN, "latents_std": STD}, "both a mean"),
        ({"block_out_channels": [-1, 8]}, r"block_out_channels = -1 must lie in 0 \.\. 65536"),
        ({"layers_per_block": 257}, r"layers_per_block = 257 must lie in 0 \.\. 256"),
        ({"layers_per_block": 10**9}, r"layers_per_block = 1000000000 must lie in 0 \.\. 256"),
        ({"latent_channels": 10**18}, "latent_channels"),
        ({"latent_channels": 0}, "latent_channels = 0 must be a whole number from 1 on"),
        ({"scaling_factor": [1.0]}, r"scaling_factor = \[1.0\] is no number"),
        ({"latents_mean": 1.0, "latents_std": 1.0}, "latents_mean = 1.0 is no number, or no list of them"),
        ({"norm_num_groups": 3}, "cannot be built of these arguments"),
        ({"block_out_channels": []}, r"block_out_channels = \[\] is no list of 1 to 16 stages"),
    ],
)
def test_invalid_statistics_and_sizes_raise(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_codec(**settings)


def test_every_number_of_layers_is_declared() -> None:
    """Also of later versions of diffusers."""
    classes = get_args(AutoencoderConfig.model_fields["class_name"].annotation)
    named = {argument for one in classes for argument in inspect.signature(getattr(diffusers, one)).parameters}
    assert {argument for argument in named if "layers" in argument or argument.startswith("num_")} == NUMBERS_OF_LAYERS


def test_statistics_keep_every_bit_and_bf16_stays_bf16(tmp_path) -> None:
    from omni.pretrained import BUNDLED

    codec = codec_of("AutoencoderDC")
    codec.mean, codec.deviation = Key(7).normal((4,)), Key(8).uniform((4,)) + 1e-8
    loaded = load_codec(codec.save(tmp_path / "one"))
    assert torch.equal(loaded.mean, codec.mean) and torch.equal(loaded.deviation, codec.deviation)
    for touched in (False, True):
        bundled = load_codec(BUNDLED / "codec")
        if touched:
            bundled.encode(pictures(1, 64, 64))
        bundled.save(tmp_path / f"bundled {touched}")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / f"bundled {touched}" / name).read_bytes() == (BUNDLED / "codec" / name).read_bytes()


def test_a_saved_codec_is_built_when_it_is_first_needed(tmp_path) -> None:
    codec = codec_of("AutoencoderKL")
    loaded = load_codec(codec.save(tmp_path / "c"))
    assert loaded._module is None and loaded.spec == codec.spec and loaded.grid(16, 16) == (8, 8)
    pixels = pictures(1, 16, 16)
    assert torch.equal(loaded.to("cpu").encode(pixels), codec.encode(pixels))
    assert all(not value.is_meta for value in loaded.module.state_dict().values())
    assert all(p.requires_grad for p in loaded.module.parameters())
    wide = {**codec.config(), "model": {**codec.config()["model"], "block_out_channels": [65536, 65536]}}
    publish(tmp_path / "wide", {"config.json": json.dumps(wide), "model.safetensors": codec.weights()})
    wrong = load_codec(tmp_path / "wide")
    with pytest.raises(DamagedError, match="has shape .*, config.json needs"):  # and terabytes were not asked for
        wrong.encode(pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(tmp_path, value: float) -> None:
    codec = codec_of("AutoencoderTiny")
    name, weight = next(iter(codec.module.state_dict().items()))
    weight[(0,) * weight.ndim] = value
    with pytest.raises(DamagedError, match=rf"model\.safetensors: {name} has 1 values that are NaN or infinite"):
        load_codec(codec.save(tmp_path / "ours"))
    codec.module.save_pretrained(tmp_path / "theirs")
    with pytest.raises(DamagedError, match=f"{name} has values that are NaN or infinite"):
        load_codec(tmp_path / "theirs")


def test_normalisation_gives_zero_mean_and_unit_deviation() -> None:
    codec = codec_of("AutoencoderDC")
    batches = [pictures(4, 16, 16, seed=i) // (i + 1) for i in range(3)]
    before = codec.encode(batches[0])
    picture = codec.decode(before)
    codec.normalise_over(batches)
    latents = torch.cat([codec.encode(batch) for batch in batches]).flatten(0, 2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    assert (codec.decode(codec.encode(batches[0])).int() - picture.int()).abs().max() <= 1


def test_fused_norm_computes_the_same() -> None:
    from diffusers.models.normalization import RMSNorm

    layer = RMSNorm(6, eps=1e-5, elementwise_affine=True, bias=True)
    with torch.no_grad():
        layer.weight.copy_(Key(0).normal((6,)))
        layer.bias.copy_(Key(1).normal((6,)))
    hidden = Key(2).normal((3, 5, 6))
    expected = layer(hidden)
    torch.testing.assert_close(_rms_norm(layer, hidden), expected)
    use_fused_norms(layer)
    torch.testing.assert_close(layer(hidden), expected)


def test_errors_name_the_value_and_the_remedy(tmp_path, monkeypatch) -> None:
    config = CONFIGS["autoencoder"]
    with pytest.raises(ValueError, match="no argument 'latent_chanels'; did you mean 'latent_channels'"):
        AutoencoderCodec.from_config({**config, "model": {"latent_chanels": 4}}, "test")
    with pytest.raises(ValueError, match="mean and deviation have 1 and 1 values for 4 channels"):
        AutoencoderCodec.from_config({**config, "mean": [0.0], "deviation": [1.0]}, "test")
    with pytest.raises(ValueError, match="class_name"):
        AutoencoderCodec.from_config({**config, "class_name": "UNet"}, "test")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="of class 'UNet2DModel'; known autoencoders"):
        load_codec(tmp_path)
    with pytest.raises(ValueError, match="do not match the configuration"):
        AutoencoderCodec.from_config(config, "test").load_weights({"x": torch.zeros(1)}, "weights")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'omni-flow\[vae\]'"):
        AutoencoderCodec.from_config(config, "test")


def test_fsq_takes_the_weights_of_the_plain_autoencoder() -> None:
    plain = AutoencoderCodec.initialised(CONFIGS["autoencoder"], "test", Key(5))
    quantised = FsqCodec.initialised(CONFIGS["fsq"], "test", Key(0))
    quantised.copy_from(plain)
    weights = quantised.autoencoder().state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.module.state_dict().items())
