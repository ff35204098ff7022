"""Large pictures in tiles: the network runs on overlapping parts, and of each result only the middle is kept.

Where no layer looks at the whole picture and the overlap covers what a position depends on (half the receptive field),
the result is that of the whole picture up to rounding. A group norm or an attention over the picture sees a tile
instead: then the result differs, whatever the overlap. diffusers' own tiles blend results that lack context, so they
differ near each seam, in every class.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def in_tiles(
    compute: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, overlap: int, unit: int, result: int
) -> Tensor:
    """compute(x), of x (..., H, W), from parts of `tile` cells a side and `overlap` cells more on each side.

    unit: rows of x per cell. result: rows of the result per cell: it is (..., H result / unit, W result / unit).
    A picture of at most `tile` cells a side is computed whole; with tile None, every picture.
    """
    h, w = x.shape[-2] // unit, x.shape[-1] // unit
    if tile is None or max(h, w) <= tile:
        return compute(x)
    rows = []
    for top, bottom in _edges(h, tile):
        row = []
        for left, right in _edges(w, tile):
            first, start = max(0, top - overlap), max(0, left - overlap)
            part = compute(x[..., first * unit : (bottom + overlap) * unit, start * unit : (right + overlap) * unit])
            lines = slice((top - first) * result, (bottom - first) * result)
            row.append(part[..., lines, (left - start) * result : (right - start) * result])
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


def _edges(length: int, tile: int) -> list[tuple[int, int]]:
    """The intervals [0, tile), [tile, 2 tile), ... of [0, length)."""
    return list(pairwise([*range(0, length, tile), length]))
