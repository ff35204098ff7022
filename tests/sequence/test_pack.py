"""Layout, batch rows and fields by hand: every number of a packed batch, first fit, padding, and the table of the
rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from omni.sequence.layout import (
    IGNORE,
    Batch,
    LatentSpan,
    Shape,
    Span,
    TokenSpan,
    context_length,
    grid_positions,
    lay_out,
    lay_rows,
    pack,
)
from omni.sequence.mask import EMPTY, Fields, dense, flex, oracle, visible

PAD, C = 99, 2


def text(*ids: int, supervise: bool = True) -> TokenSpan:
    return TokenSpan(list(ids), [supervise] * len(ids))


def latent(grid: tuple[int, int, int], first: float = 1.0, supervise: bool = True, **more: object) -> LatentSpan:
    count = grid[0] * grid[1] * grid[2]
    latents = first + torch.arange(count * C, dtype=torch.float32).view(count, C)
    return LatentSpan(latents, grid, supervise, **more)  # type: ignore[arg-type]


# ---- one document --------------------------------------------------------------------------------------------------


def test_a_document_by_hand() -> None:
    picture = latent((1, 2, 2))
    spans: list[Span] = [TokenSpan([1, 2], [False, True]), picture, text(3)]
    one = lay_out(spans, PAD)
    assert one.ids == [1, 2, PAD, PAD, PAD, PAD, 3]
    assert one.supervise == [False, True, False, False, False, False, True]
    assert one.block == [0, 1, 2, 2, 2, 2, 3]
    assert one.position == [(0,) * 3, (1,) * 3, (2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3), (4,) * 3]
    assert [z is None for z in one.latents] == [True, True, False, False, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(one.latents[2:6], picture.latents, strict=True))  # type: ignore[arg-type]
    assert one.blocks == [(2, picture, 2)] and (one.next_position, one.next_block) == (5, 4)
    late = lay_out(spans, PAD, start_position=10, start_block=7)
    assert late.block == [block + 7 for block in one.block] and late.blocks == [(9, picture, 12)]
    assert late.position == [(t + 10, r + 10, c + 10) for t, r, c in one.position]
    assert (late.next_position, late.next_block) == (15, 11)


def test_trim_removes_a_last_supervised_block_and_all_after_it() -> None:
    seen, target = latent((1, 1, 2), supervise=False), latent((2, 1, 1))
    for spans, length in (
        ([text(1), target, text(2, 3)], 1),
        ([text(1), seen, target], 3),
        ([text(1), target, text(2), seen], 6),  # the last block is not supervised
        ([text(1), target, target], 3),
        ([text(1, 2)], 2),
        ([target], 0),
    ):
        one = lay_out(spans, PAD, trim_tail=True)
        assert len(one.ids) == len(one.block) == len(one.position) == context_length(spans, True) == length
        assert len(lay_out(spans, PAD).ids) == context_length(spans)
        assert [span for _, span, _ in one.blocks] == [span for span in spans if span is target]


def test_invalid_spans_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ids but 1 supervise flags"):
        TokenSpan([1, 2], [True])
    for latents in (torch.zeros(3, C), torch.zeros(4), torch.zeros(4, C, 1)):
        with pytest.raises(ValueError, match=r"grid \(1, 2, 2\) needs \(4, C\) latents, got"):
            LatentSpan(latents, (1, 2, 2))


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand() -> None:
    """Two documents in one row, two copies of each block."""
    a: list[Span] = [text(1), latent((1, 1, 2), 10.0), text(2)]
    b: list[Span] = [text(3, 4, supervise=False), latent((1, 1, 1), 30.0)]
    [batch], count = pack(
        [a, b], [Shape(2, 8, 7)], channels=C, pad_id=PAD, copies=2, uids=[7, 9], trim=[False, True], fixed_shape=True
    )
    assert count == 2 and batch.documents == (7, 9)
    assert batch.ids.tolist() == [[1, PAD, PAD, 2, 3, 4, PAD, PAD], [PAD] * 8]
    assert batch.is_latent.int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.latents[0, :, 0].tolist() == [0, 10, 12, 0, 0, 0, 0, 0] and not batch.latents[1].any()
    assert batch.target.tolist() == [[IGNORE, IGNORE, 2, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE], [IGNORE] * 8]
    assert batch.context.document.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1], [-1] * 8]
    assert batch.context.block.tolist() == [[0, 1, 1, 2, 0, 1, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert not batch.context.copy.any()
    assert batch.context.position[0].tolist() == [
        [0] * 3,
        [1] * 3,
        [1, 1, 2],
        [3] * 3,
        [0] * 3,
        [1] * 3,
        [0] * 3,
        [0] * 3,
    ]
    assert batch.refine.document.tolist() == [[0, 0, 0, 0, 1, 1, -1], [-1] * 7]
    assert batch.refine.block.tolist() == [[1, 1, 1, 1, 2, 2, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.refine.copy.tolist() == [[1, 1, 2, 2, 3, 4, -1], [-1] * 7]
    assert batch.refine.position[0].tolist() == [[1, 1, 1], [1, 1, 2]] * 2 + [[2] * 3] * 2 + [[0] * 3]
    assert batch.refine_latents[0, :, 1].tolist() == [11, 13, 11, 13, 31, 31, 0]
    assert batch.item.tolist() == [[0, 0, 1, 1, 2, 3, -1], [-1] * 7] and batch.item_first.tolist() == [0, 2, 4, 5]
    assert batch.item_names == ((7, 1, 0), (7, 1, 1), (9, 2, 0), (9, 2, 1))
    assert (batch.num_context, batch.num_refine, batch.num_positions) == (6, 6, 12)
    assert (batch.num_items, batch.num_targets) == (4, 1) and batch.null is None and not batch.dropped
    assert batch.context.rank is None and batch.refine.rank is None


def test_items_are_numbered_across_rows() -> None:
    documents: list[list[Span]] = [[text(1), latent((1, 1, 1))] for _ in range(3)]
    [batch], _ = pack(documents, [Shape(3, 2, 2)], channels=C, pad_id=PAD)
    assert batch.item.tolist() == [[0, -1], [1, -1], [2, -1]] and batch.item_first.tolist() == [0, 2, 4]
    assert batch.refine.copy.tolist() == [[1, -1]] * 3 and batch.refine.document.tolist() == [[0, -1]] * 3


def test_each_document_goes_to_the_first_row_with_room() -> None:
    """Lengths into rows of 4, 4 and 8, filled completely; the first document without room ends the batch."""
    lengths = [3, 2, 1, 2, 5, 3, 1]
    documents: list[list[Span]] = [[text(*[number] * n)] for number, n in enumerate(lengths)]
    (short, long), count = pack(documents, [Shape(2, 4, 0), Shape(1, 8, 0)], channels=C, pad_id=PAD)
    assert short.ids.tolist() == [[0, 0, 0, 2], [1, 1, 3, 3]]
    assert long.ids.tolist() == [[4, 4, 4, 4, 4, 5, 5, 5]] and count == 6
    assert short.documents == (0, 2, 1, 3) and long.documents == (4, 5)
    assert short.num_context == long.num_context == 8


def test_both_streams_must_have_room() -> None:
    """One picture of 2 latents in 2 copies needs 4 refine positions: a row of 8 has two documents."""
    documents: list[list[Span]] = [[text(number), latent((1, 1, 2))] for number in range(3)]
    [batch], count = pack(documents, [Shape(2, 100, 8)], channels=C, pad_id=PAD, copies=2)
    assert count == 3 and batch.ids[:, 0].tolist() == [0, 2] and batch.num_refine == 12
    [batch], count = pack(documents, [Shape(1, 100, 11)], channels=C, pad_id=PAD, copies=2, fixed_shape=False)
    assert count == 2 and batch.ids.shape == (1, 6) and batch.item.shape == (1, 8)


def test_rows_without_documents_shrink_to_one_position() -> None:
    (short, long), count = pack(
        [[text(1, 2, 3)]], [Shape(2, 2, 5), Shape(1, 8, 9)], channels=C, pad_id=PAD, fixed_shape=False
    )
    assert count == 1 and short.ids.tolist() == [[PAD], [PAD]] and long.ids.tolist() == [[1, 2, 3]]
    assert short.item.shape == (2, 0) and long.refine_latents.shape == (1, 0, C) and long.latents.shape == (1, 3, C)


@pytest.mark.parametrize(
    ("spans", "need"), [([text(*range(9))], "9 context and 0"), ([latent((1, 2, 3))], "6 context and 12")]
)
def test_document_larger_than_every_row_is_named(spans: list[Span], need: str) -> None:
    message = f"document 5 needs {need} refine positions, but a batch row has 8 and 11; raise one or shorten it"
    with pytest.raises(ValueError, match=message):
        pack([spans], [Shape(1, 8, 3), Shape(1, 7, 11)], channels=C, pad_id=PAD, copies=2, uids=[5])


def test_one_document_per_row() -> None:
    documents: list[list[Span]] = [[text(1), latent((1, 1, 2))], [text(2, 3)]]
    batch = lay_rows(documents, channels=C, pad_id=PAD, copies=3, uids=[4, 6])
    assert batch.ids.tolist() == [[1, PAD], [2, 3]]  # the last block is not in the context
    assert batch.item.tolist() == [[0, 0, 1, 1, 2, 2], [-1] * 6] and batch.documents == (4, 6)
    assert batch.item_names == ((4, 1, 0), (4, 1, 1), (4, 1, 2))
    empty = lay_rows([], channels=C, pad_id=PAD, copies=3, uids=[])
    assert empty.ids.shape == (0, 1) and empty.item.shape == (0, 1)
    with pytest.raises(ValueError, match="zip"):
        lay_rows(documents, channels=C, pad_id=PAD, copies=1, uids=[4])


def test_batch_to_moves_all_tensors() -> None:
    [inner], _ = pack([[text(1), latent((1, 1, 1))]], [Shape(1, 4, 4)], channels=C, pad_id=PAD)
    batch = Batch(**{**vars(inner), "null": inner, "dropped": frozenset({0})})
    moved = batch.to("meta")
    for one in (moved, moved.null):
        assert one is not None and one.ids.is_meta and one.context.position.is_meta and one.refine.document.is_meta
        assert one.context.rank is None and one.item_names == inner.item_names
    assert moved.dropped == frozenset({0}) and not batch.ids.is_meta


def test_layouts_are_immutable() -> None:
    [batch], _ = pack([[text(1)]], [Shape(1, 4, 4)], channels=C, pad_id=PAD)
    parts = (batch, batch.context, batch.context.fields, text(1), latent((1, 1, 1)), Shape(1, 4, 4))
    for part in parts:
        with pytest.raises(FrozenInstanceError):
            setattr(part, next(iter(vars(part))), None)


def test_ignore_is_torchs_ignore_index() -> None:
    loss = torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([IGNORE, 1]))
    assert float(loss) == pytest.approx(math.log(3))


# ---- the rule ------------------------------------------------------------------------------------------------------


def rule(q: tuple[int, int, int, int], k: tuple[int, int, int, int]) -> bool:
    """(document, block, copy, rank) of query and key, in words."""
    if q[0] != k[0]:
        return False
    if k[2] == 0:  # the context
        return k[1] < q[1] if q[2] else k[1] <= q[1]
    return k[2] == q[2] and k[3] <= q[3]


def test_the_rule_for_all_small_numbers() -> None:
    every = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1)))
    q, k = zip(*itertools.product(every, every), strict=True)
    found = visible(*torch.tensor(q).unbind(1), *torch.tensor(k).unbind(1))
    assert found.tolist() == [rule(a, b) for a, b in zip(q, k, strict=True)]


def test_dense_flex_and_oracle_follow_the_rule_with_ranks() -> None:
    from torch.nn.attention.flex_attention import create_mask

    every = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1)))
    all_of = torch.tensor(every).T
    queries = Fields(*(part.expand(2, -1) for part in all_of))
    keys = Fields(*(part.flip(0).expand(2, -1)[:, :20] for part in all_of))
    wanted = torch.tensor([[rule(q, k) for k in every[::-1][:20]] for q in every]).expand(2, -1, -1)
    assert torch.equal(dense(queries, keys), wanted) and torch.equal(oracle(queries, keys), wanted)
    with pytest.raises(ValueError, match="zip"):
        oracle(queries, Fields(*(part[None] for part in all_of)))
    block = flex(queries, keys)
    assert block.shape[-2:] == (36, 20) and block.shape[0] == 2
    assert torch.equal(create_mask(block.mask_mod, 2, None, 36, 20, device="cpu")[:, 0], wanted)


def test_fields_are_joined_in_order_and_have_ranks_where_any_has() -> None:
    def fields(first: int, rank: bool) -> Fields:
        parts = [torch.tensor([[first + n, first + n + 1]]) for n in (0, 10, 20, 30)]
        return Fields(*parts[:3], parts[3] if rank else None)

    plain = fields(1, False).then(fields(5, False))
    assert plain.rank is None and plain.ranks.tolist() == [[0] * 4]
    assert [p.tolist() for p in (plain.document, plain.block, plain.copy)] == [
        [[1, 2, 5, 6]], [[11, 12, 15, 16]], [[21, 22, 25, 26]]
    ]  # fmt: skip
    assert fields(1, True).then(fields(5, False)).ranks.tolist() == [[31, 32, 0, 0]]
    assert fields(1, False).then(fields(5, True)).ranks.tolist() == [[0, 0, 35, 36]]


def test_unused_slot_is_neither_document_nor_padding() -> None:
    assert EMPTY < 0 and EMPTY != -1  # -1 is padding, and a padded query must not see it


def test_positions_of_a_block() -> None:
    """Time, row and column count from the block's own place, in row-major order."""
    assert grid_positions((2, 1, 2), 5) == [(5, 5, 5), (5, 5, 6), (6, 5, 5), (6, 5, 6)]
    assert grid_positions((1, 2, 1), 3) == [(3, 3, 3), (3, 4, 3)]
