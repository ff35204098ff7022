"""The contract of every codec: shapes, sizes, files, clips. Parametrised over the registry, on tiny random networks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.tasks.pretrained.autoencoders import TINY
from omni.codecs import MAX_GRID, AutoencoderCodec, Codec, PixelCodec, PixelConfig, codecs, load_codec, psnr
from omni.errors import NotFiniteError
from omni.rng import Key

TINY_DC = {name: value for name, value in TINY["DC-AE"][1].items() if name != "scaling_factor"}
CONFIGS = {
    "pixels": {"kind": "pixels", "patch": 4},
    "autoencoder": {"kind": "autoencoder", "class_name": "AutoencoderDC", "model": TINY_DC},
    "fsq": {"kind": "fsq", "class_name": "AutoencoderDC", "model": TINY_DC, "levels": [8, 5]},
}


def make(name: str) -> Codec:
    family = codecs.get(name)
    if issubclass(family, AutoencoderCodec):
        return family.initialised(CONFIGS[name], "test", Key(0))
    return family.from_config(CONFIGS[name], "test")


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = Key(seed).fold("pictures").generator()
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def test_every_registered_codec_is_tested_here() -> None:
    assert set(CONFIGS) == set(codecs.names())


@pytest.mark.parametrize("name", CONFIGS)
class TestContract:
    def test_shapes_and_types(self, name: str) -> None:
        codec = make(name)
        pixels = pictures(2, 16, 24)
        latents = codec.encode(pixels)
        assert latents.shape == (2, *codec.grid(16, 24), codec.spec.channels) == (2, 4, 6, codec.spec.channels)
        assert latents.dtype == torch.float32 and not latents.requires_grad
        restored = codec.decode(latents)
        assert restored.shape == pixels.shape and restored.dtype == torch.uint8

    def test_pictures_are_independent(self, name: str) -> None:
        codec = make(name)
        pixels = pictures(3, 16, 16)
        together = codec.encode(pixels)
        alone = torch.cat([codec.encode(pixels[i : i + 1]) for i in range(3)])
        assert torch.equal(together, alone)

    def test_a_saved_and_loaded_codec_computes_the_same(self, name: str, tmp_path) -> None:
        codec = make(name)
        codec.save(tmp_path / "codec")
        first = load_codec(tmp_path / "codec")
        first.save(tmp_path / "again")
        second = load_codec(tmp_path / "again")
        pixels = pictures(2, 16, 16)
        assert first.spec == codec.spec == second.spec
        assert torch.equal(first.encode(pixels), second.encode(pixels))  # bf16 weights survive a round trip
        assert type(first) is type(codec)

    def test_sizes_off_the_stride_raise(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"15 x 18 .*stride 4 x 4; omni.media.preparation"):
            make(name).encode(pictures(1, 15, 18))

    def test_bad_input_is_named(self, name: str) -> None:
        codec = make(name)
        with pytest.raises(ValueError, match="uint8 pixels.*float32"):
            codec.encode(torch.zeros(1, 16, 16, 3))
        with pytest.raises(ValueError, match=r"\(16, 16, 3\)"):
            codec.encode(pictures(16, 16))
        with pytest.raises(ValueError, match="decode takes float latents"):
            codec.decode(torch.zeros(1, 4, 4, 1))
        side = 4 * MAX_GRID + 4
        with pytest.raises(ValueError, match=f"{side} x 8 pixels is too large.*smaller"):
            codec.encode(torch.zeros(1, side, 8, 3, dtype=torch.uint8))

    def test_non_finite_values_raise_and_are_not_black(self, name: str) -> None:
        codec = make(name)
        latents = codec.encode(pictures(2, 16, 16))
        for wrong in (math.nan, math.inf, -math.inf, 1e30):
            latents[1, 2, 3, 0] = wrong
            with pytest.raises(NotFiniteError, match=f"latents given to codec {codec.spec.name!r} (are not|reach)"):
                codec.decode(latents)
            with pytest.raises(NotFiniteError, match="latents given"):
                codec.decode_video(list(latents.split(1)))

    def test_latents_are_counted_by_shape(self, name: str) -> None:
        codec = make(name)
        assert codec.num_latents((16, 24, 3)) == codec.encode(pictures(1, 16, 24))[0, ..., 0].numel()
        chunks = codec.encode_video(pictures(3, 16, 24))
        assert codec.num_latents((3, 16, 24, 3)) == sum(chunk[..., 0].numel() for chunk in chunks)

    def test_clips_frame_by_frame(self, name: str) -> None:
        codec = make(name)
        frames = pictures(3, 16, 16)
        chunks = codec.encode_video(frames)
        assert [tuple(chunk.shape) for chunk in chunks] == [(1, 4, 4, codec.spec.channels)] * 3
        assert codec.decode_video(chunks).shape == frames.shape
        torch.testing.assert_close(codec.encode_video(frames[:2])[1], chunks[1], atol=1e-5, rtol=1e-5)  # causal


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["autoencoder", "fsq"])
def test_a_damaged_autoencoder_raises_and_is_not_black(name: str, value: float) -> None:
    for part, what in (("encoder", f"the latents that codec '{name}' makes"), ("decoder", "the pixels that the codec")):
        codec = make(name)
        assert isinstance(codec, AutoencoderCodec)
        latents = codec.encode(pictures(1, 16, 16))
        with torch.no_grad():
            for parameter in getattr(codec.autoencoder(), part).parameters():
                parameter.fill_(value)
        with pytest.raises(NotFiniteError, match=f"{what}.* are not finite"):
            codec.encode(pictures(1, 16, 16)) if part == "encoder" else codec.decode(latents)


@given(
    patch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    chunk=st.integers(1, 3),
    chunks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_pixel_codec_is_lossless(patch: int, grid: tuple[int, int], chunk: int, chunks: int, seed: int) -> None:
    codec = PixelCodec(PixelConfig(patch=patch, frames_per_chunk=chunk))
    frames = pictures(chunk * chunks, grid[0] * patch, grid[1] * patch, seed=seed)
    latents = codec.encode(frames)
    assert latents.abs().max() <= 1 and torch.equal(codec.decode(latents), frames)
    parts = codec.encode_video(frames)
    assert len(parts) == chunks and parts[0].shape == (chunk, *grid, patch * patch * 3)
    assert torch.equal(codec.decode_video(parts), frames)


def test_pixel_codec_survives_every_value_and_small_errors() -> None:
    codec = PixelCodec(PixelConfig(patch=1))
    values = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 1, 3)[:, :64].contiguous()
    for start in range(0, 256, 64):
        pixels = values + start
        latents = codec.encode(pixels)
        assert torch.equal(codec.decode(latents), pixels)
        assert torch.equal(codec.decode(latents + 0.003), pixels) and torch.equal(codec.decode(latents - 0.003), pixels)
    assert int(codec.decode(torch.full((1, 1, 1, 3), 9.0)).min()) == 255


def test_a_patch_keeps_its_place() -> None:
    codec = PixelCodec(PixelConfig(patch=2))
    pixels = pictures(1, 4, 6)
    latents = codec.encode(pixels)
    expected = pixels[0, 2:4, 4:6].reshape(-1).float() / 127.5 - 1
    assert torch.equal(latents[0, 1, 2], expected)


def test_a_clip_must_fill_its_chunks() -> None:
    codec = PixelCodec(PixelConfig(patch=4, frames_per_chunk=2))
    with pytest.raises(ValueError, match="3 frames does not fill chunks of 2"):
        codec.encode_video(pictures(3, 8, 8))
    with pytest.raises(ValueError, match="at least one chunk"):
        codec.decode_video([])


def test_unknown_kind_and_missing_or_damaged_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        load_codec(tmp_path)
    with pytest.raises(ValueError, match="unknown codec 'pixel'; did you mean 'pixels'"):
        codecs.get("pixel")
    directory = make("autoencoder").save(tmp_path / "codec")
    for name in ("model.safetensors", "config.json"):
        path = directory / name
        intact = path.read_bytes()
        path.write_bytes(intact[:-2] + bytes([intact[-2] ^ 128]) + intact[-1:])
        with pytest.raises(ValueError, match=f"{name} does not match its digest"):
            load_codec(directory)
        path.write_bytes(intact)


def test_config_json_is_plain_and_names_its_kind(tmp_path) -> None:
    directory = make("fsq").save(tmp_path / "codec")
    config = json.loads((directory / "config.json").read_text())
    assert config["kind"] == "fsq" and config["levels"] == [8, 5] and len(config["mean"]) == 2


def test_psnr_follows_its_definition() -> None:
    white = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    assert psnr(white, white).isinf().all()
    assert torch.allclose(psnr(white, white - 255), torch.zeros(1))
    assert torch.allclose(psnr(white, white - 1), torch.tensor([48.1308]), atol=1e-3)
