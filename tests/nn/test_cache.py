"""The KV cache against lists of positions: after writes, forks, cuts and stacks, each batch row holds its own
positions."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field

import pytest
import torch
from torch import Tensor

from omni.nn.cache import KVCache, join
from omni.rng import Key
from omni.sequence.layout import Stream
from omni.sequence.mask import EMPTY

L, G, D = 2, 3, 5


@dataclass
class Plain:
    """One batch row as a list of (block, number of the position), and where its layout continues."""

    positions: list[tuple[int, int]] = field(default_factory=list)
    next_position: int = 0
    next_block: int = 0

    def copy(self) -> Plain:
        return Plain(list(self.positions), self.next_position, self.next_block)


def content(layer: int, number: int) -> Tensor:
    """(G, D): the key of a position; its value is the negative."""
    return 1000.0 * layer + number + torch.arange(G * D).reshape(G, D) / 100


def write(cache: KVCache, rows: list[Plain], valid: list[int], first: int, width: int) -> None:
    """`width` positions for every batch row; the first `valid[r]` count."""
    numbers = torch.arange(first, first + len(rows) * width).reshape(len(rows), width)
    block = torch.tensor([[row.next_block + n for n in range(width)] for row in rows])
    cache.write_fields(block, valid)
    longest = max(len(row.positions) for row in rows)
    for layer in range(L):
        k = torch.stack([torch.stack([content(layer, int(n)) for n in line], 1) for line in numbers])
        keys, values = cache.write(layer, k, -k)
        assert keys.shape == values.shape == (len(rows), G, longest + width, D)
        for r, row in enumerate(rows):
            assert torch.equal(keys[r, :, len(row.positions) : len(row.positions) + width], k[r])
            assert torch.equal(values[r, :, len(row.positions) : len(row.positions) + width], -k[r])
    cache.advance(valid)
    for r, (row, n) in enumerate(zip(rows, valid, strict=True)):
        row.positions += [(int(block[r, i]), int(numbers[r, i])) for i in range(n)]
        row.next_position += n
        row.next_block += n
        cache.next_position[r], cache.next_block[r] = row.next_position, row.next_block


def check(cache: KVCache, rows: list[Plain]) -> None:
    lengths = [len(row.positions) for row in rows]
    assert cache.lengths == lengths and cache.rows == len(rows) and cache.longest == max(lengths)
    assert cache.uniform == (len(set(lengths)) == 1)
    assert cache.next_position == [row.next_position for row in rows]
    assert cache.next_block == [row.next_block for row in rows]
    assert cache.k.shape == cache.v.shape == (L, len(rows), G, cache.capacity, D) and cache.capacity >= max(lengths)
    fields = cache.fields(cache.capacity)
    for r, row in enumerate(rows):
        n = len(row.positions)
        assert fields.document[r].tolist() == [0] * n + [EMPTY] * (cache.capacity - n)
        assert fields.block[r, :n].tolist() == [block for block, _ in row.positions]
        assert not fields.copy.any() and fields.copy.shape == fields.block.shape
        for layer in range(L):
            for i, (_, number) in enumerate(row.positions):
                assert torch.equal(cache.k[layer, r, :, i], content(layer, number))
                assert torch.equal(cache.v[layer, r, :, i], -content(layer, number))


@pytest.mark.parametrize("seed", range(6))
def test_cache_equals_lists(seed: int) -> None:
    random = Key(seed).fold("cache").python()
    cache, rows, number = KVCache(L, 2, G, 3, D), [Plain(), Plain()], 1
    for _ in range(12):
        kind = random.choice(("write", "write", "even", "fork", "truncate", "stack"))
        if kind in ("write", "even"):
            width = random.randint(1, 4)
            valid = [width if kind == "even" else random.randint(0, width) for _ in rows]
            write(cache, rows, valid, number, width)
            number += width * len(rows)
        elif kind == "fork":
            chosen = [random.randrange(len(rows)) for _ in range(random.randint(1, 3))]
            before, cache = cache, cache.fork(chosen)
            rows = [rows[r].copy() for r in chosen]
            before.k.zero_(), before.v.zero_(), before.block.zero_(), before.document.zero_()  # a copy, no view
        elif kind == "truncate":
            r = random.randrange(len(rows))
            n = random.randint(0, len(rows[r].positions))
            rows[r] = Plain(rows[r].positions[:n], n + 2, n + 1)
            cache.truncate(r, n, n + 2, n + 1)
        elif len(rows) < 4:
            other, more = KVCache(L, 1, G, random.randint(1, 9), D), [Plain()]
            write(other, more, [2], number, 2)
            number += 2
            cache, rows = cache.stack(other), rows + more
        check(cache, rows)


def test_capacity_doubles_or_grows_to_the_need() -> None:
    cache = KVCache(1, 2, 1, 4, 2)
    assert (cache.capacity, cache.rows, cache.longest, cache.uniform) == (4, 2, 0, True)
    cache.reserve(4)
    assert cache.capacity == 4
    cache.reserve(5)
    assert cache.capacity == 8
    cache.advance([3, 1])
    assert cache.longest == 3 and not cache.uniform
    cache.reserve(5)
    assert cache.capacity == 8
    cache.reserve(20)
    assert cache.capacity == 23
    with pytest.raises(ValueError, match="zip"):
        cache.advance([1])


def test_truncate_outside_of_the_row_raises() -> None:
    cache = KVCache(1, 1, 1, 4, 2)
    cache.advance([2])
    for length in (-1, 3):
        with pytest.raises(ValueError, match=f"cannot truncate batch row 0 of length 2 to {length}"):
            cache.truncate(0, length, 0, 0)
    cache.truncate(0, 2, 2, 2)
    cache.truncate(0, 0, 0, 0)
    assert cache.lengths == [0]


def stream_of(rows: int, length: int) -> Stream:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    return Stream(zeros, zeros + 9, zeros + 1, zeros[..., None].expand(rows, length, 3))


def test_memory_is_the_used_slots_followed_by_room() -> None:
    rows = [Plain(), Plain()]
    cache = KVCache(L, 2, G, 4, D)
    write(cache, rows, [3, 1], 1, 3)
    memory = cache.memory()
    assert memory.room is None and not memory.uniform and len(memory.keys) == len(memory.values) == L
    assert memory.fields.document.tolist() == [[0, 0, 0], [0, EMPTY, EMPTY]]
    for layer, (keys, values) in enumerate(memory.layers):
        assert torch.equal(keys, cache.k[layer, :, :, :3]) and torch.equal(values, cache.v[layer, :, :, :3])
    roomy = cache.memory(room=2)
    assert roomy.room is not None and cache.capacity == 8
    own = torch.full((2, G, 2, D), 7.0), torch.full((2, G, 2, D), 8.0)
    for layer in range(L):
        past = roomy.layers[layer]
        with_room, without = join(past, own, roomy.room[layer]), join(past, own, None)
        for a, b, stored, new in zip(with_room, without, (cache.k, cache.v), own, strict=True):
            assert a.shape == (2, G, 5, D) and torch.equal(a, b) and torch.equal(a[:, :, 3:], new)
            assert a.data_ptr() == stored[layer].data_ptr()  # in place
    assert cache.lengths == [3, 1] and bool((cache.document[:, 3:] == EMPTY).all())
    cache.truncate(0, 1, 1, 1)
    assert cache.memory().uniform


def test_join_casts_past_keys_to_the_dtype_of_own_keys() -> None:
    past, own = (torch.ones(1, 1, 2, 2),) * 2, (torch.ones(1, 1, 1, 2, dtype=torch.bfloat16),) * 2
    assert all(part.dtype == torch.bfloat16 and part.shape == (1, 1, 3, 2) for part in join(past, own, None))


def test_mask_is_cached_for_a_stream() -> None:
    cache = KVCache(1, 2, 1, 4, 2)
    cache.write_fields(torch.tensor([[0, 1], [0, 1]]), [2, 1])
    cache.advance([2, 1])
    memory = cache.memory()
    first, other = stream_of(2, 2), stream_of(2, 3)
    mask = memory.mask(first)
    assert memory.mask(first) is mask
    assert memory.mask(other) is not mask and memory.mask(other) is memory.mask(other)
    seen = [[True, True, True, True]] * 2, [[True, False, True, True]] * 2  # of the second row, one counts
    assert mask.boolean()[:, 0].tolist() == list(seen)


def test_detached_memory_has_no_graph_and_no_room() -> None:
    cache = KVCache(1, 1, 1, 4, 2)
    cache.advance([2])
    cache.k.requires_grad_(), cache.v.requires_grad_()
    memory = cache.memory(room=1)
    plain = memory.detach()
    assert memory.keys[0].requires_grad and memory.values[0].requires_grad
    assert not plain.keys[0].requires_grad and not plain.values[0].requires_grad and plain.room is None
    assert torch.equal(plain.keys[0], memory.keys[0]) and torch.equal(plain.values[0], memory.values[0])
    assert plain.fields is memory.fields
    with pytest.raises(FrozenInstanceError):
        memory.uniform = True  # type: ignore[misc]
