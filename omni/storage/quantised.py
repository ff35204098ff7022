"""Numbers as GGUF files store them, as floats: plain types, and the simple quantised ones. The result equals that of
the package gguf, bit for bit, and is there several times as fast: a few thousand blocks at a time stay in the cache of
the processor.

A quantised row is a row of blocks. With d, m float16 and q the stored integers of a block of 32:

    Q8_0    d, 32 int8                          d q
    Q4_0    d, 16 bytes of two integers         d (q - 8)      the low halves are the first 16 numbers
    Q4_1    d, m, 16 bytes of two integers      d q + m
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 28: "F64", 30: "BF16"}  # by the format's numbers
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34)}  # numbers and bytes of a block
SIZES |= {name: (1, dtype.itemsize) for name, dtype in FLOATS.items()}
BLOCKS_AT_ONCE = 8192


def floats_of(rows: np.ndarray, kind: str) -> Tensor:
    """Stored rows, uint8 (R, bytes), as numbers (R, width): of a plain type as they are, else float32."""
    rows = np.ascontiguousarray(rows)
    if kind in FLOATS:
        return torch.from_numpy(rows.copy()).view(FLOATS[kind])
    numbers, size = SIZES[kind]
    blocks = rows.reshape(-1, size)
    out = np.empty((len(blocks), numbers), np.float32)
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        part = slice(start, start + BLOCKS_AT_ONCE)
        DEQUANTISED[kind](blocks[part], out[part])
    return torch.from_numpy(out).view(len(rows), -1)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 of each block at a byte, as float32 (B, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_halves(blocks, 0), blocks[:, 2:].view(np.int8), out=out)


def _nibbles(stored: np.ndarray, out: np.ndarray) -> None:
    """(B, 16) bytes as (B, 32) numbers from 0 to 15."""
    out[:, :16] = stored & 15
    out[:, 16:] = stored >> 4


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _halves(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _halves(blocks, 0)
    out += _halves(blocks, 2)


DEQUANTISED: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
