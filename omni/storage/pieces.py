"""Files of any size, written and hashed in pieces: the memory in use is that of one piece.

The digest is 256-bit blake2b. It is stored in every manifest: never change it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PIECE = 16 << 20  # bytes that are read at once
_SMALLEST_HOLE = 4096  # bytes: one page of most file systems


class Sink:
    """A file in the making: `write` appends bytes and hashes them. Pieces of zeros become holes of the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self.num_bytes = 0
        self._stream, self._hash = stream, hashlib.blake2b(digest_size=32)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._hash.update(data)
        self.num_bytes += len(data)
        if len(data) >= _SMALLEST_HOLE and not np.frombuffer(data, np.uint8).any():
            self._stream.seek(len(data), os.SEEK_CUR)
        else:
            self._stream.write(data)

    def write_file(self, path: Path) -> None:
        """Append the bytes of a file."""
        with path.open("rb") as source:
            while piece := source.read(PIECE):
                self.write(piece)

    def finish(self) -> dict[str, Any]:
        """Sync the file; its manifest entry."""
        self._stream.truncate(self.num_bytes)  # it may end with a hole
        sync(self._stream)
        return {"bytes": self.num_bytes, "blake2b": self._hash.hexdigest()}


def entry_of(stream: BinaryIO) -> dict[str, Any]:
    """The manifest entry of a file: its size and its digest."""
    found, num_bytes = hashlib.blake2b(digest_size=32), 0
    while piece := stream.read(PIECE):
        found.update(piece)
        num_bytes += len(piece)
    return {"bytes": num_bytes, "blake2b": found.hexdigest()}


def digest_of(data: bytes) -> str:
    """The digest of bytes in memory, as 64 hex digits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def sync(stream: BinaryIO) -> None:
    """Sync a file."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Sync a directory, so that the names in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
