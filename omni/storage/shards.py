"""The tensors of a folder of safetensors files: names, shapes and dtypes from the headers, rows on demand. The files
are mapped into memory. Nothing here runs code from a checkpoint, or reads pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from omni.config import parse_json, table_of
from omni.errors import DamagedError

WEIGHTS = "model.safetensors"
MAX_JSON_BYTES, MAX_SHARDS = 64 << 20, 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A published tensor. dtype None: a type that is not a float of 16 to 64 bits, named in `kind`."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str


class SafetensorsFolder:
    """One safetensors file, or the shards of NAME.index.json. name: of the file. keep: whether a tensor is wanted, by
    its name; shards without a wanted one are not opened, and need not be there. ValueError where there is neither;
    DamagedError for a missing or damaged shard, and for a tensor that is in two, or not where the index lists it."""

    def __init__(self, folder: Path, name: str = WEIGHTS, keep: Callable[[str], bool] = lambda name: True) -> None:
        self._place: dict[str, Any] = {}
        self._index = f"{name}.index.json"
        self.tensors: dict[str, Stored] = {}
        self.files = _shards(folder, name, keep)
        for path, listed in self.files.items():
            self._add(path, listed, keep)

    def _add(self, path: Path, listed: set[str] | None, keep: Callable[[str], bool]) -> None:
        try:
            file = safe_open(str(path), framework="pt")
            names = set(file.keys())
            found = {name: file.get_slice(name) for name in names if keep(name)}
        except Exception as error:  # SafetensorError, the system's, and others of the reader
            raise DamagedError(
                f"{path} is not a safetensors file ({' '.join(str(error).split())}); download it again"
            ) from None
        for name in sorted((listed or set()) - names):
            raise DamagedError(f"{path} has no tensor {name!r}, which {self._index} lists there; download both again")
        for name, part in found.items():
            if name in self.tensors:
                raise DamagedError(f"{path} has a second tensor {name!r}; remove the file that is left over")
            kind = str(part.get_dtype())
            self.tensors[name] = Stored(tuple(part.get_shape()), DTYPES.get(kind), kind)
            self._place[name] = file

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, mapped."""
        return self._place[name].get_tensor(name)

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor; those of a slice are mapped, not copied."""
        return self.tensor(name)[index]


def _shards(folder: Path, name: str, keep: Callable[[str], bool]) -> dict[Path, set[str] | None]:
    """The files of weights, with the wanted names that the index lists for each."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return {folder / name: None}
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which is not read: convert it" if others else ""
        raise ValueError(f"{folder} holds no {name} and no {index.name}{hint}")
    table = read_table(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise DamagedError(f"{index} has no weight_map of names to files; download it again")
    found: dict[Path, set[str] | None] = {}
    for tensor, file in table.items():
        plain = PurePosixPath(file)
        if plain.is_absolute() or ".." in plain.parts or "\\" in file or "\0" in file or not plain.parts:
            raise DamagedError(f"{index}: {tensor} is in {file!r:.200}, outside of the folder")
        if not keep(tensor):
            continue
        names = found.setdefault(folder / plain, set())
        assert names is not None
        names.add(tensor)
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise DamagedError(f"{missing[0]} is missing, which {index.name} names; download it again")
    if len(found) > MAX_SHARDS:
        raise DamagedError(f"{index} names {len(found)} files; at most {MAX_SHARDS} are read")
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
