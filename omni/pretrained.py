"""Load a model from a published directory (see Omni.save_pretrained): weights, tokenizer, codec, encoder, preparation,
defaults. Where the directory leaves out the language model that it was built on, see omni.importers.base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from omni.checkpoint import MANIFEST, manifest_digest
from omni.codecs import read_codec
from omni.codecs.loading import BUNDLED
from omni.config import build, parse_json, table_of
from omni.encoders import read_encoder
from omni.errors import DamagedError
from omni.generation.options import check_defaults
from omni.importers.base import Report
from omni.importers.model_files import ModelFiles
from omni.media.preparation import read_preparation
from omni.model import Omni, OmniConfig
from omni.nn.precision import require_device
from omni.text import load_tokenizer
from omni.weights import load_weights, stays_finite, unallocated

CODEC_CONFIG, TOKENIZER_CONFIG, ENCODER_CONFIG = "config.json", "tokenizer_config.json", "config.json"
WEIGHTS = "model.safetensors"
SHIPPED = {"smol": BUNDLED.parent / "smol"}  # model directories that are part of the package, by name


def model_folder(path: str | Path | None = None) -> Path:
    """The model directory of a path or a name: None is the bundled model, and "smol" a shipped one ("./smol" is a
    path). ValueError for a shipped model that is not there."""
    if path is None:
        return BUNDLED
    shipped = SHIPPED.get(str(path))
    if shipped is not None and not shipped.is_dir():
        raise ValueError(f"the model {str(path)!r} is not part of this installation: there is no {shipped}; "
                         "use another version of omni, or give a model directory")  # fmt: skip
    return Path(path) if shipped is None else shipped


def from_pretrained(
    path: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
    base: str | Path | None = None, report: Report | None = None,
) -> Omni:  # fmt: skip
    """Load a model directory (default: the bundled model; "smol": see model_folder). Every byte is checked against the
    manifest; files that it does not list are not read. A learned codec or encoder builds its network on first use.

    base: file or folder of the language model that the directory leaves out, if it does; None: see
    importers.base.find_base. report: gets a line about where that is.

    Raises ValueError naming the file if one is missing, damaged or not listed, or if a weight is missing, unknown, not
    finite, or of wrong shape or kind; and for an unavailable device.
    """
    folder = model_folder(path)
    if not folder.is_dir():
        raise ValueError(
            f"no model directory at {str(folder)!r}; give a directory that holds config.json and model.safetensors"
        )
    if not (folder / MANIFEST).is_file() and _model_type(folder) not in (None, "omni"):
        raise ValueError(f"{str(folder)!r} is a published language model; import it: omni import {folder} --out DIR")
    require_device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype} is not a floating type; use torch.float32, torch.bfloat16 or torch.float64")
    files = ModelFiles(folder, base, report)
    config = build(files.table("config.json"), OmniConfig, str(folder / "config.json"))
    model = _with_weights(config, files, dtype)
    tokenizer, codec, encoder = (files.folder(name) for name in ("tokenizer", "codec", "encoder"))
    if TOKENIZER_CONFIG in tokenizer:
        model.tokenizer = load_tokenizer(tokenizer.root, tokenizer.read)
    if CODEC_CONFIG in codec:
        model.codec = read_codec(codec).to(device)
    if ENCODER_CONFIG in encoder:
        model.encoder = read_encoder(encoder).to(device)
    model.published = files.published()
    defaults = files.table("generation.json") if "generation.json" in files else {}
    stored = files.table("preparation.json") if "preparation.json" in files else None
    model.preparation, defaults = read_preparation(stored, defaults, str(folder))
    model.defaults = check_defaults(defaults, str(folder / "generation.json"))
    model.base = None if files.base is None else files.base.closed()
    model.origin = {"path": "bundled" if path is None else str(path), "digest": manifest_digest(folder)}
    files.read_rest()
    _check_attached(model, str(folder))
    return model.to(device).eval()


def _model_type(folder: Path) -> Any:
    """The model_type of a config.json, where it can be read."""
    try:
        return table_of(parse_json((folder / "config.json").read_bytes(), "config.json"), "config.json").get(
            "model_type"
        )
    except (OSError, ValueError):
        return None


def _with_weights(config: OmniConfig, files: ModelFiles, dtype: torch.dtype) -> Omni:
    """The model in `dtype`. Weights of a large file that are stored in this dtype stay mapped, and those of a language
    model were made for it; others are copied, one at a time."""
    with unallocated():
        model = Omni(config).to(dtype)
    tensors = files.weights(WEIGHTS, dtype)
    if out_of_range := [name for name, value in tensors.items() if not stays_finite(dtype, value)]:
        raise ValueError(f"{files.root}: {out_of_range[0]} has values out of the range of {dtype}; use torch.bfloat16")
    copy = files.base is None and not files.is_large(WEIGHTS)
    load_weights(model, tensors, str(files.root / WEIGHTS), copy)
    return model


def _check_attached(model: Omni, source: str) -> None:
    """ValueError if the tokenizer, the codec or the encoder does not fit the model."""
    config = model.config
    if model.tokenizer is not None and model.tokenizer.vocab_size != config.vocab_size:
        theirs = model.tokenizer.vocab_size
        raise DamagedError(f"{source}: the tokenizer has {theirs} ids, vocab_size is {config.vocab_size}")
    if model.codec is not None and config.flow is not None and model.codec.spec.channels != config.channels:
        theirs = model.codec.spec.channels
        raise DamagedError(f"{source}: the codec has {theirs} channels, flow.channels is {config.channels}")
    if model.encoder is not None and (config.encoder is None or model.encoder.spec.width != config.encoder.width):
        ours = "is absent" if config.encoder is None else f"is {config.encoder.width}"
        raise DamagedError(f"{source}: the encoder has {model.encoder.spec.width} features, encoder.width {ours}")
