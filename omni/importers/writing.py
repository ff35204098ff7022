"""Weights of Omni, made from published tensors and written one piece at a time: the memory in use is a few pieces, for
a model of any size. The file is a safetensors file.

New ids (the control ids) get rows of their own: the mean of the published rows with a tenth of their deviation as
noise, keyed by the name of the weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from omni.errors import in_range
from omni.importers.layout import Part, Weight
from omni.importers.sources import Source
from omni.rng import Key
from omni.storage.pieces import Sink

PIECE_NUMBERS = 4 << 20  # of a tensor at once
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NOISE = 0.1  # deviation of new rows, in deviations of the published ones


@dataclass(frozen=True)
class Written:
    """A tensor of the file, in pieces of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]


def write_tensors(sink: Sink, tensors: Sequence[Written]) -> None:
    """Write a safetensors file. Tensors with wide numbers come first, so that each begins at a multiple of its own."""
    ordered = sorted(tensors, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in ordered:
        size = torch.Size(one.shape).numel() * one.dtype.itemsize
        header[one.name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for one in ordered:
        for piece in one.pieces():
            sink.write(piece.to(one.dtype).contiguous().flatten().view(torch.uint8).numpy().data)


def written(weight: Weight, source: Source, dtype: torch.dtype | None) -> Written:
    """A weight of published rows. dtype None: as they are stored; of several dtypes the one that holds all."""
    found = dtype
    for part in weight.parts if dtype is None else ():
        stored = source.tensors[part.name].dtype
        assert stored is not None  # others are refused before
        found = stored if found is None else torch.promote_types(found, stored)
    assert found is not None
    return Written(weight.name, weight.shape, found, partial(pieces_of, weight, source, found))


def pieces_of(weight: Weight, source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a weight. ValueError naming a published tensor with a NaN or an infinity, or beyond the dtype."""
    for part in weight.parts:
        for rows in _rows(part):
            piece = source.rows(part.name, rows)
            made = piece.to(dtype)
            if not in_range(made):
                fault = f"values beyond {dtype}; give another --dtype" if in_range(piece) else "a NaN or an infinity"
                raise ValueError(f"{part.name} has {fault}{'' if in_range(piece) else '; use another checkpoint'}")
            yield made


def _rows(part: Part) -> Iterator[slice | Tensor]:
    """The rows of a part, some millions of numbers at a time."""
    width = max(1, torch.Size(part.shape[1:]).numel())
    step = max(1, PIECE_NUMBERS // width)
    for start in range(part.start, part.stop, step):
        stop = min(start + step, part.stop)
        yield slice(start, stop) if part.order is None else part.order[start - part.start : stop - part.start]


def new_rows(name: str, like: Written, num: int) -> Written:
    """The rows of `num` new ids, for a matrix with a row per id."""

    def pieces() -> Iterator[Tensor]:
        mean, deviation = _statistics(like)
        noise = Key(0).fold("new rows", name).normal((num, like.shape[1])).double()
        yield (mean + NOISE * deviation * noise).to(like.dtype)

    return Written(name, (num, like.shape[1]), like.dtype, pieces)


def _statistics(like: Written) -> tuple[Tensor, float]:
    """The mean row (W,), float64, and the deviation of all numbers from it."""
    total, squares = torch.zeros(like.shape[1:], dtype=torch.float64), 0.0
    for piece in like.pieces():
        wide = piece.double()
        total += wide.sum(0)
        squares += float(wide.pow(2).sum())
    mean = total / like.shape[0]
    variance = squares / (like.shape[0] * like.shape[1]) - float(mean.pow(2).mean())
    return mean, max(variance, 0.0) ** 0.5
