"""A saved codec, of whatever family, or a published autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni.checkpoint import Published
from omni.codecs.autoencoders import AutoencoderCodec
from omni.codecs.codec import CONFIG_FILE, WEIGHTS_FILE, Codec, codecs
from omni.codecs.published import check_layout
from omni.config import parse_json, table_of


def load_codec(directory: str | Path, **options: Any) -> Codec:
    """The codec that `save` wrote, or a diffusers autoencoder checkpoint directory (its config has `_class_name`).

    options: keys of the codec's configuration that replace stored ones, such as tile = 512 (see AutoencoderConfig).
    Saved codecs are checked against their manifest (in the directory or in the model directory above it). Raises
    ValueError for a missing or damaged file, another layout, an unknown kind, or weights that do not belong to the
    configuration.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        check_layout(directory)
    if _is_diffusers(path):
        return AutoencoderCodec.from_diffusers(directory, **options)
    return read_codec(Published.around(directory), options)


def read_codec(files: Published, options: Mapping[str, Any] | None = None) -> Codec:
    """The codec in a published directory, or in the view of one. options: as of `load_codec`."""
    config = {**files.table(CONFIG_FILE), **(options or {})}
    weights = files.tensors(WEIGHTS_FILE) if WEIGHTS_FILE in files else {}
    return codecs.get(str(config.get("kind", ""))).restored(config, weights, str(files.root))


def _is_diffusers(path: Path) -> bool:
    """Whether a config.json is diffusers' own. A damaged file is not: the digest check names the damage."""
    try:
        return "_class_name" in table_of(parse_json(path.read_bytes(), str(path)), str(path))
    except ValueError:
        return False
