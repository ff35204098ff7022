"""Reads a published autoencoder: a diffusers directory of config.json and safetensors. Other layouts are refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni.codecs.networks import use_fused_norms
from omni.codecs.upstream import MODULES, whole_class
from omni.config import parse_json, table_of
from omni.errors import DamagedError
from omni.storage.shards import SafetensorsFolder

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def class_of(path: Path) -> str:
    """The name of the class of a directory. ValueError if it is missing, of another class or layout."""
    check_layout(path)
    source = str(path / CONFIG)
    name = table_of(parse_json((path / CONFIG).read_bytes(), source), source).get("_class_name")
    if name not in MODULES:
        raise ValueError(f"{str(path)!r} is of class {name!r}; known autoencoders: {', '.join(MODULES)}")
    return str(name)


def read_published(path: Path, name: str) -> tuple[nn.Module, dict[str, Any], dict[str, torch.dtype]]:
    """(module with float32 weights, its arguments, dtype of each weight in the files). name: of its class.

    ValueError for other weight files; DamagedError for weights that are not finite.
    """
    stored = _stored_dtypes(path)
    module = whole_class(name).from_pretrained(
        str(path), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
    )
    bad = [key for key, value in module.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise DamagedError(f"{str(path)!r}: {bad[0]} has values that are NaN or infinite; download it again")
    use_fused_norms(module)
    known = inspect.signature(type(module).__init__).parameters
    arguments = {argument: value for argument, value in module.config.items() if argument in known}
    return module, json.loads(json.dumps(arguments)), _dtypes_of(module, stored)


def _dtypes_of(module: nn.Module, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The stored dtype of each weight. diffusers renames some of old files: those have the dtype of all others."""
    floating = {dtype for dtype in stored.values() if dtype.is_floating_point}
    common = floating.pop() if len(floating) == 1 else torch.float32
    return {
        name: stored.get(name, common if value.is_floating_point() else value.dtype)
        for name, value in module.state_dict().items()
    }


def check_layout(path: Path) -> None:
    """ValueError unless the path is a directory with a config.json; it names another layout where it sees one."""
    if path.is_file():
        raise ValueError(_foreign(path))
    if (path / CONFIG).is_file():
        return
    others = sorted(p for p in path.glob("*") if p.suffix in (*_PICKLES, ".safetensors")) if path.is_dir() else []
    if others:
        raise ValueError(f"{str(path)!r} holds no {CONFIG}: {_foreign(others[0])}")
    raise ValueError(
        f"{str(path)!r} holds no {CONFIG}; give a local directory of a saved codec, or of a diffusers autoencoder"
    )


def _foreign(path: Path) -> str:
    """Why one file is no autoencoder."""
    if path.suffix in _PICKLES:
        return f"{str(path)!r} is a pickle file, which can run code and is never read; give a diffusers directory"
    return (
        f"{str(path)!r} is a single file in another layout; convert it to a diffusers directory (by `from_single_file` "
        "and `save_pretrained` of its class)"
    )


def _stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor in the weight files. ValueError for no such file and for a dtype that is not kept."""
    if not any((path / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
        raise ValueError(f"{str(path)!r} holds no {WEIGHTS}; weights in pickle files are never read: convert them")
    found = SafetensorsFolder(path, WEIGHTS).tensors
    if others := [name for name, stored in found.items() if stored.kind not in _DTYPES]:
        known = ", ".join(_DTYPES)
        raise ValueError(f"{str(path)!r}: {others[0]} is {found[others[0]].kind}; weights may be {known}: convert them")
    return {name: _DTYPES[stored.kind] for name, stored in found.items()}
