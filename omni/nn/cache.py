"""The KV cache: allocated ahead, one length per batch row, with fork and truncate. Only the context stream writes it.

Legend: L layers, R batch rows, G key heads, M capacity in positions, D head width, N new positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omni.nn.attention.backends import AttentionMask
from omni.sequence.layout import Stream
from omni.sequence.mask import EMPTY, Fields

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class Memory:
    """The keys and values that the refine stream attends to: per layer (R, G, K, D), and the fields of the K positions.

    `room`: per layer (R, G, K + N, D), the same followed by N free slots for the block's own keys and values.
    """

    keys: list[Tensor]
    values: list[Tensor]
    fields: Fields
    uniform: bool = False  # True: every refine query sees every key; no mask is needed
    room: list[Pair] | None = None
    masks: list[tuple[Stream, AttentionMask]] = field(default_factory=list)  # of the last stream

    def mask(self, stream: Stream) -> AttentionMask:
        """The visibility from a refine stream to [memory, stream]; cached for the last stream."""
        if not self.masks or self.masks[0][0] is not stream:
            self.masks[:] = [(stream, AttentionMask(stream.fields, self.fields.then(stream.fields)))]
        return self.masks[0][1]

    @property
    def layers(self) -> list[Pair]:
        return list(zip(self.keys, self.values, strict=True))

    def detach(self) -> Memory:
        """The same memory, detached from the graph."""
        keys, values = [k.detach() for k in self.keys], [v.detach() for v in self.values]
        return replace(self, keys=keys, values=values, room=None)


def join(past: Pair, own: Pair, room: Pair | None) -> Pair:
    """Keys and values (R, G, K + N, D): the memory's, then the block's own, written into the room where there is
    one."""
    if room is None:
        keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in zip(past, own, strict=True))
        return keys, values
    for whole, new in zip(room, own, strict=True):
        whole[:, :, -new.shape[2] :] = new
    return room


class KVCache:
    """Keys and values of the context of R batch rows, and where the layout of each row continues.

    Row r has `lengths[r]` used positions; its next position is `next_position[r]`, its next block `next_block[r]`.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, capacity: int, head_dim: int,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        shape = (layers, rows, heads, capacity, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.block = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self.document = torch.full((rows, capacity), EMPTY, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self.next_position = [0] * rows
        self.next_block = [0] * rows

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def reserve(self, extra: int) -> None:
        """Ensure room for `extra` more positions in every batch row; at least double the capacity when it must grow."""
        need = self.longest + extra
        if need > self.capacity:
            self._widen(max(need, 2 * self.capacity))

    def write_fields(self, block: Tensor, valid: list[int]) -> None:
        """Set the fields of N new positions per batch row: `block` (R, N) int64; the first `valid[r]` count. Call
        `advance` after the layers have written."""
        self.reserve(block.shape[1])
        for r, n in enumerate(valid):
            at = slice(self.lengths[r], self.lengths[r] + n)
            self.block[r, at] = block[r, :n]
            self.document[r, at] = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, G, N, D) after the length of each batch row; returns views (R, G, longest + N, D) of the
        whole."""
        n = k.shape[2]
        if self.uniform:
            at = slice(self.lengths[0], self.lengths[0] + n)
            self.k[layer, :, :, at] = k
            self.v[layer, :, :, at] = v
        else:
            for r, start in enumerate(self.lengths):
                self.k[layer, r, :, start : start + n] = k[r]
                self.v[layer, r, :, start : start + n] = v[r]
        end = self.longest + n
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, valid: list[int]) -> None:
        self.lengths = [a + n for a, n in zip(self.lengths, valid, strict=True)]

    def fields(self, end: int) -> Fields:
        return Fields(self.document[:, :end], self.block[:, :end], torch.zeros_like(self.block[:, :end]))

    def memory(self, room: int = 0) -> Memory:
        """The context for the refine stream. `room`: free slots for the keys and values of blocks of exactly that many
        positions. Valid until the next write to the cache."""
        self.reserve(room)
        end = self.longest

        def views(store: Tensor, end: int) -> list[Tensor]:
            return [one[:, :, :end] for one in store.unbind(0)]

        own = list(zip(views(self.k, end + room), views(self.v, end + room), strict=True)) if room else None
        return Memory(views(self.k, end), views(self.v, end), self.fields(end), self.uniform, own)

    def fork(self, rows: list[int]) -> KVCache:
        """An independent copy of the given batch rows; a row may occur more than once."""
        other = object.__new__(KVCache)
        index = torch.tensor(rows, device=self.k.device)
        other.k, other.v = self.k.index_select(1, index), self.v.index_select(1, index)
        other.block, other.document = self.block.index_select(0, index), self.document.index_select(0, index)
        for name in ("lengths", "next_position", "next_block"):
            setattr(other, name, [getattr(self, name)[r] for r in rows])
        return other

    def truncate(self, row: int, length: int, next_position: int, next_block: int) -> None:
        """Discard the positions of batch row `row` from `length` on; the caller gives where its layout continues."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot truncate batch row {row} of length {self.lengths[row]} to {length}")
        self.document[row, length:] = EMPTY
        self.lengths[row], self.next_position[row], self.next_block[row] = length, next_position, next_block

    def stack(self, other: KVCache) -> KVCache:
        """A new cache: the batch rows of `self`, then those of `other`."""
        out = self.fork(list(range(self.rows)))
        theirs = other.fork(list(range(other.rows)))
        width = max(out.capacity, theirs.capacity)
        for part in (out, theirs):
            if part.capacity < width:
                part._widen(width)
        out.k, out.v = torch.cat([out.k, theirs.k], 1), torch.cat([out.v, theirs.v], 1)
        out.block, out.document = torch.cat([out.block, theirs.block]), torch.cat([out.document, theirs.document])
        for name in ("lengths", "next_position", "next_block"):
            setattr(out, name, getattr(out, name) + getattr(theirs, name))
        return out

    def _widen(self, capacity: int) -> None:
        """Grow to exactly `capacity` positions; `capacity` exceeds the present one."""
        more = (0, capacity - self.capacity)
        self.k, self.v = (torch.nn.functional.pad(store, (0, 0, *more)) for store in (self.k, self.v))
        self.block = torch.nn.functional.pad(self.block, more)
        self.document = torch.nn.functional.pad(self.document, more, value=EMPTY)
