"""The tensors of a published checkpoint: names, shapes and dtypes from the headers, rows on demand.

`SafetensorsFolder` reads model.safetensors, or the shards of model.safetensors.index.json, mapped into memory.
omni.importers.gguf_file reads GGUF. Nothing here runs code from a checkpoint, or reads pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.config import parse_json, table_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES, MAX_SHARDS = 64 << 20, 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A published tensor. dtype None: a type that is not a float of 16 to 64 bits, named in `kind`."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str


class Source(Protocol):
    """Where published tensors come from."""

    tensors: Mapping[str, Stored]

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor, as floats of its dtype."""
        ...


class SafetensorsFolder:
    """One safetensors file or several. ValueError for a missing or damaged one, and for a tensor that is in two, or not
    where the index lists it."""

    def __init__(self, folder: Path) -> None:
        self._place: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        self.files = _shards(folder)
        for path, listed in self.files.items():
            self._add(path, listed)

    def _add(self, path: Path, listed: set[str] | None) -> None:
        try:
            file = safe_open(str(path), framework="pt")
            names = set(file.keys())
            found = {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a safetensors file ({error}); download it again") from None
        for name in sorted((listed or set()) - names):
            raise ValueError(f"{path} has no tensor {name!r}, which {INDEX} lists there; download both again")
        for name, part in found.items():
            if name in self.tensors:
                raise ValueError(f"{path} has a second tensor {name!r}; remove the file that is left over")
            kind = str(part.get_dtype())
            self.tensors[name] = Stored(tuple(part.get_shape()), DTYPES.get(kind), kind)
            self._place[name] = file

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor; those of a slice are mapped, not copied."""
        return self._place[name].get_tensor(name)[index]


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights, with the names that the index lists for each."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which is not read: convert it" if others else ""
        raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}{hint}")
    table = read_table(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of names to files; download it again")
    found: dict[Path, set[str] | None] = {}
    for name, file in table.items():
        plain = PurePosixPath(file)
        if plain.is_absolute() or ".." in plain.parts or "\\" in file or "\0" in file or not plain.parts:
            raise ValueError(f"{folder / INDEX}: {name} is in {file!r:.200}, outside of the folder")
        names = found.setdefault(folder / plain, set())
        assert names is not None
        names.add(name)
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing, which {INDEX} names; download it again")
    if len(found) > MAX_SHARDS:
        raise ValueError(f"{folder / INDEX} names {len(found)} files; at most {MAX_SHARDS} are read")
    return found


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object of a published checkpoint. ValueError for a missing, large or damaged file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES:,} bytes; it is not a file of this kind")
    return table_of(parse_json(data, str(path)), str(path))
