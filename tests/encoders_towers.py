"""Tiny checkpoints of the real towers of transformers, and their own features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.rng import Key

QWEN = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "depth": 3, "out_hidden_size": 12, "patch_size": 4}
BOUNDS = {"shortest_edge": 8 * 8, "longest_edge": 40 * 40}
PREPARATIONS: dict[str, dict[str, Any]] = {
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 24, "width": 24}},
    "qwen2_5_vl": {"image_processor_type": "Qwen2VLImageProcessor", "size": BOUNDS, "patch_size": 4},
    "qwen3_vl": {"image_processor_type": "Qwen2VLImageProcessor", "size": BOUNDS, "patch_size": 4},
}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tower(kind: str) -> Any:
    """A tower of random weights, none of them at its start of ones and zeros."""
    from omni.encoders.upstream import tower_classes

    settings, made = tower_classes(kind)
    given: dict[str, Any] = {
        "siglip": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 24, "patch_size": 4,
        },
        "qwen2_5_vl": {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
        "qwen3_vl": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
    }[kind]  # fmt: skip
    module = made(settings(**given))
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(Key(1).fold(name).normal(tuple(value.shape)) * 0.3 + (value.ndim == 1) * 0.2)
    return module.eval()


def write_checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Saves the tower as its class does, with a preprocessor_config.json. Returns the tower."""
    module = tower(kind).to(dtype)
    module.save_pretrained(folder)
    preparation = {**PREPARATIONS[kind], "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return module


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (1, H, W, 3): smooth, so that resampling is meaningful."""
    noise = Key(seed).fold("pixels").normal((1, 3, max(2, height // 6), max(2, width // 6)))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
    return ((smooth * 60 + 128).clamp(0, 255).byte()).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def published_features(kind: str, module: Any, folder: Path, picture: Tensor) -> tuple[Tensor, Any]:
    """(features (h w, E), what the image processor gave) of uint8 (H, W, 3), by transformers alone."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    given = processor(images=[picture.numpy()], return_tensors="pt")
    dtype = next(module.parameters()).dtype
    if kind == "siglip":
        return module(given["pixel_values"].to(dtype)).last_hidden_state[0], given
    return module(given["pixel_values"].to(dtype), grid_thw=given["image_grid_thw"]).pooler_output, given
