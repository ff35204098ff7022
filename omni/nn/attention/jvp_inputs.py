"""Inputs shared by all implementations of attention with a tangent: the tensors, and the visibility of keys.

Legend: R batch rows, H query heads, G key heads, Q queries, S own keys, T context keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.nn.attention.backends import AttentionMask
from omni.sequence.mask import Fields, dense

MAX_PREDICATE = 1 << 20  # (query, key) pairs whose visibility is in memory at once in `occupied`


class Inputs(NamedTuple):
    """q, dq (R, H, Q, D); k, v, dk, dv (R, G, S, D); k_context, v_context (R, G, T, D), or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    k_context: Tensor | None
    v_context: Tensor | None

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """`function` of every tensor; None stays."""
        return Inputs(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


class Visibility:
    """A mask over (queries, [context; own] keys), computed part by part and never as a whole."""

    def __init__(self, mask: AttentionMask | Tensor | None, sizes: tuple[int, int, int, int], device: Any) -> None:
        self.mask = mask
        self.rows, self.num_queries, self.num_context, num_own = sizes
        self.num_keys = self.num_context + num_own
        self.device = device
        self._made: dict[object, Any] = {}

    @staticmethod
    def of(x: Inputs, mask: AttentionMask | Tensor | None) -> Visibility:
        """ValueError if the mask does not fit the inputs."""
        R, Q, S = x.q.shape[0], x.q.shape[2], x.k.shape[2]
        T = 0 if x.k_context is None else x.k_context.shape[2]
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or shape_of(mask) != (R, 1, Q, T + S) or mask.device != x.q.device:
                raise ValueError(
                    f"a dense mask is bool, {(R, 1, Q, T + S)} on {x.q.device}, got {mask.dtype} {shape_of(mask)} on "
                    f"{mask.device}; AttentionMask.boolean() makes one"
                )
        elif mask is not None:
            got = shape_of(mask.queries.document), shape_of(mask.keys.document)
            if got != ((R, Q), (R, T + S)) or mask.keys.document.device != x.q.device:
                raise ValueError(
                    f"the mask describes queries {got[0]} and keys {got[1]} on {mask.keys.document.device}, but there "
                    f"are {(R, Q)} and [context; own] {(R, T + S)} on {x.q.device}"
                )
        return Visibility(mask, (R, Q, T, S), x.q.device)

    def cached(self, name: object, make: Callable[[], Any]) -> Any:
        """The value of `make`, stored under `name`; if the mask is an AttentionMask, for all layers of a pass."""
        if isinstance(self.mask, AttentionMask):
            return self.mask.cached((name, self.num_context), make)
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def fields(self, rows: slice, keys: slice) -> tuple[Fields, Fields]:
        """The fields of some queries and of some keys, of an AttentionMask."""
        assert isinstance(self.mask, AttentionMask)
        return _slice_fields(self.mask.queries, rows), _slice_fields(self.mask.keys, keys)

    def part(self, rows: slice, keys: slice) -> Tensor | None:
        """(R, queries, keys) bool of a part; None where all is visible."""
        if self.mask is None:
            return None
        if isinstance(self.mask, Tensor):
            return self.mask[:, 0, rows, keys]
        return dense(*self.fields(rows, keys))

    def occupied(self, keys: slice, tile_q: int, tile_k: int) -> Tensor:
        """(R, tiles of queries, tiles of keys) bool: the tiles in which any pair is visible."""
        num_keys = keys.stop - keys.start
        tiles_q, tiles_k = -(-self.num_queries // tile_q), -(-num_keys // tile_k)
        if self.mask is None or tiles_q * tiles_k == 0:
            return torch.ones(self.rows, tiles_q, tiles_k, dtype=torch.bool, device=self.device)
        strips = []
        step = max(1, MAX_PREDICATE // max(1, self.rows * tile_q * num_keys)) * tile_q
        for start in range(0, self.num_queries, step):
            part = self.part(slice(start, min(start + step, self.num_queries)), keys)
            assert part is not None
            part = torch.nn.functional.pad(part, (0, -num_keys % tile_k, 0, -part.shape[1] % tile_q))
            strips.append(part.unflatten(2, (tiles_k, tile_k)).unflatten(1, (-1, tile_q)).any(4).any(2))
        return torch.cat(strips, 1)


def _slice_fields(fields: Fields, at: slice) -> Fields:
    """The fields of the positions `at`."""
    rank = None if fields.rank is None else fields.rank[:, at]
    return Fields(fields.document[:, at], fields.block[:, at], fields.copy[:, at], rank)


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple."""
    return tuple(x.shape)
