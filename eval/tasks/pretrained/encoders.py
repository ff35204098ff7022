"""Picture encoders against transformers' own modules and image processors, on tiny towers of random weights.

preparation: the largest difference of a prepared pixel, in units of 1/255, from Pillow's resize to the same size.
Legend: h, w rows and columns of features, E features of a position.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from eval.peers import quiet_transformers, version_of
from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.encoders import load_encoder
from omni.encoders.upstream import tower_classes
from omni.media.preparation import encoder_size, resized
from omni.rng import Key

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZE = (64, 96)  # of the picture whose preparation is compared
_QWEN = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "depth": 4, "out_hidden_size": 48, "patch_size": 8}
_SIGLIP = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 48,
    "patch_size": 8,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "siglip": _SIGLIP,
    "qwen2_5_vl": {**_QWEN, "window_size": 32, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl": {**_QWEN, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]},
}
_BOUNDS = {"shortest_edge": 16 * 16, "longest_edge": 48 * 80}


def measure() -> list[dict[str, Any]]:
    """A row {encoder, width, grid, difference, preparation} per encoder. difference: the largest of a feature, relative
    to the largest feature, float32, on a picture that needs no resize. ImportError without transformers."""
    rows = []
    for kind in TOWERS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(kind, Path(folder)))
    return rows


def _row(kind: str, folder: Path) -> dict[str, Any]:
    module = write_checkpoint(kind, folder)
    encoder = load_encoder(folder)
    picture = smooth_pixels(48, 48 if kind == "siglip" else 64)
    wanted, found = published_features(kind, module, folder, picture), encoder.encode(picture[None])[0]
    other = smooth_pixels(*SIZE)
    size = encoder_size(*SIZE, encoder.spec.sizes)
    by_pillow = np.asarray(PILImage.fromarray(other.numpy()).resize(size[::-1], PILImage.Resampling.BICUBIC))
    off = (resized(other, size, encoder.spec.sizes.resample).int() - torch.tensor(by_pillow).int()).abs()
    return {
        "encoder": kind,
        "width": encoder.spec.width,
        "grid": list(found.shape[:2]),
        "difference": float((found.flatten(0, 1) - wanted).abs().max() / wanted.abs().max()),
        "preparation": int(off.max()),
    }


def write_checkpoint(kind: str, folder: Path) -> Any:
    """A tiny tower of random weights, saved by its own class with a preprocessor_config.json; returns it."""
    settings, tower = tower_classes(kind)
    module = tower(settings(**TOWERS[kind])).eval()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(Key(1).fold(name).normal(tuple(value.shape)) * 0.2 + (value.ndim == 1) * 0.2)
    module.save_pretrained(folder)
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 48, "width": 48}}
    qwen = {"image_processor_type": "Qwen2VLImageProcessor", "size": _BOUNDS, "patch_size": 8}
    preparation = {**(siglip if kind == "siglip" else qwen), "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return module


def smooth_pixels(height: int, width: int) -> Tensor:
    """uint8 (H, W, 3), smooth: resampling noise would measure clipping."""
    noise = Key(0).fold("pixels").normal((1, 3, height // 6, width // 6))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
    return (smooth * 60 + 128).clamp(0, 255).byte()[0].permute(1, 2, 0).contiguous()


@torch.no_grad()
def published_features(kind: str, module: Any, folder: Path, picture: Tensor) -> Tensor:
    """Features (h w, E) of uint8 (H, W, 3), by transformers alone, from pixels on."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    given = processor(images=[picture.numpy()], return_tensors="pt")
    if kind == "siglip":
        return module(given["pixel_values"]).last_hidden_state[0]
    return module(given["pixel_values"], grid_thw=given["image_grid_thw"]).pooler_output


# ---- the task ------------------------------------------------------------------------------------------------------


@task("pretrained_encoders", TaskOptions, rows=[f"{kind}{end}" for kind in TOWERS for end in ("", "_preparation")])
def pretrained_encoders(context: Context, options: TaskOptions) -> Outcome:
    """Largest difference of a picture encoder's features to transformers, of the largest feature; and of a prepared
    pixel to Pillow, in units of 1/255."""
    version = f"transformers {version_of('transformers')}"
    quiet_transformers()
    measures = []
    for row in measure():
        kind, note = row["encoder"], f"{row['width']} features at each place of {row['grid']}, float32; {version}"
        measures.append(Measure(kind, row["difference"], "", note))
        measures.append(Measure(f"{kind}_preparation", row["preparation"], "1/255", f"resized from {SIZE}"))
    return Outcome(measures)
