"""Features of the towers equal transformers' own, from pixels to features; files, refusals and resampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

pytest.importorskip("transformers")

from encoders_towers import MEAN, STD, pixels, published_features, write_checkpoint
from safetensors.torch import load_file, save_file

from omni.checkpoint import Published
from omni.encoders import Encoder, Qwen3VLEncoder, SiglipEncoder, encoders, load_encoder
from omni.errors import DamagedError
from omni.media.preparation import EncoderSizes, encoder_size, resized

KINDS = ("qwen2_5_vl", "qwen3_vl", "siglip")
SIZE = {"siglip": (24, 24), "qwen2_5_vl": (24, 40), "qwen3_vl": (24, 40)}  # needs no resize


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("towers")
    return {kind: (root / kind, write_checkpoint(kind, root / kind)) for kind in KINDS}


def flat(encoder: Encoder, picture: Tensor) -> Tensor:
    return encoder.encode(picture)[0].flatten(0, 1)


def test_every_registered_encoder_is_tested_here() -> None:
    assert set(KINDS) == set(encoders.names())


@pytest.mark.parametrize("kind", KINDS)
class TestFeatures:
    def test_equal_those_of_transformers(self, checkpoints: dict, kind: str) -> None:
        """Through its own image processor, at a size that needs no resize."""
        folder, module = checkpoints[kind]
        encoder, picture = load_encoder(folder), pixels(*SIZE[kind])
        wanted, _ = published_features(kind, module, folder, picture[0])
        found = flat(encoder, picture)
        assert found.dtype == torch.float32 and wanted.abs().max() > 0.5
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert encoder.encode(picture).shape[1:3] == encoder.spec.grid(*SIZE[kind])
        encoder.module.double()
        exact, _ = published_features(kind, module.double(), folder, picture[0])
        module.float()
        torch.testing.assert_close(flat(encoder, picture), exact, atol=1e-10, rtol=0)

    def test_with_a_resize_differ_by_the_rounding_of_pixels(self, checkpoints: dict, kind: str) -> None:
        folder, module = checkpoints[kind]
        encoder, picture = load_encoder(folder), pixels(37, 50)
        wanted, given = published_features(kind, module, folder, picture[0])
        found = flat(encoder, picture)
        assert found.shape == wanted.shape
        if "image_grid_thw" in given:
            _, h, w = given["image_grid_thw"][0].tolist()
            assert encoder.spec.grid(37, 50) == (h // 2, w // 2)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()

    def test_do_not_depend_on_the_batch(self, checkpoints: dict, kind: str) -> None:
        encoder = load_encoder(checkpoints[kind][0])
        pictures = torch.cat([pixels(24, 24, seed) for seed in range(3)])
        together = encoder.encode(pictures)
        assert torch.equal(together, torch.cat([encoder.encode(one[None]) for one in pictures]))
        assert (together[0] - together[1]).abs().max() > 1e-3

    def test_survive_saving_with_the_weights_as_they_came(self, kind: str, checkpoints: dict, tmp_path: Path) -> None:
        write_checkpoint(kind, tmp_path / "half", torch.bfloat16)
        encoder, picture = load_encoder(tmp_path / "half"), pixels(24, 24)
        found = encoder.encode(picture)
        saved = encoder.save(tmp_path / "saved")
        assert {value.dtype for value in load_file(saved / "model.safetensors").values()} == {torch.bfloat16}
        again = load_encoder(saved)
        assert again.spec == encoder.spec and torch.equal(again.encode(picture), found)
        unused = load_encoder(saved).save(tmp_path / "unused")  # the tower was never built
        assert Published(unused).files == Published(saved).files
        data = bytearray((saved / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (saved / "model.safetensors").write_bytes(data)
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            load_encoder(saved)

    def test_of_a_whole_model_in_shards(self, checkpoints: dict, kind: str, tmp_path: Path) -> None:
        """The tower's part alone is read, from the files that hold it."""
        folder, _ = checkpoints[kind]
        prefix = {"siglip": "vision_model.", "qwen2_5_vl": "visual.", "qwen3_vl": "model.visual."}[kind]
        tensors = {prefix + name: value for name, value in load_file(folder / "model.safetensors").items()}
        names, places = sorted(tensors), {"text_model.embeddings.weight": "other.safetensors"}
        for number, part in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in part}, tmp_path / f"{number}.safetensors")
            places |= dict.fromkeys(part, f"{number}.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        vision = json.loads((folder / "config.json").read_text())
        outer = {"model_type": kind, "vision_config": vision, "text_config": {"hidden_size": 8}}
        (tmp_path / "config.json").write_text(json.dumps(outer))
        (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
        found, wanted = (load_encoder(place).encode(pixels(24, 24)) for place in (tmp_path, folder))
        assert torch.equal(found, wanted)

    def test_of_weights_that_do_not_fit_are_refused(self, checkpoints: dict, kind: str, tmp_path: Path) -> None:
        folder, _ = checkpoints[kind]
        config, tensors = load_encoder(folder).config(), load_encoder(folder).weights()
        family, name = encoders.get(kind), sorted(tensors)[0]
        lacking = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(DamagedError, match="missing weights"):
            family.restored(config, lacking, "here").encode(pixels(24, 24))
        with pytest.raises(DamagedError, match="unknown weights"):
            family.restored(config, {**tensors, "blocks.9.extra": tensors[name]}, "here").encode(pixels(24, 24))
        other = {**tensors, name: torch.zeros(3)}
        with pytest.raises(DamagedError, match="has shape"):
            family.restored(config, other, "here").encode(pixels(24, 24))


@torch.no_grad()
def test_a_chosen_layer_of_siglip(checkpoints: dict) -> None:
    folder, module = checkpoints["siglip"]
    picture = pixels(24, 24)
    values = published_features("siglip", module, folder, picture[0])[1]["pixel_values"]
    h = module(values, output_hidden_states=True).hidden_states[-2]
    with_norm, without = (load_encoder(folder, select=-2, final_norm=norm) for norm in (True, False))
    torch.testing.assert_close(flat(without, picture), h[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(flat(with_norm, picture), module.post_layernorm(h)[0], atol=1e-5, rtol=0)
    assert not any("layers.2." in name for name in with_norm.weights())  # the last layer is not kept
    with pytest.raises(ValueError, match="select = -4 of a tower of 3 layers"):
        load_encoder(folder, select=-4)


@torch.no_grad()
def test_siglip_at_other_sizes(checkpoints: dict) -> None:
    folder, module = checkpoints["siglip"]
    values = torch.cat([((pixels(16, 20).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)])
    interpolated = load_encoder(folder, positions="interpolate", max_pixels=24 * 24)
    wanted = module(values, interpolate_pos_encoding=True).last_hidden_state
    assert interpolated.spec.grid(16, 20) == (4, 5)
    torch.testing.assert_close(flat(interpolated, pixels(16, 20)), wanted[0], atol=1e-5, rtol=0)
    corner = load_encoder(folder, positions="corner", max_pixels=24 * 24)
    h = module.embeddings.patch_embedding(values).flatten(2).transpose(1, 2)
    table = module.embeddings.position_embedding.weight.view(6, 6, -1)[:4, :5].flatten(0, 1)
    wanted = module.post_layernorm(module.encoder(inputs_embeds=h + table).last_hidden_state)
    torch.testing.assert_close(flat(corner, pixels(16, 20)), wanted[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="7 patches along a side"):
        corner.encode(pixels(8, 28))


@torch.no_grad()
def test_deepstack_is_concatenated(checkpoints: dict) -> None:
    folder, module = checkpoints["qwen3_vl"]
    encoder, picture = load_encoder(folder, deepstack="concatenate"), pixels(24, 40)
    values = published_features("qwen3_vl", module, folder, picture[0])[1]
    out = module(values["pixel_values"], grid_thw=values["image_grid_thw"])
    wanted = torch.cat([out.pooler_output, *out.deepstack_features], -1)
    assert isinstance(encoder, Qwen3VLEncoder) and encoder.spec.width == wanted.shape[1] == 36
    torch.testing.assert_close(flat(encoder, picture), wanted, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "clip"}, "of type 'clip', which has no known vision tower"),
        ("config.json", {"model_type": "siglip"}, "tower"),
        ("config.json", {"rope_parameters": {"rope_type": "axial", "rope_theta": 5e5}}, "rope_parameters"),
        ("config.json", {"hidden_size": 1 << 20}, "hidden_size"),
        ("config.json", {"deepstack_visual_indexes": [5]}, "must name different layers"),
        ("preprocessor_config.json", {"resample": 1}, "resample = 1 is not served"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize = false"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
        ("preprocessor_config.json", {"image_mean": None}, "no image_mean"),
        ("preprocessor_config.json", {"image_std": [0.0, 1.0, 1.0]}, "std"),
    ],
)
def test_checkpoints_that_are_not_served(
    checkpoints: dict, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    folder, _ = checkpoints["qwen3_vl"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**table, **change}))
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path)


def test_unusual_files_of_a_checkpoint(checkpoints: dict, tmp_path: Path) -> None:
    folder, _ = checkpoints["siglip"]
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"holds no preprocessor_config\.json"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json"):
        load_encoder(tmp_path, mean=MEAN, std=STD)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embeddings.x": "../a.bin"}}))
    with pytest.raises(DamagedError, match="outside of the folder"):
        load_encoder(tmp_path, mean=MEAN, std=STD)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.patch_embedding.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match=r"patch_embedding\.bias has values that are NaN"):
        load_encoder(tmp_path, mean=MEAN, std=STD)
    saved = load_encoder(folder).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="select has no effect on a saved encoder"):
        load_encoder(saved, select=-2)
    with pytest.raises(ValueError, match=r"takes uint8 pixels"):
        load_encoder(folder).encode(torch.zeros(1, 24, 24, 3))
    assert isinstance(load_encoder(saved), SiglipEncoder)


# ---------------------------------------------------------------------------------------------- pixels


def test_sizes_equal_the_published_rule() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for least, most in ((56 * 56, 28 * 28 * 40), (1, 28 * 28), (28 * 28 * 64, 1 << 24)):
        sizes = EncoderSizes(multiple=28, min_pixels=least, max_pixels=most)
        for height in (1, 10, 28, 41, 42, 43, 100, 333, 1000):
            for width in (5, 14, 56, 70, 71, 199, 640):
                if max(height, width) <= 200 * min(height, width):
                    assert encoder_size(height, width, sizes) == smart_resize(height, width, 28, least, most)
    with pytest.raises(ValueError, match="too long for an encoder"):
        encoder_size(1, 201, sizes)
    with pytest.raises(ValueError, match="raise it"):
        EncoderSizes(multiple=28, min_pixels=1000, max_pixels=999)
    with pytest.raises(ValueError, match="multiples of 28"):
        EncoderSizes(multiple=28, fixed=(28, 30))


@pytest.mark.parametrize(("resample", "number"), [("bicubic", 3), ("bilinear", 2)])
def test_resampling_is_that_of_pil(resample: Any, number: int) -> None:
    """Within 1 of 255 (bilinear: 2), in few values, at sizes where Pillow 13 resamples columns first."""
    different, total = 0, 0
    for size, target in (((50, 37), (40, 32)), ((64, 64), (24, 24)), ((20, 30), (56, 84)), ((300, 211), (56, 28))):
        picture = pixels(*size)
        wanted = np.asarray(PILImage.fromarray(picture[0].numpy()).resize(target[::-1], number))
        off = (resized(picture, target, resample)[0].int() - torch.tensor(wanted).int()).abs()
        assert off.max() <= (1 if resample == "bicubic" else 2)
        different, total = different + int((off > 0).sum()), total + off.numel()
    assert different < 0.1 * total and (resample == "bilinear" or different < 0.01 * total)
    assert resized(picture, size, resample) is picture
