"""Where the tensors of a published decoder come from: omni.storage.shards reads safetensors files,
omni.importers.gguf_file reads GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from omni.storage.shards import Stored


class Source(Protocol):
    """Where published tensors come from."""

    tensors: Mapping[str, Stored]

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor, as floats of its dtype."""
        ...
