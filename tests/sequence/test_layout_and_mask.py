"""Layout, packing and visibility: dense = flex = oracle on random layouts; invisible positions have no effect."""

from __future__ import annotations

import pytest
import torch
from layouts import CHANNELS, PAD, random_spans, small_model

from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.layout import IGNORE, LatentSpan, Shape, TokenSpan, context_length, lay_out, pack
from omni.sequence.mask import Fields, dense, flex, oracle
from omni.sequence.positions import rotary_table


def all_fields(batch) -> Fields:  # noqa: ANN001
    return batch.context.fields.then(batch.refine.fields)


def random_rows(key: Key, rows: int = 50) -> Fields:
    """The fields of `rows` random layouts: several documents each, context of 40 and refine stream of 30 positions."""
    documents, number = [], 0
    while len(documents) < 3 * rows:
        spans = random_spans(key.fold(number), 3)
        number += 1
        one = lay_out(spans, PAD)
        if len(one.ids) <= 40 and 2 * sum(len(span.latents) for _, span, _ in one.blocks) <= 30:
            documents.append(spans)
    trim = [key.fold("trim", n).python().random() < 0.5 for n in range(len(documents))]
    [batch], _ = pack(documents, [Shape(rows, 40, 30)], channels=CHANNELS, pad_id=PAD, copies=2, trim=trim)
    return all_fields(batch)


@pytest.mark.parametrize("part", range(4))
def test_dense_equals_flex_equals_oracle_on_500_random_layouts(part: int) -> None:
    """Four parts of 500: 2,000 layouts, every entry of context + refine compared (flex: its mask, forward, CPU)."""
    from torch.nn.attention.flex_attention import create_mask

    for n in range(10):
        fields = random_rows(Key(n).fold("layouts", part))
        rows, length = fields.document.shape
        assert (rows, length) == (50, 70)
        window = None if n % 2 else 1 + n  # a window in every other round
        expected = oracle(fields, fields, window)
        assert torch.equal(dense(fields, fields, window), expected)
        predicate = flex(fields, fields, window).mask_mod
        assert torch.equal(create_mask(predicate, rows, None, length, length, device="cpu")[:, 0], expected)


def test_the_rule_in_words() -> None:
    """T0 I1 T2 with a noisy copy of I1: the copy sees T0 and itself; T2 sees T0, clean I1, T2; no other sees the
    copy."""
    image = LatentSpan(torch.zeros(2, CHANNELS), (1, 1, 2), True)
    [batch], _ = pack(
        [[TokenSpan([1], [False]), image, TokenSpan([2], [True])]],
        [Shape(1, 4, 2)], channels=CHANNELS, pad_id=PAD,
    )  # fmt: skip
    fields = all_fields(batch)
    seen = dense(fields, fields)[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],  # T0
        [1, 1, 1, 0, 0, 0],  # clean latent, bidirectional inside its block
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],  # T2
        [1, 0, 0, 0, 1, 1],  # noisy latents: context strictly before the block, and the copy itself
        [1, 0, 0, 0, 1, 1],
    ]


def test_a_window_in_words() -> None:
    """T0 T1 I2 (two latents) T3 with a noisy copy of I2, window 2: a block sees the position before it and itself."""
    image = LatentSpan(torch.zeros(2, CHANNELS), (1, 1, 2), True)
    [batch], _ = pack(
        [[TokenSpan([1, 1], [False, False]), image, TokenSpan([2], [True])]],
        [Shape(1, 5, 2)], channels=CHANNELS, pad_id=PAD,
    )  # fmt: skip
    fields = all_fields(batch)
    assert dense(fields, fields, 2)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],  # text: the position before it, whatever that is
        [0, 1, 0, 0, 0, 1, 1],
        [0, 1, 0, 0, 0, 1, 1],
    ]


def test_dense_equals_oracle_on_every_pair() -> None:
    """Every document, block, copy and rank of two, padding included, as query against each as key."""
    values = torch.cartesian_prod(*(torch.arange(low, high) for low, high in ((-2, 2), (-1, 2), (-1, 3), (0, 2))))
    fields = Fields(*(part[None] for part in values.unbind(1)))
    assert torch.equal(dense(fields, fields), oracle(fields, fields))


def test_perturbing_an_invisible_token_changes_no_bit_of_any_gradient() -> None:
    model = small_model().train()
    spans = [random_spans(Key(7).fold(n), 4) for n in range(3)]
    hidden_change = [[*spans[0]], [*spans[1], TokenSpan([9, 9], [False, False])], [*spans[2]]]

    def gradients(documents: list) -> dict[str, torch.Tensor]:
        [batch], _ = pack(documents, [Shape(1, 200, 200)], channels=CHANNELS, pad_id=PAD)
        model.zero_grad()
        terms = model(batch, [build_objective("next_token"), build_objective("flow_matching")], Key(1))
        sum(term.sum for term in terms.values()).backward()  # type: ignore[union-attr]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    other = [
        [*spans[0]],
        [*spans[1], TokenSpan([77, 5], [False, False])],
        [*spans[2]],
    ]  # unsupervised, invisible to all
    a, b = gradients(hidden_change), gradients(other)
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed <= {"token.embedding.weight"}
    rows = (a["token.embedding.weight"] != b["token.embedding.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == []


def test_perturbing_a_visible_token_changes_the_gradient() -> None:
    """Control of the test above: a visible token matters."""
    model = small_model().train()
    image = LatentSpan(Key(0).normal((2, CHANNELS)), (1, 1, 2), True)

    def gradient(token: int) -> torch.Tensor:
        [batch], _ = pack([[TokenSpan([token], [False]), image]], [Shape(1, 8, 8)], channels=CHANNELS, pad_id=PAD)
        model.zero_grad()
        model(batch, [build_objective("flow_matching")], Key(1))["FlowMatching"].sum.backward()
        return model.flow.velocity.weight.grad.clone()  # type: ignore[union-attr]

    assert not torch.equal(gradient(1), gradient(2))


def test_packing_keeps_every_document_whole_and_in_order() -> None:
    documents = [random_spans(Key(n).fold("pack")) for n in range(30)]
    shapes = [Shape(3, 24, 40), Shape(1, 90, 160)]
    batches, count = pack(documents, shapes, channels=CHANNELS, pad_id=PAD, copies=2)
    assert 0 < count <= 30
    packed = sorted(uid for b in batches for uid in b.documents)
    assert packed == list(range(count))
    for batch, shape in zip(batches, shapes, strict=True):
        assert batch.ids.shape == (shape.rows, shape.budget) and batch.item.shape == (shape.rows, shape.refine_budget)
        flat = batch.item[batch.item >= 0]
        assert torch.equal(flat, flat.sort().values)  # noise requires items in flat order
        assert len(batch.item_names) == batch.num_items


def test_packing_does_not_change_a_document() -> None:
    spans = random_spans(Key(3).fold("alone"), 6)
    [alone], _ = pack([spans], [Shape(1, 200, 200)], channels=CHANNELS, pad_id=PAD)
    [beside], _ = pack([random_spans(Key(4)), spans], [Shape(1, 400, 400)], channels=CHANNELS, pad_id=PAD)
    n = int((alone.context.document == 0).sum())
    where = beside.context.document[0] == 1
    assert torch.equal(beside.ids[0][where], alone.ids[0, :n])
    assert torch.equal(beside.context.position[0][where], alone.context.position[0, :n])
    assert torch.equal(beside.target[0][where], alone.target[0, :n])


def test_too_long_document_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="document 5 needs 9 context"):
        pack([[TokenSpan([1] * 9, [True] * 9)]], [Shape(1, 8, 8)], channels=4, pad_id=PAD, uids=[5])


def test_targets_are_the_next_supervised_ids() -> None:
    spans = [
        TokenSpan([1, 2, 3], [False, False, True]),
        LatentSpan(torch.zeros(1, 4), (1, 1, 1)),
        TokenSpan([4], [True]),
    ]
    [batch], _ = pack([spans], [Shape(1, 5, 0)], channels=4, pad_id=PAD)
    assert batch.target[0].tolist() == [IGNORE, 3, IGNORE, 4, IGNORE]


def test_context_length_is_that_of_the_layout() -> None:
    for n in range(50):
        spans = random_spans(Key(n).fold("length"), 3)
        for trim in (False, True):
            assert context_length(spans, trim) == len(lay_out(spans, PAD, trim_tail=trim).ids)


def test_trim_tail_leaves_the_last_block_out_of_the_context_only() -> None:
    image = LatentSpan(torch.zeros(4, CHANNELS), (1, 2, 2), True)
    spans = [TokenSpan([1, 2], [False, True]), image, TokenSpan([3], [False])]
    whole, trimmed = lay_out(spans, PAD), lay_out(spans, PAD, trim_tail=True)
    assert len(whole.ids) == 7 and len(trimmed.ids) == 2
    assert [(b, p) for b, _, p in whole.blocks] == [(b, p) for b, _, p in trimmed.blocks] == [(2, 2)]


def test_text_positions_are_one_dimensional_rotary() -> None:
    """Three equal coordinates give the rotary table of decoder language models (RoFormer, half-split convention), with
    the sign of each half in the sines."""
    position = torch.arange(50)[None, :, None].expand(1, 50, 3)
    cos, sin = rotary_table(position, 16, 10000.0, torch.float64)
    frequency = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angle = torch.arange(50, dtype=torch.float64)[:, None] * frequency
    assert torch.equal(cos[0, 0], torch.cat([angle.cos(), angle.cos()], 1))
    assert torch.equal(sin[0, 0], torch.cat([-angle.sin(), angle.sin()], 1))


def test_positions_of_a_block_are_a_grid_and_text_continues_after_its_longest_side() -> None:
    video = [LatentSpan(torch.zeros(6, 4), (2, 1, 3)) for _ in range(2)]
    one = lay_out([TokenSpan([1], [True]), *video, TokenSpan([2], [True])], PAD)
    assert one.position[1:7] == [(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 1, 1), (2, 1, 2), (2, 1, 3)]
    assert one.position[7] == (4, 4, 4) and one.position[-1] == (7, 7, 7)
