"""Keys and values: of a packed batch (Memory), and of requests, in pages of one pool (Pool, History).

A History is the context of one request, or of one of its guidance branches: a contiguous run of pages of the pool.
Contiguous, because attention then reads a view; gathering pages would copy a request's whole cache in every layer of
every pass. A fork shares the pages and copies them when it is first written to; the history that was written to last
goes on without a copy. Only the context stream commits positions; blocks in refinement use the free slots behind them.

Legend: L layers, R batch rows, G key heads, K keys, D head width, N new positions, P positions of the pool.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omni.nn.attention.backends import AttentionMask
from omni.sequence.layout import Stream
from omni.sequence.mask import Fields

Pair = tuple[Tensor, Tensor]  # keys and values
PAGE = 16  # positions of a page


@dataclass(frozen=True)
class Memory:
    """The keys and values of a packed context that the refine stream attends to: per layer (R, G, K, D), and the fields
    of the K positions."""

    keys: list[Tensor]
    values: list[Tensor]
    fields: Fields
    masks: list[tuple[Stream, dict[int | None, AttentionMask]]] = field(default_factory=list)  # of the last stream

    def mask(self, stream: Stream, window: int | None = None) -> AttentionMask:
        """The visibility from a refine stream to [memory, stream]; cached for the last stream."""
        if not self.masks or self.masks[0][0] is not stream:
            self.masks[:] = [(stream, {})]
        found = self.masks[0][1]
        if window not in found:
            found[window] = AttentionMask(stream.fields, self.fields.then(stream.fields), window)
        return found[window]

    @property
    def layers(self) -> list[Pair]:
        return list(zip(self.keys, self.values, strict=True))

    def detach(self) -> Memory:
        """The same memory, detached from the graph."""
        keys, values = [k.detach() for k in self.keys], [v.detach() for v in self.values]
        return replace(self, keys=keys, values=values, masks=[])


def join(past: Pair, own: Pair) -> Pair:
    """Keys and values (R, G, K + N, D): the memory's, then the block's own."""
    keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in zip(past, own, strict=True))
    return keys, values


class PoolFullError(RuntimeError):
    """The pool has no room for the pages that are asked for."""


class Pool:
    """Pages of keys and values, k and v (L, G, P, D). It grows by doubling, up to `max_positions`."""

    def __init__(
        self, layers: int, heads: int, head_dim: int, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, max_positions: int = 1 << 24,
    ) -> None:  # fmt: skip
        self.k = torch.empty(layers, heads, 0, head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.max_pages = max_positions // PAGE
        self.num_pages = self.pages_in_use = 0
        self.make_room: Callable[[], bool] | None = None  # gives back pages that are only kept; False: there are none
        self._free: list[tuple[int, int]] = []  # (first page, pages), by first page; neighbours are merged

    def take(self, pages: int) -> int:
        """The first page of a run of free pages. PoolFullError beyond `max_positions`, if `make_room` does not help."""
        for index, (first, count) in enumerate(self._free):
            if count >= pages:
                self._free[index : index + 1] = [(first + pages, count - pages)] if count > pages else []
                self.pages_in_use += pages
                return first
        try:
            self._grow(pages)
        except PoolFullError:
            if self.make_room is None or not self.make_room():
                raise
        return self.take(pages)

    def give_back(self, first: int, pages: int) -> None:
        insort(self._free, (first, pages))
        self.pages_in_use -= pages
        merged: list[tuple[int, int]] = []
        for start, count in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            else:
                merged.append((start, count))
        self._free = merged

    def _grow(self, pages: int) -> None:
        """Room for a run of `pages` more at the end; at least twice the present size."""
        last = self._free[-1] if self._free and sum(self._free[-1]) == self.num_pages else (self.num_pages, 0)
        total = max(2 * self.num_pages, last[0] + pages, 8)
        if total > self.max_pages:
            total = max(last[0] + pages, self.max_pages)
        if total > self.max_pages:
            raise PoolFullError(
                f"the cache is full: {self.pages_in_use} of {self.max_pages} pages of {PAGE} positions are in use, and "
                f"{pages} more in a row are needed; run fewer requests at once, or shorter ones"
            )
        more = total - self.num_pages
        for name in ("k", "v"):
            store = getattr(self, name)
            larger = store.new_empty(*store.shape[:2], total * PAGE, store.shape[3])
            larger[:, :, : store.shape[2]] = store
            setattr(self, name, larger)
        self.num_pages = total
        self.pages_in_use += more
        self.give_back(total - more, more)


@dataclass(eq=False)
class _Extent:
    """A run of pages. users: histories that read it. writer: the one that may write; slots below `shared` are read by
    others too."""

    first: int
    pages: int
    users: int = 1
    writer: object = None
    shared: int = 0


class History:
    """The cached context of one request or guidance branch, and where its layout continues.

    `length` positions are committed; the next has rotary coordinate `next_position` and block number `next_block`.
    marks: one number per position that identifies what it was made of, see `generation.prefixes`. lora: the name of the
    adapter of the text weights with which it is computed (nn.lora), or None. invoked: whether the adapter is active at
    adapted positions alone.
    """

    def __init__(self, pool: Pool, lora: str | None = None, invoked: bool = False) -> None:
        self.pool, self.lora, self.invoked = pool, lora, invoked
        self._extent: _Extent | None = None
        self.length = self.next_position = self.next_block = 0
        self.marks: list[int] = []

    @property
    def start(self) -> int:
        """The slot in the pool of the first position."""
        return 0 if self._extent is None else self._extent.first * PAGE

    @property
    def capacity(self) -> int:
        return 0 if self._extent is None else self._extent.pages * PAGE

    @property
    def pages_alone(self) -> int:
        """Pages that no other history reads."""
        return 0 if self._extent is None or self._extent.users > 1 else self._extent.pages

    def reserve(self, extra: int) -> None:
        """Ensure `extra` writable slots after `length`. Moves the history where it must: to more pages, or away from
        positions that others read."""
        extent, need = self._extent, self.length + extra
        if extent is not None and need <= self.capacity and self._may_write(extent):
            extent.writer = self
            return
        pages = -(-(need + need // 2) // PAGE)  # half as many again: growing by one position at a time stays linear
        try:
            first = self.pool.take(pages)
        except PoolFullError:
            pages = -(-need // PAGE)
            first = self.pool.take(pages)
        new = _Extent(first, pages, writer=self)
        if self.length:
            a, b = self.start, first * PAGE
            for store in (self.pool.k, self.pool.v):
                store[:, :, b : b + self.length] = store[:, :, a : a + self.length]
        self._leave()
        self._extent = new

    def _may_write(self, extent: _Extent) -> bool:
        return extent.users == 1 or (self.length >= extent.shared and extent.writer in (None, self))

    def commit(self, num: int, next_position: int, next_block: int, marks: Sequence[int] = ()) -> None:
        """Count `num` positions that a pass has written after `length`."""
        self.length += num
        self.next_position, self.next_block = next_position, next_block
        self.marks += marks

    def truncate(self, length: int, next_position: int, next_block: int) -> None:
        """Discard the positions from `length` on; the caller gives where the layout continues."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a history of {self.length} positions to {length}")
        self.length, self.next_position, self.next_block = length, next_position, next_block
        del self.marks[length:]

    def fork(self) -> History:
        """A history with the same positions; its pages are copied when it is first written to."""
        other = History(self.pool, self.lora, self.invoked)
        other._extent, other.length = self._extent, self.length
        other.next_position, other.next_block, other.marks = self.next_position, self.next_block, list(self.marks)
        if self._extent is not None:
            self._extent.users += 1
            self._extent.shared = max(self._extent.shared, self.length)
        return other

    def rest(self) -> None:
        """Nothing more will be written: the first fork that goes on from the end needs no copy."""
        if self._extent is not None and self._extent.writer is self:
            self._extent.writer, self._extent.shared = None, max(self._extent.shared, self.length)

    def release(self) -> None:
        """Give the pages back where nobody else reads them. The history is empty afterwards."""
        self._leave()
        self.length = self.next_position = self.next_block = 0
        self.marks = []

    def _leave(self) -> None:
        extent, self._extent = self._extent, None
        if extent is None:
            return
        extent.users -= 1
        if extent.writer is self:
            extent.writer = None
        if extent.users == 0:
            self.pool.give_back(extent.first, extent.pages)
