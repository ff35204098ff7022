"""The diffusers adapter, on tiny random instances of the real classes; the reference is the class itself."""

from __future__ import annotations

import sys

import pytest
import torch

from omni.codecs import AutoencoderCodec, FsqCodec, autoencoders, load_codec
from omni.codecs.autoencoders import _rms_norm, pictures_per_pass, to_pictures, use_fused_norms
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
    def test_latents_are_those_of_the_class(self, name: str) -> None:
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
        torch.testing.assert_close(ours.encode(pixels), codec.encode(pixels), atol=0.1, rtol=0.1)  # bf16 weights

    def test_bf16_is_close(self, name: str) -> None:
        codec = codec_of(name)
        pixels = pictures(1, 16, 16)
        exact = codec.encode(pixels)
        codec.precision = "bfloat16"
        assert (codec.encode(pixels) - exact).abs().max() < 0.05 * (1 + exact.abs().max())


@pytest.mark.parametrize("count", [1, 4])
def test_a_pass_has_one_shape_and_leaves_no_trace(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each picture is a pass; elsewhere the last one is filled up. Alone or among others, equal bits."""
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


def test_errors_name_the_value_and_the_way_out(tmp_path, monkeypatch) -> None:
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
    with pytest.raises(ValueError, match="do not belong to the configuration"):
        AutoencoderCodec.from_config(config, "test").load_weights({"x": torch.zeros(1)}, "weights")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'omni-flow\[vae\]'"):
        AutoencoderCodec.from_config(config, "test")


def test_fsq_takes_the_weights_of_the_plain_autoencoder() -> None:
    plain = AutoencoderCodec.initialised(CONFIGS["autoencoder"], "test", Key(5))
    quantised = FsqCodec.initialised(CONFIGS["fsq"], "test", Key(0))
    quantised.adopt(plain)
    weights = quantised.autoencoder().state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.module.state_dict().items())
