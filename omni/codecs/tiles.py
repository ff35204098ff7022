"""Large pictures in tiles: the network runs on overlapping parts, and of each result only the middle is kept.

Where no layer looks at the whole picture and the overlap covers what a position depends on (half the receptive field),
the result is that of the whole picture up to rounding. A few layers that do, such as one attention at the resolution of
latents, are computed for the whole picture from inputs gathered of all tiles: each costs one more pass. Group norms are
too many for this; they see a tile, so a class with group norms gives another result, whatever the overlap. diffusers'
own tiles blend results that lack context: they differ near each seam, in every class.

A cell is one raw latent. Legend: h, w cells of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Tiles of `tile` cells a side, with `overlap` cells more on each side."""

    tile: int
    overlap: int


@dataclass(frozen=True)
class Window:
    """A tile, in cells: the (first, last) rows and columns that it computes, and those of them that are kept."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    kept_rows: tuple[int, int]
    kept_columns: tuple[int, int]

    def cut(self, whole: Tensor, scale: int) -> Tensor:
        """What the tile computes with, of (..., h scale, w scale)."""
        (top, bottom), (left, right) = self.rows, self.columns
        return whole[..., top * scale : bottom * scale, left * scale : right * scale]

    def kept(self, part: Tensor) -> Tensor:
        """What is kept of a result of the tile."""
        scale = part.shape[-1] // (self.columns[1] - self.columns[0])
        (top, bottom), (left, right) = self.kept_rows, self.kept_columns
        first, start = self.rows[0], self.columns[0]
        rows = slice((top - first) * scale, (bottom - first) * scale)
        return part[..., rows, (left - start) * scale : (right - start) * scale]


def in_tiles(
    compute: Callable[[Tensor], Tensor], x: Tensor, grid: Grid | None, unit: int, layers: Sequence[nn.Module] = ()
) -> Tensor:
    """compute(x), of x (..., h unit, w unit), tile by tile.

    A picture of at most one tile is computed whole; with grid None, every picture. layers: those that look at the whole
    picture; a result must be a function of the layer's one input, of the same size. Each that is called costs a pass.
    """
    h, w = x.shape[-2] // unit, x.shape[-1] // unit
    if grid is None or max(h, w) <= grid.tile:
        return compute(x)
    rows = [[_window(a, b, h, w, grid) for b in _edges(w, grid.tile)] for a in _edges(h, grid.tile)]
    known: dict[nn.Module, list[Tensor]] = {}
    while True:
        passes = [[_tile(compute, window, x, unit, layers, known) for window in row] for row in rows]
        layer, calls = passes[0][0].layer, range(len(passes[0][0].inputs))
        if layer is None:
            return _joined([[tile.result for tile in row] for row in passes])
        known[layer] = [layer(_joined([[tile.inputs[call] for tile in row] for row in passes])) for call in calls]


@dataclass
class Tile:
    """What is kept of one tile: its result, and the inputs of the first layer whose result is not known, one per
    call. Without such a layer, the result is final."""

    result: Tensor
    layer: nn.Module | None
    inputs: list[Tensor]


def _tile(
    compute: Callable[[Tensor], Tensor],
    window: Window,
    x: Tensor,
    unit: int,
    layers: Sequence[nn.Module],
    known: Mapping[nn.Module, Sequence[Tensor]],
) -> Tile:
    """One pass of one tile."""
    first: list[nn.Module] = []
    inputs: list[Tensor] = []

    def record(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        first.append(layer)
        if layer is first[0]:
            inputs.append(window.kept(given[0]))

    with ExitStack() as stack:
        for layer in layers:
            if layer in known:
                stack.enter_context(_replaced(layer, known[layer], window))
            else:
                stack.callback(layer.register_forward_pre_hook(record).remove)
        result = compute(window.cut(x, unit))
    return Tile(window.kept(result), first[0] if first else None, inputs)


@contextmanager
def _replaced(layer: nn.Module, results: Sequence[Tensor], window: Window) -> Iterator[None]:
    """Each call of the layer gives the tile's part of the known result of that call."""
    calls = iter(results)

    def replace(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        scale = result.shape[-1] // (window.columns[1] - window.columns[0])
        return window.cut(next(calls), scale)

    hook = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _joined(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows of parts (..., rows, columns) as one."""
    return torch.cat([torch.cat(list(row), -1) for row in parts], -2)


def _edges(length: int, tile: int) -> list[tuple[int, int]]:
    """The intervals [0, tile), [tile, 2 tile), ... of [0, length)."""
    return list(pairwise([*range(0, length, tile), length]))


def _window(rows: tuple[int, int], columns: tuple[int, int], h: int, w: int, grid: Grid) -> Window:
    """The window of what is kept."""
    outer = [
        (max(0, first - grid.overlap), min(length, last + grid.overlap))
        for (first, last), length in ((rows, h), (columns, w))
    ]
    return Window(outer[0], outer[1], rows, columns)
