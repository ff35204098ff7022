"""A saved codec, of whatever family, or a published autoencoder.

A model directory may refer to the codec of the bundled model in place of a copy. Its codec/config.json is then

    {"kind": "bundled", "files": {name: digest}, "options": {"patch": 2}}

with digests of the files of that codec, and options that replace keys of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from omni.checkpoint import Published
from omni.codecs.autoencoders import AutoencoderCodec
from omni.codecs.codec import CONFIG_FILE, WEIGHTS_FILE, Codec, codecs
from omni.codecs.published import check_layout
from omni.config import Frozen, build, parse_json, table_of
from omni.errors import DamagedError

BUNDLED = Path(__file__).parents[1] / "bundled"  # the model that is part of the package
REFERENCE: Literal["bundled"] = "bundled"


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
    config = files.table(CONFIG_FILE)
    if config.get("kind") == REFERENCE:
        reference = build(config, Reference, str(files.root / CONFIG_FILE))
        return read_codec(reference.target(), {**reference.options, **(options or {})})
    config |= options or {}
    weights = files.tensors(WEIGHTS_FILE) if WEIGHTS_FILE in files else {}
    return codecs.get(str(config.get("kind", ""))).restored(config, weights, str(files.root))


class Reference(Frozen):
    """A codec/config.json that refers to the codec of the bundled model."""

    kind: Literal["bundled"] = REFERENCE
    files: dict[str, str]
    options: dict[str, Any] = {}

    def target(self) -> Published:
        """The files of that codec. DamagedError where they are others than those referred to."""
        found = _bundled()
        if _digests(found) != self.files:
            raise DamagedError(
                f"{found.root} is another codec than the one that this model was made with; use the version of omni "
                "that the model belongs to"
            )
        return found


def with_reference(files: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a model directory, with a reference in place of the bundled codec, if that is the one in it."""
    config, weights = (files.get(f"codec/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE))
    bundled = _bundled()
    if not isinstance(config, str) or not isinstance(weights, Mapping):
        return dict(files)
    ours, theirs = parse_json(config, CONFIG_FILE), bundled.tensors(WEIGHTS_FILE)
    if weights.keys() != theirs.keys() or not all(torch.equal(weights[name], theirs[name]) for name in theirs):
        return dict(files)
    base = parse_json(read_codec(bundled).files()[CONFIG_FILE], CONFIG_FILE)
    if not base.keys() <= ours.keys():
        return dict(files)
    options = {name: value for name, value in ours.items() if base.get(name) != value}
    text = Reference(files=_digests(bundled), options=options).model_dump_json(indent=1) + "\n"
    others = {name: content for name, content in files.items() if not name.startswith("codec/")}
    return {**others, f"codec/{CONFIG_FILE}": text}


def _bundled() -> Published:
    return Published(BUNDLED).folder("codec")


def _digests(files: Published) -> dict[str, str]:
    return {name: entry["blake2b"] for name, entry in files.files.items()}


def _is_diffusers(path: Path) -> bool:
    """Whether a config.json is diffusers' own. A damaged file is not: the digest check names the damage."""
    try:
        return "_class_name" in table_of(parse_json(path.read_bytes(), str(path)), str(path))
    except ValueError:
        return False
