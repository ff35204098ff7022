"""The pool of pages against lists of positions: after writes, forks, cuts, moves and releases, each history holds its
own positions; and the memory of a packed context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
import torch
from torch import Tensor

from omni.nn.cache import PAGE, History, Memory, Pool, PoolFullError, join
from omni.rng import Key
from omni.sequence.layout import Stream
from omni.sequence.mask import EMPTY, Fields

L, G, D = 2, 3, 5


@dataclass
class Plain:
    """One history as a list of the numbers of its positions, and where its layout continues."""

    numbers: list[int] = field(default_factory=list)
    next_position: int = 0
    next_block: int = 0

    def copy(self) -> Plain:
        return Plain(list(self.numbers), self.next_position, self.next_block)


def content(numbers: list[int]) -> Tensor:
    """(L, G, n, D): the keys of positions; their values are the negative."""
    layer, head = torch.arange(L).view(L, 1, 1, 1) * 1e5, torch.arange(G * D).view(1, G, 1, D) / 100
    return layer + head + torch.tensor(numbers, dtype=torch.float32).view(1, 1, -1, 1)


def write(history: History, numbers: list[int]) -> None:
    """Write behind the length, like a pass; commits nothing."""
    history.reserve(len(numbers))
    at = slice(history.start + history.length, history.start + history.length + len(numbers))
    history.pool.k[:, :, at], history.pool.v[:, :, at] = content(numbers), -content(numbers)


def extents(histories: list[History]) -> set[tuple[int, int]]:
    return {(one.start, one.capacity) for one in histories if one.capacity}


def check(pool: Pool, histories: list[tuple[History, Plain]]) -> None:
    for one, plain in histories:
        n = len(plain.numbers)
        assert (one.length, one.next_position, one.next_block) == (n, plain.next_position, plain.next_block)
        assert one.marks == plain.numbers and one.capacity >= n and one.start % PAGE == one.capacity % PAGE == 0
        at = slice(one.start, one.start + n)
        assert torch.equal(pool.k[:, :, at], content(plain.numbers)) and torch.equal(
            pool.v[:, :, at], -pool.k[:, :, at]
        )
    runs = sorted(extents([one for one, _ in histories]))
    assert all(a + num <= b for (a, num), (b, _) in zip(runs, runs[1:], strict=False))  # no slot belongs to two
    assert pool.pages_in_use * PAGE == sum(num for _, num in runs) <= pool.num_pages * PAGE
    assert pool.k.shape == pool.v.shape == (L, G, pool.num_pages * PAGE, D)


@pytest.mark.parametrize("seed", range(12))
def test_histories_equal_lists(seed: int) -> None:
    random = Key(seed).fold("cache").python()
    pool = Pool(L, G, D)
    histories = [(History(pool), Plain())]
    numbers = iter(range(1, 1 << 20))
    kinds = ["append"] * 8 + ["block"] * 4 + ["fork"] * 2 + ["truncate"] * 2 + ["rest"] * 2 + ["release", "new", "move"]
    for _ in range(150):
        kind, (one, plain) = random.choice(kinds), random.choice(histories)
        if kind == "append":
            num = random.randint(1, 40 if random.random() < 0.2 else 5)
            new = [next(numbers) for _ in range(num)]
            write(one, new)
            plain.numbers += new
            plain.next_position, plain.next_block = plain.next_position + num, plain.next_block + 1
            one.commit(num, plain.next_position, plain.next_block, new)
        elif kind == "block":  # refinement: writes, commits nothing
            write(one, [-next(numbers) for _ in range(random.randint(1, 20))])
        elif kind == "fork" and len(histories) < 8:
            histories.append((one.fork(), plain.copy()))
        elif kind == "truncate":
            n = random.randint(0, len(plain.numbers))
            del plain.numbers[n:]
            plain.next_position, plain.next_block = n + 2, n + 1
            one.truncate(n, n + 2, n + 1)
        elif kind == "release":
            one.release()
            plain.numbers, plain.next_position, plain.next_block = [], 0, 0
        elif kind == "new" and len(histories) < 8:
            histories.append((History(pool), Plain()))
        elif kind == "rest":
            one.rest()
        elif kind == "move":
            one.reserve(random.randint(1, 100))
        check(pool, histories)
    assert pool.num_pages > 8  # it has grown
    for one, _ in histories:
        one.release()
    assert pool.pages_in_use == 0 and pool.take(pool.num_pages) == 0  # one free run


def filled(pool: Pool, num: int) -> History:
    one = History(pool)
    write(one, list(range(num)))
    one.commit(num, num, num, range(num))
    return one


def test_a_fork_is_free_and_one_writer_does_not_copy() -> None:
    """The history that was written to last goes on in place; after it has left, the first of the others does."""
    pool = Pool(L, G, D)
    one = filled(pool, 20)
    other, third, fourth = one.fork(), one.fork(), one.fork()
    start, pages = one.start, pool.pages_in_use
    assert {h.start for h in (other, third, fourth)} == {start} and one.pages_alone == other.pages_alone == 0
    write(one, [-1])
    assert one.start == start and pool.pages_in_use == pages
    write(other, [-2])
    assert other.start != start and one.start == start and pool.pages_in_use > pages
    assert torch.equal(pool.k[:, :, start + 20 : start + 21], content([-1]))
    assert other.pages_alone == other.capacity // PAGE
    one.release()
    write(third, [-3])
    assert third.start == start and third.pages_alone == 0
    write(fourth, [-4])
    assert fourth.start != start and third.pages_alone == third.capacity // PAGE
    third.truncate(4, 4, 4)
    write(third, [-5])  # nobody else reads these positions
    assert third.start == start and torch.equal(pool.k[:, :, other.start : other.start + 20], content(list(range(20))))


def test_a_history_at_rest_leaves_its_free_slots_to_the_first_writer() -> None:
    """As the kept history of a finished request does: the next turn goes on behind it."""
    pool = Pool(L, G, D)
    one = filled(pool, 20)
    History(pool).rest()  # nothing to leave
    start = one.start
    one.rest()
    other, third = one.fork(), one.fork()
    other.rest()  # not the writer: nothing changes
    write(third, [-1])
    assert third.start == start
    write(other, [-2])
    write(one, [-3])
    assert len({one.start, other.start, start}) == 3
    check(pool, [(h, Plain(list(range(20)), 20, 20)) for h in (one, other, third)])


def test_a_history_at_rest_keeps_its_own_positions() -> None:
    """Those that it has written behind the ones it shares."""
    pool = Pool(L, G, D)
    one = filled(pool, 20)
    one.rest()
    third, late = one.fork(), one.fork()
    write(third, [20, 21])
    third.commit(2, 22, 22, [20, 21])
    third.rest()
    write(late, [-1, -2])
    check(pool, [(third, Plain(list(range(22)), 22, 22)), (late, Plain(list(range(20)), 20, 20))])
    again = third.fork()
    write(again, [22])  # from the end of what is written, where nobody else writes
    assert again.start == third.start


def test_a_fork_without_positions_shares_none() -> None:
    pool = Pool(L, G, D)
    one = History(pool)
    one.reserve(3)
    start, other = one.start, one.fork()
    write(one, [1, 2, 3])
    assert one.start == start
    write(other, [4])
    assert other.start != start and torch.equal(pool.k[:, :, start : start + 3], content([1, 2, 3]))


def test_a_shorter_fork_does_not_write_over_positions_that_others_read() -> None:
    pool = Pool(L, G, D)
    one = filled(pool, 20)
    other = one.fork()
    other.truncate(5, 5, 5)
    write(other, [-1] * 3)
    assert other.start != one.start
    assert torch.equal(pool.k[:, :, one.start : one.start + 20], content(list(range(20))))
    assert torch.equal(pool.k[:, :, other.start : other.start + 8], content([*range(5), -1, -1, -1]))
    other.marks.append(7)
    assert one.marks == list(range(20))  # forks share no lists


def test_capacity_follows_the_need_by_half_more() -> None:
    """Growing by one position at a time moves a history rarely; the pool doubles."""
    for num, capacity in ((1, 16), (24, 48), (40, 64)):
        one = History(Pool(1, 1, 2))
        one.reserve(num)
        assert one.capacity == capacity
    pool = Pool(1, 1, 2)
    one, starts, sizes = History(pool), [], []
    for n in range(1000):
        one.reserve(1)
        one.commit(1, n + 1, n + 1)
        starts += [] if starts and starts[-1] == one.start else [one.start]
        sizes += [] if sizes and sizes[-1] == pool.num_pages else [pool.num_pages]
        assert one.length <= one.capacity < 1.5 * (one.length + 1) + 16
    assert len(starts) < 20 and all(b >= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


def test_released_pages_are_taken_again() -> None:
    """Neighbours merge: what single pages left serves a longer run."""
    pool = Pool(1, 1, 2)
    firsts = [pool.take(1) for _ in range(8)]
    assert firsts == list(range(8)) and pool.num_pages == pool.pages_in_use == 8
    for first in (0, 3, 5, 4):
        pool.give_back(first, 1)
    assert pool.take(3) == 3 and pool.take(1) == 0 and pool.num_pages == 8
    assert pool.take(1) == 8 and pool.num_pages == 16 and pool.pages_in_use == 9


def test_a_pool_grows_to_twice_its_size_or_to_the_need() -> None:
    """Free pages at its end are part of the run that is asked for."""
    pool = Pool(1, 1, 2)
    assert pool.take(6) == 0 and pool.num_pages == 8
    assert pool.take(20) == 6 and pool.num_pages == pool.pages_in_use == 26
    assert pool.take(1) == 26 and pool.num_pages == 52


def test_a_full_pool_names_its_numbers() -> None:
    pool = Pool(1, 1, 2, max_positions=10 * PAGE)
    one = filled_plainly(pool, 2 * PAGE)  # three pages, of ten
    with pytest.raises(PoolFullError, match="3 of 10 pages of 16 positions are in use, and 8 more in a row are needed"):
        pool.take(8)
    assert pool.pages_in_use == 3 and pool.take(7) == 3  # up to the last page, which is not twice the size before
    with pytest.raises(PoolFullError, match="10 of 10 pages of 16 positions are in use, and 4 more"):
        one.reserve(2 * PAGE)
    assert one.length == 2 * PAGE and pool.pages_in_use == 10  # nothing is lost
    with pytest.raises(PoolFullError, match="0 of 2 pages"):
        Pool(1, 1, 2, max_positions=2 * PAGE + 3).take(3)


def filled_plainly(pool: Pool, num: int) -> History:
    one = History(pool)
    one.reserve(num)
    one.commit(num, num, num)
    return one


def test_truncate_outside_of_the_history_raises() -> None:
    one = filled(Pool(L, G, D), 2)
    for length in (-1, 3):
        with pytest.raises(ValueError, match=f"cannot truncate a history of 2 positions to {length}"):
            one.truncate(length, 0, 0)
    one.truncate(2, 2, 2)
    one.truncate(0, 0, 0)
    assert one.length == 0 and one.marks == []


def test_an_empty_history_has_no_pages() -> None:
    pool = Pool(L, G, D)
    one = History(pool)
    other = one.fork()
    one.release()
    assert (one.capacity, one.start, one.pages_alone, pool.num_pages, pool.pages_in_use) == (0, 0, 0, 0, 0)
    write(other, [1])
    assert one.capacity == 0 and pool.pages_in_use == other.pages_alone == 1


# ---- the memory of a packed context --------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Two rows of three positions; of the second row, one counts."""
    document, block = torch.tensor([[0, 0, 0], [0, EMPTY, EMPTY]]), torch.arange(3).expand(2, 3)
    keys = [torch.full((2, G, 3, D), float(layer)).requires_grad_() for layer in range(L)]
    yield Memory(keys, [k * 2 for k in keys], Fields(document, block, torch.zeros_like(block)))


def stream_of(rows: int, length: int) -> Stream:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    return Stream(zeros, zeros + 9, zeros + 1, zeros[..., None].expand(rows, length, 3))


def test_mask_is_cached_for_a_stream(memory: Memory) -> None:
    first, other = stream_of(2, 2), stream_of(2, 3)
    mask = memory.mask(first)
    assert memory.mask(first) is mask
    assert memory.mask(other) is not mask and memory.mask(other) is memory.mask(other)
    seen = [[True] * 5] * 2, [[True, False, False, True, True]] * 2
    assert mask.boolean()[:, 0].tolist() == list(seen)


def test_detached_memory_has_no_graph(memory: Memory) -> None:
    plain = memory.detach()
    assert memory.keys[0].requires_grad and memory.values[0].requires_grad
    assert not plain.keys[0].requires_grad and not plain.values[0].requires_grad
    assert torch.equal(plain.keys[1], memory.keys[1]) and torch.equal(plain.values[1], memory.values[1])
    assert plain.fields is memory.fields
    assert [torch.equal(k, a) and torch.equal(v, b) for (k, v), a, b in
            zip(plain.layers, memory.keys, memory.values, strict=True)] == [True] * L  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        memory.keys = []  # type: ignore[misc]


def test_join_casts_past_keys_to_the_dtype_of_own_keys() -> None:
    past, own = (torch.ones(1, 1, 2, 2),) * 2, (torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16),) * 2
    for part in join(past, own):
        assert part.dtype == torch.bfloat16 and part[0, 0, :, 0].tolist() == [1, 1, 0]
