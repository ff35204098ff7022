"""Published directories: weights and small files under one manifest of digests. Complete and verified, or absent.

`publish` writes every file into a temporary sibling, syncs it, writes `manifest.json` last, and renames the
whole: a reader sees a finished directory or none. safetensors has no integrity check of its own (one flipped
payload bit loads silently), so `load_tensors` hashes the very bytes that it parses, and a damaged file never
becomes weights. Nothing here reads or writes pickle. Scope: one local POSIX file system, one writer per directory.

manifest.json: {"format": 1, "files": {name: {"bytes": int, "blake2b": hex}}, "info": {...}, "blake2b": hex}
where the last digest covers the manifest's own other fields. Names are relative POSIX paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

MANIFEST = "manifest.json"
FORMAT = 1
_MAX_MANIFEST_BYTES = 4 << 20
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")

Content = bytes | str | Path | Mapping[str, torch.Tensor]
"""What a published file may be made of: raw bytes, text (UTF-8), a file or directory to copy, or named tensors."""


class DamagedError(ValueError):
    """A published directory is incomplete, or differs from its manifest."""


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors (any dtype, any device) as one safetensors file in memory; names in sorted order."""
    ready = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return safetensors.torch.save(ready)


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file atomically. Only `publish` adds a digest; use that for anything that is kept."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        _write(temporary, tensor_bytes(tensors))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of one file of a published directory, on the CPU, checked against the manifest that lists it.

    The manifest is looked for beside the file and in the two directories above it. Raises DamagedError (a
    ValueError) when there is none, when the digest differs, or when the file is not safetensors.
    """
    path = Path(path)
    data = read_bytes(path)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a safetensors file ({error}); publish or download it again") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of one published file, checked against the nearest manifest that lists it (see load_tensors)."""
    path = Path(path).absolute()
    for root in list(path.parents)[:3]:
        if not (root / MANIFEST).is_file():
            continue
        entry = read_manifest(root)["files"].get(path.relative_to(root).as_posix())
        if entry is not None:
            return _read_checked(path, entry)
    raise DamagedError(f"{path} is listed in no {MANIFEST} beside or above it, so its bytes cannot be checked")


def publish(
    directory: str | Path,
    files: Mapping[str, Content] | Callable[[Path], None],
    info: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write `files` as `directory`, all or nothing, and return its path.

    Args:
        directory: the directory to make. Its parents are made too.
        files: relative name -> content (see Content; a Path to a directory is copied whole), or a function that
            writes them into the empty directory it is given.
        info: JSON values kept in the manifest (format versions, step, provenance).
        replace: allow an existing directory; it is moved aside first and put back if the rename fails.

    Raises ValueError on an unsafe name or when the directory exists and `replace` is false.
    """
    directory = Path(directory)
    if directory.exists() and not replace:
        raise ValueError(f"{directory} exists already; remove it or choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        if callable(files):
            files(temporary)
            entries = _sync_written(temporary)
        else:
            entries = {name: _write_content(temporary / name, content) for name, content in _expand(files).items()}
        body = {"format": FORMAT, "files": dict(sorted(entries.items())), "info": dict(info or {})}
        _write(temporary / MANIFEST, _render_manifest(body))
        for folder in {temporary, *((temporary / name).parent for name in entries)}:
            _sync_directory(folder)
        _swap_in(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a published directory, checked against its own digest; the files are not read."""
    path = Path(directory) / MANIFEST
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{directory} has no {MANIFEST}: not a published directory, or a half-copied one; copy it again"
        ) from None
    try:
        manifest = json.loads(data)
        body = {key: value for key, value in manifest.items() if key != "blake2b"}
        intact = data == _render_manifest(body)
    except (ValueError, AttributeError):
        intact, body = False, {}
    if body.get("format", FORMAT) != FORMAT and intact:
        raise DamagedError(f"{path} has format {body['format']!r}; this version of omni reads format {FORMAT}")
    if not intact:
        raise DamagedError(_damaged(path))
    for name in body["files"]:
        _check_name(name)
    return body


def manifest_digest(directory: str | Path) -> str:
    """32 hex digits that name a published directory: the digest of its manifest, which holds those of its files."""
    return hashlib.blake2b((Path(directory) / MANIFEST).read_bytes(), digest_size=16).hexdigest()


def verify(directory: str | Path) -> dict[str, Any]:
    """Read every listed file and compare size and digest; returns the manifest. Raises DamagedError naming the file."""
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        _read_checked(Path(directory) / name, entry)
    return manifest


def remove_leftovers(folder: str | Path) -> None:
    """Clear what `publish` and `save_tensors` leave in `folder` when their process is killed.

    Half-written temporaries go. A directory that was moved aside for its successor is put back where that never came,
    and goes where it did. For the only writer of `folder`: of another's work in progress this would make an end.
    """
    folder = Path(folder)
    found = [(match, path) for path in _entries(folder) if (match := _LEFTOVER.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda one: one[1].stat(follow_symlinks=False).st_mtime_ns, reverse=True):
        home = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(home):
            os.rename(path, home)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is listed in {MANIFEST} but missing; download it again") from None
    if len(data) != entry["bytes"]:
        raise DamagedError(f"{path} has {len(data)} bytes, not {entry['bytes']}: it was cut or changed; get it again")
    if _digest(data) != entry["blake2b"]:
        raise DamagedError(_damaged(path))
    return data


def _damaged(path: Path) -> str:
    return f"{path} does not match its digest: one or more bytes changed; download it again"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _render_manifest(body: Mapping[str, Any]) -> bytes:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return (json.dumps({**body, "blake2b": _digest(canonical.encode())}, indent=1, sort_keys=True) + "\n").encode()


def _expand(files: Mapping[str, Content]) -> dict[str, Content]:
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
    path = PurePosixPath(name)
    plain = str(path) == name and path.parts and ".." not in path.parts and not path.is_absolute()
    if not plain or "\\" in name or name == MANIFEST:
        raise ValueError(f"unsafe file name {name!r} for a published directory; use a relative path without '..'")


def _content_bytes(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, Path):
        return content.read_bytes()
    return tensor_bytes(content)


def _write_content(path: Path, content: Content) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _content_bytes(content)
    _write(path, data)
    return _entry(data)


def _sync_written(directory: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        _check_name(name)
        with path.open("rb") as stream:
            entries[name] = _entry(stream.read())
            os.fsync(stream.fileno())
    return entries


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "blake2b": _digest(data)}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(temporary: Path, directory: Path) -> None:
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
    _sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)
