"""A saved codec, of whatever family, or a published autoencoder."""

from __future__ import annotations

from pathlib import Path

from omni.checkpoint import Published
from omni.codecs.autoencoders import AutoencoderCodec
from omni.codecs.codec import CONFIG_FILE, WEIGHTS_FILE, Codec, codecs
from omni.config import parse_json, table_of


def load_codec(directory: str | Path) -> Codec:
    """The codec that `save` wrote, or a diffusers autoencoder checkpoint directory (its config has `_class_name`).

    Saved codecs are checked against their manifest (in the directory or in the model directory above it). Raises
    ValueError for a missing or damaged file, an unknown kind, or weights that do not belong to the configuration.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{str(directory)!r} holds no {CONFIG_FILE}; give the directory of a saved codec")
    if _is_diffusers(path):
        return AutoencoderCodec.from_diffusers(directory)
    return read_codec(Published.around(directory))


def read_codec(files: Published) -> Codec:
    """The codec in a published directory, or in the view of one."""
    config = files.table(CONFIG_FILE)
    weights = files.tensors(WEIGHTS_FILE) if WEIGHTS_FILE in files else {}
    return codecs.get(str(config.get("kind", ""))).restored(config, weights, str(files.root))


def _is_diffusers(path: Path) -> bool:
    """Whether a config.json is diffusers' own. A damaged file is not: the digest check names the damage."""
    try:
        return "_class_name" in table_of(parse_json(path.read_bytes(), str(path)), str(path))
    except ValueError:
        return False
