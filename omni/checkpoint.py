"""Published directories: weights and small files under one manifest of digests. Complete and checked, or absent.

`publish` writes every file into a temporary sibling, syncs it, writes `manifest.json` last, and renames the whole: a
reader finds a finished directory or none. safetensors has no integrity check (a flipped payload bit loads silently), so
`load_tensors` hashes the bytes that it parses; a damaged file never becomes weights. Nothing here reads or writes
pickle. Scope: one local POSIX file system, one writer per directory.

Files of any size are hashed in pieces; a file of weights beyond LARGE is mapped into memory after its digest check, and
its pages are read when they are used. Changing it meanwhile changes the weights.

manifest.json: {"format": 1, "files": {name: {"bytes": int, "blake2b": hex}}, "info": {...}, "blake2b": hex}
The last digest covers the manifest's other fields. Names are relative POSIX paths.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import safetensors.torch
import torch
from pydantic import Field, ValidationError, field_validator

from omni.config import Frozen, explain, parse_json, table_of
from omni.errors import DamagedError, in_range
from omni.storage.pieces import Sink, digest_of, entry_of, sync, sync_directory

MANIFEST = "manifest.json"
FORMAT = 1  # of manifest.json; another format needs another number
LARGE = 1 << 30  # bytes of a file of weights that is mapped, not read
_MAX_MANIFEST_BYTES = 4 << 20
# The temporary names that `publish`, `save_tensors` and `_move_into_place` make.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")


Content = bytes | str | Path | Mapping[str, torch.Tensor] | Callable[[Sink], None]
"""The content of a published file: raw bytes, text (UTF-8), a file or directory to copy, named tensors, or a function
that writes it piece by piece."""


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors (any dtype, any device) as one safetensors file in memory; names in sorted order."""
    ready = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return safetensors.torch.save(ready)


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file atomically, without a digest. Use `publish` for files that are kept."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        _write(temporary, tensor_bytes(tensors))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


class Published:
    """Reader of a published directory. Each file is checked against the manifest when it is read; files that the
    manifest does not list do not exist for it. `folder` returns the view of a subdirectory.

    files: the listed files, relative name -> {"bytes": int, "blake2b": hex}. root: the directory of the view.
    """

    def __init__(self, directory: str | Path) -> None:
        """Reads the manifest. DamagedError if it is missing or damaged."""
        self.root = Path(directory)
        self.manifest = read_manifest(self.root)
        self.files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        self._unread = set(self.files)
        self._prefix = ""

    @classmethod
    def around(cls, directory: str | Path) -> Published:
        """The view of a directory by its own manifest, or else by the nearest of the two directories above that lists
        files in it. DamagedError if there is none."""
        directory = Path(directory).absolute()
        for root in (directory, *directory.parents[:2]):
            if (root / MANIFEST).is_file():
                found = cls(root) if root == directory else cls(root).folder(directory.relative_to(root).as_posix())
                if found.files or root == directory:
                    return found
        raise DamagedError(f"no {MANIFEST} in {directory} or above lists it, so its bytes cannot be checked")

    def folder(self, name: str) -> Published:
        """The view of a subdirectory, listed or not."""
        found = copy.copy(self)
        found._prefix, found.root = f"{self._prefix}{name}/", self.root / name
        found.files = {k.removeprefix(f"{name}/"): v for k, v in self.files.items() if k.startswith(f"{name}/")}
        return found

    def __contains__(self, name: str) -> bool:
        """Whether a file is listed. DamagedError for a file that exists and is not listed: it cannot be checked."""
        if name not in self.files and (self.root / name).is_file():
            raise DamagedError(
                f"{self.root / name} is not listed in {MANIFEST}, so it is not read; remove it, or save the model again"
            )
        return name in self.files

    def read(self, name: str) -> bytes:
        """The bytes of one file. DamagedError if it is not listed, missing or changed."""
        if name not in self:
            raise DamagedError(f"{self.root / name} is missing in {MANIFEST}: the directory is incomplete")
        data = _read_checked(self.root / name, self.files[name])
        self._unread.discard(self._prefix + name)
        return data

    def check(self, name: str) -> Path:
        """The path of one file, after its digest check in pieces; errors as in `read`."""
        if name not in self:
            raise DamagedError(f"{self.root / name} is missing in {MANIFEST}: the directory is incomplete")
        _check_digest(self.root / name, self.files[name])
        self._unread.discard(self._prefix + name)
        return self.root / name

    def is_large(self, name: str) -> bool:
        """Whether `tensors` maps a listed file instead of reading it."""
        return name in self and self.files[name]["bytes"] > LARGE

    def read_rest(self) -> None:
        """Check the listed files that this reader and its views have not read."""
        for name in sorted(name for name in self.files if self._prefix + name in self._unread):
            self.check(name)

    def table(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object. DamagedError for anything else."""
        data = self.read(name)
        try:
            return table_of(parse_json(data, str(self.root / name)), str(self.root / name))
        except ValueError as error:
            raise DamagedError(str(error)) from None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file, on the CPU; those of a file beyond LARGE are mapped, and copied where they
        are written. DamagedError for another format, NaN or infinities."""
        path = self.root / name
        data = self.check(name) if self.is_large(name) else self.read(name)
        try:
            tensors = safetensors.torch.load_file(data) if isinstance(data, Path) else safetensors.torch.load(data)
        except Exception as error:  # SafetensorError, and other errors of torch and the reader for odd headers
            message = f"{path} is not a safetensors file ({error}); publish or download it again"
            raise DamagedError(" ".join(message.split())) from None
        for key, value in tensors.items():
            if not is_finite(value):
                bad = int((~torch.isfinite(value.float())).sum())
                raise DamagedError(
                    f"{path}: {key} has {bad} values that are NaN or infinite; use an earlier checkpoint"
                )
        return tensors


def is_finite(value: torch.Tensor) -> bool:
    """True for integers; for complex numbers, both parts must be finite."""
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point():
        return True
    return in_range(value if value.element_size() > 1 else value.float())  # float8 has no minimum


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of one file of a published directory, on the CPU, checked against the manifest that lists it.

    The manifest is in the file's directory or in one of the two above. Raises DamagedError (a ValueError) without a
    manifest, for a wrong digest, another format, a NaN or an infinity.
    """
    path = Path(path)
    return Published.around(path.parent).tensors(path.name)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of one published file, checked against the nearest manifest that lists it (see load_tensors)."""
    path = Path(path)
    return Published.around(path.parent).read(path.name)


def publish(
    directory: str | Path,
    files: Mapping[str, Content] | Callable[[Path], None],
    info: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write `files` as `directory`, all or nothing, and return its path.

    Args:
        directory: the directory to create, with its parents.
        files: relative name -> content (see Content; a Path to a directory is copied whole), or a function that
            writes them into an empty directory.
        info: JSON values stored in the manifest (format versions, step, provenance).
        replace: allow an existing directory; it is moved aside first and restored if the rename fails.

    Raises ValueError for an unsafe name, or if the directory exists and `replace` is false.
    """
    directory = Path(directory)
    if directory.exists() and not replace:
        raise ValueError(f"{directory} already exists; remove it or choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        if callable(files):
            files(temporary)
            entries = _entries_of_written(temporary)
        else:
            entries = {
                name: _write_content(temporary / name, content) for name, content in _listed_files(files).items()
            }
        body = {"format": FORMAT, "files": dict(sorted(entries.items())), "info": dict(info or {})}
        _write(temporary / MANIFEST, _render_manifest(body))
        for folder in {temporary, *((temporary / name).parent for name in entries)}:
            sync_directory(folder)
        _move_into_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a published directory, checked against its own digest; does not read the files."""
    path = Path(directory) / MANIFEST
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{directory} has no {MANIFEST}: it is not a published directory, or a partial copy; copy it again"
        ) from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        manifest = table_of(parse_json(data, str(path)), str(path))
        body = {key: value for key, value in manifest.items() if key != "blake2b"}
        intact = data == _render_manifest(body)
    except ValueError:
        intact, body = False, {}
    if body.get("format", FORMAT) != FORMAT and intact:
        raise DamagedError(f"{path} has format {body['format']!r:.80}; this version of omni reads format {FORMAT}")
    if not intact:
        raise DamagedError(_wrong_digest_message(path))
    try:
        return _Manifest.model_validate(body).model_dump()
    except ValidationError as error:
        raise DamagedError(f"{explain(error, _Manifest, str(path))}; it was not written by omni") from None


class _Entry(Frozen):
    """One file of a manifest: its size and its 256-bit digest."""

    bytes: int = Field(ge=0, le=1 << 50, strict=True)
    blake2b: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(Frozen):
    """The fields of manifest.json except its own digest. They are stored: a new field needs a default."""

    format: int = Field(default=FORMAT, strict=True)
    files: dict[str, _Entry]
    info: dict[str, Any] = {}

    @field_validator("files")
    @classmethod
    def _safe(cls, files: dict[str, _Entry]) -> dict[str, _Entry]:
        for name in files:
            _check_name(name)
        return files


def manifest_digest(directory: str | Path) -> str:
    """32 hex digits that identify a published directory: the digest of its manifest, which has those of its files."""
    return hashlib.blake2b((Path(directory) / MANIFEST).read_bytes(), digest_size=16).hexdigest()


def verify(directory: str | Path) -> dict[str, Any]:
    """Digest check: read every listed file and compare size and digest; returns the manifest. DamagedError names the
    file."""
    published = Published(directory)
    published.read_rest()
    return published.manifest


def remove_leftovers(folder: str | Path) -> None:
    """Remove what `publish` and `save_tensors` leave in `folder` if their process is killed.

    Deletes partial temporaries. A directory that was moved aside is restored if its successor is missing, else deleted.
    Only for the single writer of `folder`: it deletes another writer's work in progress.
    """
    folder = Path(folder)
    found = [(match, path) for path in _paths_in(folder) if (match := _LEFTOVER.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda one: one[1].stat(follow_symlinks=False).st_mtime_ns, reverse=True):
        home = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(home):
            os.rename(path, home)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _paths_in(folder: Path) -> list[Path]:
    """The entries of a folder; empty where there is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of `path`, if they match its manifest entry; DamagedError otherwise."""
    with _opened(path, entry) as stream:
        data = stream.read()
    _compare(path, entry, len(data), digest_of(data))
    return data


def _check_digest(path: Path, entry: Mapping[str, Any]) -> None:
    """DamagedError unless the bytes of `path` match its manifest entry. Reads it in pieces."""
    with _opened(path, entry) as stream:
        found = entry_of(stream)
    _compare(path, entry, found["bytes"], found["blake2b"])


@contextmanager
def _opened(path: Path, entry: Mapping[str, Any]) -> Iterator[BinaryIO]:
    """A listed file, for reading. DamagedError where it is missing, no file, unreadable or of another size."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe may never end
            raise DamagedError(f"{path} is listed in {MANIFEST} but is not a file; download it again")
        with path.open("rb") as stream:
            size = path.stat().st_size
            if size != entry["bytes"]:
                _compare(path, entry, size, "")
            yield stream
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is listed in {MANIFEST} but missing; download it again") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from None


def _compare(path: Path, entry: Mapping[str, Any], num_bytes: int, digest: str) -> None:
    """DamagedError for another size or digest."""
    if num_bytes != entry["bytes"]:
        raise DamagedError(
            f"{path} has {num_bytes} bytes, not {entry['bytes']}: it is cut or changed; download it again"
        )
    if digest != entry["blake2b"]:
        raise DamagedError(_wrong_digest_message(path))


def _wrong_digest_message(path: Path) -> str:
    """The text of a DamagedError."""
    return f"{path} does not match its digest: one or more bytes changed; download it again"


def _render_manifest(body: Mapping[str, Any]) -> bytes:
    """The exact bytes of manifest.json. A reader compares them byte by byte: never change the layout."""
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return (json.dumps({**body, "blake2b": digest_of(canonical.encode())}, indent=1, sort_keys=True) + "\n").encode()


def _listed_files(files: Mapping[str, Content]) -> dict[str, Content]:
    """Relative name -> content, with every directory replaced by the files below it."""
    flat: dict[str, Content] = {}
    for name, content in files.items():
        _check_name(name)
        if isinstance(content, Path) and content.is_dir():
            inside = sorted(path for path in content.rglob("*") if path.is_file())
            flat.update({f"{name}/{path.relative_to(content).as_posix()}": path for path in inside})
        else:
            flat[name] = content
    return flat


def _check_name(name: str) -> None:
    """ValueError for a name that is absolute, leaves the directory, or is the manifest."""
    path = PurePosixPath(name)
    plain = str(path) == name and path.parts and ".." not in path.parts and not path.is_absolute()
    if not plain or "\\" in name or "\0" in name or name == MANIFEST:
        raise ValueError(f"unsafe file name {name!r} for a published directory; use a relative path without '..'")


def _write_content(path: Path, content: Content) -> dict[str, Any]:
    """Write one file, synced; return its manifest entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        sink = Sink(stream)
        if callable(content):
            content(sink)
        elif isinstance(content, Path):
            sink.write_file(content)
        elif isinstance(content, bytes | str):
            sink.write(content if isinstance(content, bytes) else content.encode())
        else:
            sink.write(tensor_bytes(content))
        return sink.finish()


def _entries_of_written(directory: Path) -> dict[str, dict[str, Any]]:
    """Sync the files that are in `directory`; return their manifest entries, by name."""
    entries = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        _check_name(name)
        with path.open("rb") as stream:
            entries[name] = entry_of(stream)
            sync(stream)
    return entries


def _write(path: Path, data: bytes) -> None:
    """Write and sync a file."""
    with path.open("wb") as stream:
        stream.write(data)
        sync(stream)


def _move_into_place(temporary: Path, directory: Path) -> None:
    """Rename `temporary` to `directory`. An older directory is moved aside first, and back if the rename fails."""
    aside = directory.with_name(f".{directory.name}.old-{uuid.uuid4().hex[:8]}")
    if directory.exists():
        os.rename(directory, aside)
    try:
        os.rename(temporary, directory)
    except OSError:
        if aside.exists():
            with suppress(OSError):
                os.rename(aside, directory)
        raise
    sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
