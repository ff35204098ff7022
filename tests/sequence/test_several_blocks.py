"""Times and visibility per item: an item may be a position, and several blocks of one request may move in one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from histories import histories_of
from layouts import CHANNELS, PAD, random_batch, small_model
from torch import Tensor

from omni.model import Omni
from omni.nn.runs import Run, Runs
from omni.nn.tangent import Dual
from omni.rng import Key
from omni.sequence.layout import LatentSpan, Shape, Stream, TokenSpan, grid_positions, pack
from omni.sequence.mask import dense, oracle

GRID = (1, 2, 2)
N = 4  # latents of a block


def test_every_position_may_have_a_time_of_its_own() -> None:
    """Items that are positions, with the times of their copies, equal items that are copies."""
    model, batch = small_model().double(), random_batch(Key(5), num_documents=2, copies=2, rows=1)
    batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
    _, memory = model.context(batch)
    t = torch.linspace(0.3, 0.9, batch.num_items, dtype=torch.float64)
    x = batch.refine_latents

    def velocity(t: Tensor, item: Tensor) -> Tensor:
        return model.velocity(x, t, 0.5 * t, torch.ones_like(t), batch.refine, item, memory)

    there = batch.item >= 0
    each = torch.full_like(batch.item, -1)
    each[there] = torch.arange(int(there.sum()))
    mine = t[batch.item[there]]
    torch.testing.assert_close(velocity(mine, each)[there], velocity(t, batch.item)[there], rtol=0, atol=1e-12)
    other = mine.clone()
    other[0] = 0.0  # one clean latent inside a noisy block
    assert not torch.allclose(velocity(other, each)[there], velocity(t, batch.item)[there])


def two_blocks(model: Omni, mutual: bool) -> tuple[Stream, Tensor, Tensor, object]:
    """A text, and two pictures after it that are both being refined in one copy. The second sees the first, and the
    first sees the second if `mutual`. Stream, items, clean latents and the context's memory."""
    spans = [TokenSpan([1, 2, 3], [False] * 3)]
    blocks = [LatentSpan(Key(n).normal((N, CHANNELS)), GRID, True) for n in range(2)]
    [batch], _ = pack([spans], [Shape(1, 8, 8)], channels=CHANNELS, pad_id=PAD, fixed_shape=False)
    batch = replace(batch, latents=batch.latents.double())
    _, memory = model.context(batch)
    position = torch.tensor([[p for n in range(2) for p in grid_positions(GRID, 3 + 2 * n)]])
    block = torch.tensor([[3] * N + [4] * N])
    rank = torch.zeros_like(block) if mutual else block - 3
    ones = torch.ones_like(block)
    stream = Stream(torch.zeros_like(block), block, ones, position, rank, bound=torch.full_like(block, 3))
    item = block - 3
    return stream, item, torch.cat([b.latents for b in blocks]).double()[None], memory


def test_the_bound_is_the_rule_of_the_mask() -> None:
    """Refine queries see the context below the bound, not below their own block, and their copy by rank."""
    model = small_model().double()
    stream, _, _, memory = two_blocks(model, mutual=False)
    keys = memory.fields.then(stream.fields)  # type: ignore[attr-defined]
    seen = dense(stream.fields, keys)
    assert torch.equal(seen, oracle(stream.fields, keys))
    first, second = seen[0, :N], seen[0, N:]
    assert first[:, :3].all() and first[:, 3 : 3 + N].all() and not first[:, 3 + N :].any()
    assert second.all()
    unbound = replace(stream, bound=None)
    assert torch.equal(dense(unbound.fields, keys), seen)  # no context block is between 3 and 4 here
    earlier = replace(stream, bound=torch.full_like(stream.block, 2))
    assert not dense(earlier.fields, keys)[0, :, 2].any() and dense(earlier.fields, keys)[0, :, :2].all()


@torch.no_grad()
@pytest.mark.parametrize("mutual", [False, True])
def test_two_blocks_move_in_one_pass(mutual: bool) -> None:
    """Each at its own (t, s). The first alone equals the first of two if it does not see the second; tangents agree."""
    model = small_model().double()
    stream, item, x, memory = two_blocks(model, mutual)
    t, one = torch.tensor([0.4, 0.9], dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor, stream: Stream = stream, item: Tensor = item) -> Tensor:
        return model.velocity(x, t, 0.5 * t, torch.ones_like(t), stream, item, memory)  # type: ignore[arg-type]

    both = velocity(x, t)
    cut = Stream(*(part[:, :N] for part in (stream.document, stream.block, stream.copy, stream.position)))
    alone = velocity(x[:, :N], t[:1], cut, item[:, :N])
    assert (float((both[:, :N] - alone).abs().max()) < 1e-12) is not mutual
    moved = velocity(torch.cat([x[:, :N] + 1, x[:, N:]], 1), t)
    assert float((moved[:, N:] - both[:, N:]).abs().max()) > 1e-3  # the second block sees the first, noisy
    direction, h = Key(9).normal(tuple(x.shape)).double(), 1e-6
    dual = model.velocity(
        Dual(x, direction), Dual(t, one), Dual(0.5 * t, 0.5 * one), one, stream, item, memory  # type: ignore[arg-type]
    )  # fmt: skip
    assert isinstance(dual, Dual)
    central = (velocity(x + h * direction, t + h) - velocity(x - h * direction, t - h)) / (2 * h)
    assert float((dual.tangent - central).abs().max() / central.abs().max()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("field", ["rank", "bound", "both", "neither"])
def test_order_and_bound_hold_after_a_history(field: str) -> None:
    """Two blocks of one request as a run: ranks and the number of seen positions hide what the mask hides."""
    model = small_model().double()
    stream, item, x, memory = two_blocks(model, mutual=False)
    rank = stream.rank if field in ("rank", "both") else None
    bound = torch.full_like(stream.block, 2 if field in ("bound", "both") else 3)
    stream = replace(stream, rank=rank, bound=bound)
    [history] = histories_of(model, [[TokenSpan([1, 2, 3], [False] * 3)]], PAD)
    history.reserve(2 * N)
    ranks = None if rank is None else tuple(rank[0].tolist())
    seen = 2 if field in ("bound", "both") else None
    runs = Runs([Run(history, 0, 2 * N, history.length, causal=False, ranks=ranks, seen=seen)])
    t, one = torch.tensor([0.4, 0.9], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    wanted = model.velocity(x, t, 0.5 * t, one, stream, item, memory)  # type: ignore[arg-type]
    found = model.velocity(x, t, 0.5 * t, one, stream, item, runs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    if field != "neither":
        plain = Runs([Run(history, 0, 2 * N, history.length, causal=False)])
        assert float((model.velocity(x, t, 0.5 * t, one, stream, item, plain) - wanted).abs().max()) > 1e-4
