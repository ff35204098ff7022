"""Bounded reading of encoded bytes, atomic writing of files, and the bounds of all media. This file decodes nothing.

`TimedBytes` bounds small files that take long to decode: decoders read through it in pieces, and it raises after the
time limit.
"""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MAX_PIXELS = 50_000_000  # of one picture, and of one frame of a clip
MAX_BYTES = 64 << 20  # of one encoded picture
TIMEOUT_SECONDS = 30.0  # of decoding one picture or clip


class TimeLimitError(ValueError):
    """Decoding took longer than the time limit."""


class TimedBytes(io.BytesIO):
    """The bytes of the file `name`, readable for `timeout_seconds` from now."""

    def __init__(self, data: bytes, name: str, timeout_seconds: float) -> None:
        super().__init__(data)
        self._message = f"{name} takes longer to decode than timeout_seconds={timeout_seconds:g}"
        self._end = time.monotonic() + timeout_seconds

    def check_time(self) -> None:
        """Raise TimeLimitError after the time limit."""
        if time.monotonic() >= self._end:
            raise TimeLimitError(f"{self._message}; make it smaller or shorter, or raise the bound")

    def read(self, size: int | None = -1, /) -> bytes:
        self.check_time()
        return super().read(size)


def check_pixels(size: tuple[int, int], num_frames: int, name: str, max_pixels: int) -> None:
    """ValueError when `num_frames` pictures of `size` (W, H) have more than `max_pixels` pixels."""
    width, height = size
    if width * height * num_frames > max_pixels:
        times = f" x {num_frames} frames" if num_frames > 1 else ""
        raise ValueError(f"{name} is {width} x {height} pixels{times}, above max_pixels={max_pixels}; make it smaller")


def read(source: Any, max_bytes: int, kind: str) -> tuple[bytes, str]:
    """Encoded bytes of a path or of bytes, and their name for errors. Raises ValueError."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), f"the {kind}'s bytes"
    elif isinstance(source, str | os.PathLike):
        name = f"{kind} {str(source)!r:.200}"
        data = _read_file(source, max_bytes, name)
    else:
        taken = "a path, bytes, a PIL image or an array" if kind == "picture" else "a path or bytes"
        raise ValueError(f"a {kind} is {taken}, got {type(source).__name__}")
    if len(data) > max_bytes:
        raise _too_large(name, max_bytes)
    if not data:
        raise ValueError(f"{name} is empty; give a {kind} with content")
    return data, name


def _read_file(path: Any, max_bytes: int, name: str) -> bytes:
    """At most `max_bytes` + 1 bytes of a regular file. ValueError for anything else."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{name} is no regular file; give the path of a file")
            if status.st_size > max_bytes:
                raise _too_large(name, max_bytes)
            return file.read(max_bytes + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot read {name}: {reason}; give the path of a file that exists") from None
    except ValueError as error:
        if "null" in str(error):  # open() raises it for such a name
            raise ValueError(f"cannot read {name}: a path has no null character; give the path of a file") from None
        raise


def _too_large(name: str, max_bytes: int) -> ValueError:
    """The error for too many bytes."""
    return ValueError(f"{name} is larger than max_bytes={max_bytes}; make it smaller or raise the bound")


def _open_without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that does not wait for the writer of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not block


def reason(error: Exception) -> str:
    """The message of a decoder's error, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `path` under another name, then rename: `path` is never half a file."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
