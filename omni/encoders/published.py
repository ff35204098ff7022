"""Reads vision towers from local transformers checkpoints: settings, preparation of pixels, tensors.

A checkpoint is untrusted: JSON and safetensors only, sizes and names are checked, nothing runs and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from omni.checkpoint import is_finite
from omni.config import parse_json, table_of
from omni.errors import DamagedError
from omni.storage.shards import SafetensorsFolder

CONFIG = "config.json"
PREPARATIONS = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))  # file, its part
MAX_JSON_BYTES = 64 << 20
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# model_type of a checkpoint, or of its vision_config -> the kind of encoder.
KINDS = {
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_5_vl_vision": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_vision": "qwen3_vl",
}


def table(path: Path) -> dict[str, Any]:
    """The JSON object of a file. ValueError where there is none."""
    if not path.is_file():
        raise ValueError(
            f"{str(path.parent)!r} holds no {path.name}; give a local directory of a transformers checkpoint"
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES} bytes, too many for a configuration")
    return table_of(parse_json(path.read_bytes(), str(path)), str(path))


def kind_of(folder: Path) -> str:
    """The kind of encoder in a checkpoint. ValueError for another model."""
    config = table(folder / CONFIG)
    for settings in (config.get("vision_config"), config):
        name = settings.get("model_type") if isinstance(settings, dict) else None
        if isinstance(name, str) and name in KINDS:
            return KINDS[name]
    raise ValueError(
        f"{str(folder)!r} is of type {config.get('model_type')!r}, which has no known vision tower; known: "
        f"{', '.join(sorted(set(KINDS.values())))}"
    )


def settings_in(folder: Path, kind: str) -> dict[str, Any]:
    """The settings of the vision tower. ValueError for a checkpoint of another kind."""
    if (found := kind_of(folder)) != kind:
        raise ValueError(f"{str(folder)!r} holds a tower of kind {found!r}, not {kind!r}; take that encoder")
    config = table(folder / CONFIG)
    inner = config.get("vision_config")
    return inner if isinstance(inner, dict) else config


def preparation_of(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """mean, std, resample, and bounds of the pixels where the checkpoint names them. ValueError for a missing file
    unless mean and std are in `given`, and for a preparation that is not served."""
    found = _preparation_table(folder)
    if found is None:
        if {"mean", "std"} <= given.keys():
            return {}
        raise ValueError(f"{str(folder)!r} holds no {PREPARATIONS[0][0]}; copy it there, or give mean and std")
    for name in ("do_normalize", "do_rescale", "do_resize"):
        if not found.get(name, True):
            raise ValueError(f"{str(folder)!r}: {name} = false is not served; pictures are resized and normalised")
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{str(folder)!r}: rescale_factor = {found['rescale_factor']} is not 1 / 255")
    resample = found.get("resample", 3)
    if resample not in RESAMPLE:
        raise ValueError(f"{str(folder)!r}: resample = {resample} is not served; known: {RESAMPLE}")
    out = {"mean": found.get("image_mean"), "std": found.get("image_std"), "resample": RESAMPLE[resample]}
    if missing := [name for name in ("mean", "std") if out[name] is None and name not in given]:
        raise ValueError(f"{str(folder)!r}: its preparation has no image_{missing[0]}; give {missing[0]}")
    given_size = found.get("size")
    size: Mapping[str, Any] = given_size if isinstance(given_size, dict) else {}
    for bound, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = found.get(bound, size.get(edge))
        out |= {} if value is None else {bound: value}
    return {name: value for name, value in out.items() if value is not None}


def _preparation_table(folder: Path) -> dict[str, Any] | None:
    for name, part in PREPARATIONS:
        if (folder / name).is_file():
            whole = table(folder / name)
            return whole if part is None else table_of(whole.get(part), f"{folder / name}: {part}")
    return None


def tensors_below(folder: Path, prefixes: Sequence[str], parts: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the tower, by their names below the first of `prefixes` that has any of `parts`, in their own
    dtypes. Reads no others. ValueError where there are none; DamagedError for damaged files and values."""
    every = tuple(f"{prefix}{part}." for prefix in prefixes for part in parts)
    files = SafetensorsFolder(folder, keep=lambda name: name.startswith(every))
    for prefix in prefixes:
        starts = tuple(f"{prefix}{part}." for part in parts)
        if names := [name for name in files.tensors if name.startswith(starts)]:
            return {name.removeprefix(prefix): _sound(files, name, folder) for name in names}
    raise ValueError(f"{str(folder)!r} has no tensors of a vision tower, such as {prefixes[0]}{parts[0]}")


def _sound(files: SafetensorsFolder, name: str, folder: Path) -> Tensor:
    """A tensor. DamagedError for NaN or infinities."""
    value = files.tensor(name)
    if not is_finite(value):
        raise DamagedError(f"{folder}: {name} has values that are NaN or infinite; download it again")
    return value
