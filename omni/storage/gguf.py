"""GGUF files: metadata, and the place of every tensor. Versions 2 and 3, little-endian. The file is mapped into memory.

A file is a header, key-value pairs, a table of tensors, and the data of the tensors at multiples of an alignment. Every
length is compared with what is left of the file before it is used. What the bytes of a tensor mean is in
omni.storage.quantised.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
# Types of metadata: numbers by their NumPy types, and those that are no number.
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
MAX_SIDES = 8
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of the file: its shape as torch has it, its type by the format's number, and where its data begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFReader:
    """`fields`: metadata by key. `tensors`: by name. ValueError for a file that is no GGUF file, or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorPlace] = {}
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ValueError(f"{path} is not a readable GGUF file ({error}); download it again") from None
        self.bytes = memoryview(self._map)
        self._at = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not a readable GGUF file ({error}); download it again") from None

    def data(self, tensor: TensorPlace, num_bytes: int) -> np.ndarray:
        """The stored bytes of a tensor, uint8, mapped and read-only. ValueError where the file ends before."""
        if tensor.start + num_bytes > len(self.bytes):
            raise ValueError(f"{self.path} ends inside of {tensor.name}; download it again")
        return np.frombuffer(self.bytes, np.uint8, num_bytes, tensor.start)

    def _read(self) -> None:
        magic, version = self._take(4).tobytes(), self._number("<I")
        if magic != MAGIC or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r} and version {version}; versions 2 and 3 are read")
        num_tensors, num_fields = self._number("<Q"), self._number("<Q")
        self._require(num_fields, num_tensors)
        for _ in range(num_fields):
            key = self._string()
            if key in self.fields:
                raise ValueError(f"the key {key!r:.80} is given twice")
            self.fields[key] = self._value(self._number("<I"))
        self._read_table(num_tensors)

    def _read_table(self, num_tensors: int) -> None:
        """The table of tensors; their data begin at the next multiple of the alignment."""
        found = []
        for _ in range(num_tensors):
            name, num_sides = self._string(), self._number("<I")
            if num_sides > MAX_SIDES:
                raise ValueError(f"tensor {name!r:.80} has {num_sides} dimensions")
            sides = [self._number("<Q") for _ in range(num_sides)]
            found.append((name, tuple(reversed(sides)), self._number("<I"), self._number("<Q")))
        alignment = self.fields.get(ALIGNMENT, 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"{ALIGNMENT} = {alignment!r:.80}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise ValueError(f"the tensor {name!r:.80} is given twice")
            self.tensors[name] = TensorPlace(name, shape, kind, start + offset)

    def _value(self, kind: int) -> Any:
        """A value of metadata: a number, a bool, a text, or a list of one of them."""
        if kind == STRING:
            return self._string()
        if kind in NUMBERS:
            return self._numbers(kind, 1)[0]
        if kind != ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in NUMBERS:
            return self._numbers(kind, count)
        if kind != STRING:
            raise ValueError(f"an array of the unknown type {kind}")
        self._require(count)
        return self._strings(count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _strings(self, count: int) -> list[str]:
        """Many strings: one loop without calls, as vocabularies have tens of thousands."""
        size: Callable[[memoryview, int], tuple[int]] = struct.Struct("<Q").unpack_from  # type: ignore[assignment]
        data, at, found = self.bytes, self._at, []
        for _ in range(count):
            stop = at + 8 + size(data, at)[0]
            text = data[at + 8 : stop]
            if stop > len(data):
                raise ValueError("it is cut off")
            found.append(str(text, "utf-8"))
            at = stop
        self._at = at
        return found

    def _string(self) -> str:
        return str(self._take(self._number("<Q")), "utf-8")

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> memoryview:
        """The next bytes. ValueError where the file ends before."""
        self._require(count)
        self._at += count
        return self.bytes[self._at - count : self._at]

    def _require(self, *counts: int) -> None:
        """ValueError unless that many bytes are left: a damaged length then takes neither memory nor time."""
        if sum(counts) > len(self.bytes) - self._at:
            raise ValueError("it is cut off")
