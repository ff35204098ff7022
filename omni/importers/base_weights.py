"""The text path of a language model in memory, by our names: of a published checkpoint in any layout that `omni import`
reads, or of a model directory that it wrote. Nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from omni.checkpoint import MANIFEST, is_finite
from omni.errors import DamagedError, in_range
from omni.importers.decoders import read_decoder
from omni.importers.gguf_file import GGUFFile
from omni.importers.vocabulary import TOKENIZER_FILE, Vocabulary, vocabulary_of_file
from omni.importers.writing import pieces_of
from omni.storage.shards import WEIGHTS, SafetensorsFolder
from omni.weights import is_text_path

QUANTISATION = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)  # at the end of the name of a GGUF file


class BaseWeights(Protocol):
    """names: of the weights. files: what is read, by name. name, licence: of the language model; None: not known."""

    names: list[str]
    name: str

    @property
    def licence(self) -> str | None: ...

    @property
    def files(self) -> Mapping[str, Path]: ...

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight, each number rounded to dtype. ValueError for numbers beyond it, and for a NaN."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Of its tokenizer; empty where it is not a byte-pair tokenizer."""
        ...


def weights_of(path: Path) -> BaseWeights:
    """The text path in a file or folder. ValueError for what `omni import` refuses."""
    return _OfModel(path) if (path / MANIFEST).is_file() else _OfCheckpoint(path)


class _OfCheckpoint:
    """Of a published checkpoint: a folder, or a GGUF file."""

    def __init__(self, path: Path) -> None:
        found = read_decoder(path)
        if found.problems:
            raise ValueError(found.problems[0])
        self._source, self._folder = found.source, path
        self._weights = {weight.name: weight for weight in found.weights}
        self.names = sorted(self._weights)
        self.licence = None
        if isinstance(found.source, GGUFFile):
            self.files: dict[str, Path] = {found.source.path.name: found.source.path}
            self.name = QUANTISATION.sub("", found.source.path.stem)
            self.licence = found.source.licence
            return
        self.name = path.resolve().name
        others = (path / name for name in ("config.json", TOKENIZER_FILE))
        shards = getattr(found.source, "files", ())
        self.files = {file.name: file for file in (*shards, *others) if file.is_file()}

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        weight, at = self._weights[name], 0
        out = torch.empty(weight.shape, dtype=dtype)
        for piece in pieces_of(weight, self._source, dtype):
            out[at : at + len(piece)] = piece
            at += len(piece)
        return out

    def vocabulary(self) -> Vocabulary:
        if isinstance(self._source, GGUFFile):
            return Vocabulary(*self._source.words())
        return vocabulary_of_file(self._folder / TOKENIZER_FILE)


class _OfModel:
    """Of a model directory of `omni import`. Its manifest is not compared: the base is known by its own digests."""

    licence = None

    def __init__(self, path: Path) -> None:
        self._source, self._folder = SafetensorsFolder(path, keep=is_text_path), path
        self.names = sorted(self._source.tensors)
        if not self.names:
            raise ValueError(f"{path} leaves its own language model out; give that one")
        self.files = {WEIGHTS: path / WEIGHTS}
        self.name = path.resolve().name

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        stored = self._source.tensor(name)
        if not is_finite(stored) or not in_range(value := stored.to(dtype, copy=True)):
            raise DamagedError(f"{self._folder}: {name} has a NaN or an infinity in {dtype}; import it again")
        return value

    def vocabulary(self) -> Vocabulary:
        return vocabulary_of_file(self._folder / "tokenizer" / TOKENIZER_FILE)
