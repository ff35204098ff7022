"""A saved encoder, of whatever family, or the tower of a transformers checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni.checkpoint import Published
from omni.config import parse_json, table_of
from omni.encoders.encoder import CONFIG_FILE, WEIGHTS_FILE, Encoder, encoders
from omni.encoders.published import kind_of
from omni.encoders.tower import TowerEncoder


def load_encoder(directory: str | Path, **options: Any) -> Encoder:
    """The encoder that `save` wrote, or the vision tower of a local transformers checkpoint, with `options` of its
    configuration (see TowerEncoder.from_transformers).

    Saved encoders are checked against their manifest (in the directory or in the model directory above it). ValueError
    for a missing or damaged file, an unknown kind, options for a saved encoder, or weights that do not belong to the
    configuration.
    """
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{str(folder)!r} holds no {CONFIG_FILE}; give a saved encoder, or a transformers checkpoint")
    if not _is_saved(folder / CONFIG_FILE):
        family = encoders.get(kind_of(folder))
        assert issubclass(family, TowerEncoder)
        return family.from_transformers(folder, **options)
    if options:
        raise ValueError(f"{sorted(options)[0]} has no effect on a saved encoder; change it from its checkpoint")
    return read_encoder(Published.around(folder))


def read_encoder(files: Published) -> Encoder:
    """The encoder in a published directory, or in the view of one."""
    config, weights = files.table(CONFIG_FILE), files.tensors(WEIGHTS_FILE)
    return encoders.get(str(config.get("kind", ""))).restored(config, weights, str(files.root))


def _is_saved(path: Path) -> bool:
    """Whether a config.json is of this library. A damaged file is: the digest check names the damage."""
    try:
        return "kind" in table_of(parse_json(path.read_bytes(), str(path)), str(path))
    except ValueError:
        return True
