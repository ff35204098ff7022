"""The files of a model directory, those included that it leaves to the language model it was built on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from omni.checkpoint import Published
from omni.config import build
from omni.errors import DamagedError
from omni.importers.base import BASE_FILE, Base, BaseRecord, Report, find_base


class ModelFiles(Published):
    """A reader as `Published` is. Where the directory has a base.json, `base` is its language model, and `read` gives
    files with the vocabulary that they lack."""

    def __init__(self, directory: str | Path, given: str | Path | None = None, report: Report | None = None) -> None:
        """given, report: see find_base. DamagedError as of `Published` and `find_base`; ValueError for a `given` that has
        no effect."""
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

    def weights(self, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors of a file as they are stored, and those of the language model in `dtype`. DamagedError where both
        have one."""
        tensors = self.tensors(name)
        for weight, value in () if self.base is None else self.base.tensors(dtype):
            if weight in tensors:
                raise DamagedError(f"{self.root / name} has {weight}, which belongs to the language model; save it again")
            tensors[weight] = value
        return tensors
