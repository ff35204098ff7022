"""The files of a model directory, those included that it leaves to the language model it was built on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from omni.checkpoint import Published
from omni.config import build
from omni.errors import DamagedError
from omni.importers.base import BASE_FILE, Base, BaseRecord, Report, find_base
from omni.model import PUBLISHED


class ModelFiles(Published):
    """A reader as `Published` is. Where the directory has a base.json, `base` is its language model, and `read` gives
    files with the vocabulary that they lack."""

    def __init__(self, directory: str | Path, given: str | Path | None = None, report: Report | None = None) -> None:
        """given, report: see find_base. DamagedError as of `Published` and `find_base`; ValueError for a `given` that
        has no effect."""
        super().__init__(directory)
        self.base: Base | None = None
        if BASE_FILE in self:
            record = build(self.table(BASE_FILE), BaseRecord, str(self.root / BASE_FILE))
            self.base = find_base(record, given, report)
        elif given is not None:
            raise ValueError(f"base = {str(given)!r} has no effect: {directory} has no {BASE_FILE}; leave it out")

    def read(self, name: str) -> bytes:
        data = super().read(name)
        return data if self.base is None else self.base.completed(self._prefix + name, data)

    def published(self) -> Mapping[str, bytes]:
        """The published language model's own files. Those without their vocabulary get it when they are read."""
        folder = self.folder(PUBLISHED)
        stored = {name: Published.read(folder, name) for name in folder.files}
        return stored if self.base is None else _Completed(stored, self.base.closed())

    def weights(self, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors of a file as they are stored, and those of the language model in `dtype`. DamagedError where both
        have one."""
        tensors = self.tensors(name)
        for weight, value in () if self.base is None else self.base.tensors(dtype):
            if weight in tensors:
                raise DamagedError(
                    f"{self.root / name} has {weight}, which belongs to the language model; save it again"
                )
            tensors[weight] = value
        return tensors


class _Completed(Mapping[str, bytes]):
    """Files of the folder PUBLISHED, completed by the language model one at a time."""

    def __init__(self, stored: Mapping[str, bytes], base: Base) -> None:
        self._stored, self._base = stored, base

    def __getitem__(self, name: str) -> bytes:
        return self._base.closed().completed(f"{PUBLISHED}/{name}", self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
