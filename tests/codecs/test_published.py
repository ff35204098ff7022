"""Published autoencoder classes behind the codec, on tiny random checkpoints of their own `save_pretrained`.

The formulas are those of the pipelines of diffusers, applied to the outputs of the class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from einops import rearrange

from eval.tasks.pretrained.autoencoders import TINY, random_pixels, round_trip, tiling, write_published
from omni.codecs import AutoencoderCodec, AutoencoderConfig, load_codec
from omni.codecs.autoencoder_config import ClassName
from omni.codecs.autoencoders import batch_norm_statistics, to_pictures
from omni.codecs.families import FAMILIES
from omni.codecs.networks import decoded_pictures, encoded_latents
from omni.codecs.tiles import Grid, in_tiles
from omni.codecs.upstream import MODULES
from omni.errors import DamagedError
from omni.rng import Key

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """Name of TINY -> (module, folder, codec), each written and opened once."""

    @cache
    def write(name: str) -> tuple[Any, Path, AutoencoderCodec]:
        folder = tmp_path_factory.mktemp("published") / "vae"
        return write_published(name, folder), folder, opened(folder)

    return write


FAST = ("SDXL", "DC-AE, Sana", "Wan 2.1")  # of the slower checks, by default


def slow_but(names: Iterable[str]) -> list[Any]:
    """All instances, those but `names` marked slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


def opened(folder: Path, **options: Any) -> AutoencoderCodec:
    codec = load_codec(folder, **options)
    assert isinstance(codec, AutoencoderCodec)
    return codec


def pipeline_latents(name: str, module: Any, pictures: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) as the class's pipeline hands them to its denoiser, but for the order of packed channels."""
    settings, raw = module.config, encoded_latents(module, pictures)
    if name == "FLUX.2":  # Flux2Pipeline._encode_vae_image
        packed = torch.nn.functional.pixel_unshuffle(raw, 2)  # its _patchify_latents
        mean = module.bn.running_mean.view(1, -1, 1, 1)
        return (packed - mean) / torch.sqrt(module.bn.running_var.view(1, -1, 1, 1) + settings.batch_norm_eps)
    if "latents_mean" in settings and settings.latents_mean is not None:
        mean, std = (torch.tensor(settings[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        if name == "SDXL":  # StableDiffusionXLImg2ImgPipeline.prepare_latents
            return (raw - mean) * settings.scaling_factor / std
        return (raw - mean) * (1.0 / std)  # WanImageToVideoPipeline, QwenImageEditPipeline
    shift = getattr(settings, "shift_factor", None) or 0.0
    return (raw - shift) * settings.scaling_factor


@pytest.mark.slow
def test_the_patches_of_flux2_are_those_of_its_pipeline() -> None:
    """Slow: the pipeline imports transformers."""
    raw = Key(0).normal((2, 3, 8, 6))
    theirs = diffusers.Flux2Pipeline._patchify_latents(raw)
    assert torch.equal(theirs, torch.nn.functional.pixel_unshuffle(raw, 2))


def test_the_tables_of_classes_agree() -> None:
    assert set(MODULES) == set(FAMILIES) == set(get_args(ClassName)) == {name for name, _ in TINY.values()}


@pytest.mark.parametrize("name", TINY)
class TestClasses:
    def test_latents_equal_the_formula_of_the_pipeline(self, name: str, published) -> None:
        module, _, codec = published(name)
        pixels = random_pixels(2, 64, 32, seed=3)
        with torch.no_grad():
            expected = pipeline_latents(name, module, to_pictures(pixels))
        if name == "FLUX.2":
            expected = rearrange(expected, "b (c p q) h w -> b (p q c) h w", p=2, q=2)
        latents = codec.encode(pixels)
        assert latents.shape[1:3] == codec.grid(64, 32)
        torch.testing.assert_close(latents, expected.permute(0, 2, 3, 1), atol=2e-5, rtol=1e-4)

    def test_latents_have_the_deviation_that_the_configuration_claims(self, name: str, published) -> None:
        codec = published(name)[2]
        latents = codec.encode(random_pixels(8, 64, 64, seed=1)).flatten(0, 2)
        if codec.mean.unique().numel() > 1:
            assert latents.mean(0).abs().max() < 1e-4
            assert (latents.std(0, correction=0) - 1).abs().max() < (4e-3 if name == "FLUX.2" else 1e-4)  # its epsilon
        else:
            assert (latents.std(correction=0) - 1).abs() < 1e-4
            assert not codec.mean.any() or latents.mean().abs() < 1e-4


@pytest.mark.parametrize("name", slow_but((*FAST, "FLUX.2", "TAESD", "Wan 2.2", "HunyuanVideo 1.5")))
def test_the_round_trip_equals_that_of_the_class(name: str, published) -> None:
    module, _, codec = published(name)
    assert round_trip(codec, module) < 2e-5
    pixels = random_pixels(1, 32, 32, seed=4)
    with torch.no_grad():
        theirs = decoded_pictures(module, encoded_latents(module, to_pictures(pixels)))
    theirs = ((theirs + 1) * 127.5).clamp(0, 255)
    assert (codec.decode(codec.encode(pixels)) - theirs.permute(0, 2, 3, 1)).abs().max() < 0.51


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(("SDXL", "FLUX.2", "Wan 2.2")))
def test_weights_are_saved_as_they_came(name: str, dtype: torch.dtype, tmp_path) -> None:
    write_published(name, tmp_path / "theirs", dtype)
    codec = opened(tmp_path / "theirs")
    assert all(v.dtype != dtype for v in codec.module.state_dict().values())  # float32 in memory
    codec.save(tmp_path / "ours")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    ours = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys() and dtype in {value.dtype for value in ours.values()}
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    again = opened(tmp_path / "ours")
    assert again._module is None and again.spec == codec.spec
    pixels = random_pixels(1, 32, 32)
    assert torch.equal(again.encode(pixels), codec.encode(pixels))
    again.save(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("name", slow_but(FAST))
def test_tiles_compute_the_picture_unless_norms_look_at_all_of_it(name: str, published) -> None:
    module, folder, codec = published(name)
    worst = tiling(codec, folder)
    if any(isinstance(layer, torch.nn.GroupNorm) for layer in module.modules()):
        assert 1e-3 < worst < 10  # if it is less, the docstring of tiles.py is wrong
    else:
        assert worst < 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", slow_but(FAST))
def test_half_precision_is_close(name: str, precision: Any, published, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = published(name)[2]
    pixels = random_pixels(1, 32, 64)
    exact = codec.encode(pixels)
    monkeypatch.setattr(codec, "_precision", precision)  # force_upcast is tested apart
    close = codec.encode(pixels)
    assert close.dtype == torch.float32 and 0 < (close - exact).abs().mean() < 0.03
    assert (codec.decode(close).float() - codec.decode(exact)).abs().mean() < 4


def test_float16_is_refused_where_the_configuration_says_that_it_overflows(published) -> None:
    codec = opened(published("SDXL")[1])
    with pytest.raises(ValueError, match="float16' overflows.*force_upcast.*use 'bfloat16' or 'float32'"):
        codec.precision = "float16"
    codec.precision = "bfloat16"
    opened(published("SD3, FLUX")[1]).precision = "float16"
    with pytest.raises(ValueError, match="precision = 'half' must be one of float32, bfloat16, float16"):
        codec.precision = "half"  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------------------- options


def test_packed_positions_are_patches_of_raw_latents(published) -> None:
    plain, packed = published("SDXL")[2], opened(published("SDXL")[1], patch=2)
    assert packed.spec.stride == (1, 4, 4) and packed.spec.channels == 16 and len(packed.mean) == 4
    pixels = random_pixels(2, 16, 24)
    expected = rearrange(plain.encode(pixels), "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)
    latents = packed.encode(pixels)
    assert torch.equal(latents, expected)
    assert torch.equal(packed.decode(latents), plain.decode(plain.encode(pixels)))
    assert torch.equal(latents[0, 1, 2, 4:8], plain.encode(pixels)[0, 2, 5])  # row 0, column 1 of the patch


def test_the_statistics_of_flux2_are_in_the_order_of_positions(published) -> None:
    module, folder, _ = published("FLUX.2")
    mean, deviation = batch_norm_statistics(module, 2)
    c, p, q = 1, 0, 1
    theirs = module.bn.running_mean[c * 4 + p * 2 + q], module.bn.running_var[c * 4 + p * 2 + q]
    assert mean[(p * 2 + q) * 3 + c] == pytest.approx(float(theirs[0]))
    assert deviation[(p * 2 + q) * 3 + c] == pytest.approx(float((theirs[1] + 1e-4).sqrt()))
    with pytest.raises(ValueError, match="patch = 1 must be 2: AutoencoderKLFlux2"):
        opened(folder, patch=1)


def test_statistics_of_a_loaded_batch_norm_replace_those_of_a_new_one(published) -> None:
    """A configuration without mean and deviation, as a recipe gives it."""
    module, _, loaded = published("FLUX.2")
    class_name, arguments = TINY["FLUX.2"]
    codec = AutoencoderCodec.from_config({"class_name": class_name, "model": arguments}, "test")
    assert codec.deviation.unique().numel() == 1
    codec.load_weights(module.state_dict(), "test")
    assert torch.equal(codec.mean, loaded.mean) and torch.equal(codec.deviation, loaded.deviation)


def test_a_sample_of_the_posterior_is_keyed_by_seed_and_pixels(published, tmp_path) -> None:
    module, folder, mean = published("SDXL")
    sample = opened(folder, posterior="sample", posterior_seed=3)
    pixels = random_pixels(3, 32, 32)
    pixels[2] = pixels[0]
    latents = sample.encode(pixels)
    assert torch.equal(latents[0], latents[2]) and torch.equal(latents[:1], sample.encode(pixels[:1]))
    with torch.no_grad():
        spread = module.encode(to_pictures(pixels)).latent_dist.std.permute(0, 2, 3, 1) / mean.deviation
    names = [hashlib.blake2b(one.numpy().tobytes(), digest_size=16).hexdigest() for one in pixels]
    noise = torch.stack([Key(3).fold("posterior", name).normal((4, 16, 16)).permute(1, 2, 0) for name in names])
    assert (spread - 1 / mean.deviation).abs().max() > 0.1 and (noise[0] - noise[1]).abs().max() > 1
    torch.testing.assert_close(latents, mean.encode(pixels) + spread * noise, atol=1e-4, rtol=1e-4)
    other = opened(folder, posterior="sample", posterior_seed=4).encode(pixels)
    assert (other - latents).abs().max() > 0.1
    sample.save(tmp_path / "ours")
    assert torch.equal(opened(tmp_path / "ours").encode(pixels), latents)
    tiled = opened(folder, posterior="sample", posterior_seed=3, tile=32, overlap=8)
    assert torch.equal(tiled.encode(pixels), latents)  # one tile


def test_pictures_are_decoded_in_slices(published, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the class's own enable_slicing computes them."""
    module, folder, whole = published("SDXL")
    codec, passes = opened(folder, decode_batch=2), []
    network = codec.decode_pictures
    monkeypatch.setattr(codec, "decode_pictures", lambda x: passes.append(len(x)) or network(x))
    latents = whole.encode(random_pixels(5, 32, 32))
    pixels = codec.decode(latents)
    assert passes == [2, 2, 1]
    module.enable_slicing()
    with torch.no_grad():
        theirs = decoded_pictures(module, codec.denormalised(latents)).permute(0, 2, 3, 1)
    module.disable_slicing()
    assert (pixels - ((theirs + 1) * 127.5).clamp(0, 255)).abs().max() < 0.501


def test_tiles_overlap_by_what_a_position_depends_on() -> None:
    """A convolution of five cells: an overlap of two is exact, of one is not; each pass sees at most a tile."""
    weight, seen = Key(0).normal((1, 1, 5, 5)), []

    def blur(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2:])
        return torch.nn.functional.conv2d(x, weight, padding=2)

    x = Key(1).normal((2, 1, 13, 9))
    whole = blur(x)
    torch.testing.assert_close(in_tiles(blur, x, Grid(4, 2), 1), whole)
    assert max(max(shape) for shape in seen[1:]) == 8 and len(seen) == 1 + 4 * 3
    assert (in_tiles(blur, x, Grid(4, 1), 1) - whole).abs().max() > 0.1
    assert torch.equal(in_tiles(blur, x, Grid(13, 0), 1), whole)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SDXL", {"tile": 33}, "tile = 33 pixels is no multiple of the autoencoder's stride 2"),
        ("SDXL", {"tile": 32, "overlap": 3}, "overlap = 3 pixels is no multiple"),
        ("SDXL", {"overlap": 8}, "overlap = 8 has no effect without a tile"),
        ("SDXL", {"posterior_seed": 1}, "posterior_seed = 1 has no effect"),
        ("DC-AE", {"posterior": "sample"}, "AutoencoderDC has no posterior"),
        ("SDXL", {"patch": 9}, "patch"),
        ("SDXL", {"pach": 2}, "unknown key 'pach'; did you mean 'patch'"),
    ],
)
def test_options_without_effect_and_out_of_bounds_raise(name: str, options: dict, message: str, published) -> None:
    with pytest.raises(ValueError, match=message):
        opened(published(name)[1], **options)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "Wan 2.1",
            {"temperal_downsample": [False, True]},
            "must have 2 entries, two of them true.*fours|groups of four",
        ),
        ("Wan 2.1", {"z_dim": 0}, "z_dim = 0 must be a whole number"),
        ("Wan 2.1", {"dim_mult": 4}, "dim_mult = 4 is no list of 1 to 16 stages"),
        ("Wan 2.2", {"patch_size": 9}, r"patch_size = 9 must lie in 1 \.\. 8"),
        ("Wan 2.2", {"in_channels": 3}, "in_channels = 3 must be 12"),
        ("Wan 2.1", {"num_res_blocks": 300}, r"num_res_blocks = 300 must lie in 0 \.\. 256"),
        ("SDXL", {"in_channels": 4}, "in_channels = 4 must be 3"),
        ("HunyuanVideo", {"temporal_compression_ratio": 3}, "temporal_compression_ratio = 3 must be a power of two"),
        ("FLUX.2", {"patch_size": [2, 4]}, r"patch_size = \[2, 4\] must be two equal numbers"),
    ],
)
def test_arguments_that_no_codec_can_have_raise(name: str, changes: dict, message: str) -> None:
    class_name, arguments = TINY[name]
    described = {"mean": [0.0] * 4, "deviation": [1.0] * 4, "temporal_compression_ratio": 4}
    needed = {key: described[key] for key in FAMILIES[class_name].arguments if key in described}
    config = {"class_name": class_name, "model": {**needed, **arguments, **changes}, "mean": [0.0], "deviation": [1.0]}
    with pytest.raises(ValueError, match=message):
        AutoencoderCodec(AutoencoderConfig(**config))


def test_a_quantised_autoencoder_is_of_pictures_and_of_single_latents() -> None:
    from omni.codecs import FsqConfig

    class_name, arguments = TINY["Wan 2.1"]
    with pytest.raises(ValueError, match="only autoencoders of pictures are quantised"):
        FsqConfig(class_name=class_name, model=arguments)
    with pytest.raises(ValueError, match="no patch, no sample"):
        FsqConfig(class_name="AutoencoderKL", model=TINY["SDXL"][1], patch=2)


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("file", ["Wan2.2_VAE.pth", "vae.ckpt", "diffusion_pytorch_model.bin"])
def test_pickle_files_are_never_read(file: str, tmp_path) -> None:
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(ValueError, match=rf"{file}' is a pickle file, which can run code and is never read"):
            load_codec(path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="holds no diffusion_pytorch_model.safetensors; weights in pickle files"):
        load_codec(tmp_path)


def test_single_files_and_damaged_files_are_named(tmp_path, published) -> None:
    safetensors.torch.save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "ae.safetensors")
    for path in (tmp_path, tmp_path / "ae.safetensors"):
        with pytest.raises(ValueError, match="ae.safetensors' is a single file in another layout; convert it"):
            load_codec(path)
    config = json.loads((published("SDXL")[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(DamagedError, match="is not a safetensors file"):
        load_codec(tmp_path)
    safetensors.torch.save_file({"encoder.conv_in.weight": torch.zeros(1, dtype=torch.float64)}, weights)
    with pytest.raises(ValueError, match="encoder.conv_in.weight is F64; weights may be F32"):
        load_codec(tmp_path)


def test_weights_in_several_files(published, tmp_path) -> None:
    module, _, whole = published("SDXL")
    module.save_pretrained(str(tmp_path / "parts"), max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    pixels = random_pixels(1, 32, 32)
    assert torch.equal(opened(tmp_path / "parts").encode(pixels), whole.encode(pixels))
