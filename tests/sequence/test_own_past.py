"""Rollouts in the layout of training: equal to generation block after block, with histories and without a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from histories import histories_of
from layouts import CHANNELS, PAD, random_spans, small_model
from torch import Tensor

from omni.generation.context import block_runs
from omni.losses import BatchFlowCall, ContextPass, sampled_past
from omni.model import Omni
from omni.objectives.base import Items
from omni.objectives.distribution_matching import DistributionMatching
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, Span, TokenSpan, pack
from omni.sequence.own_past import own_past, rounds, with_items, with_past

OBJECTIVE = DistributionMatching(steps=(1, 2, 4))


def picture(key: Key, n: int, supervise: bool = True) -> LatentSpan:
    return LatentSpan(key.fold("latents", n).normal((n, CHANNELS)), (1, 1, n), supervise)


def story(key: Key, blocks: int) -> list[Span]:
    """Words and pictures of 1 to 3 latents in turn; the second picture is given, not supervised."""
    words = [TokenSpan([n + 1, n + 2], [True, True]) for n in range(blocks)]
    return [s for n in range(blocks) for s in (words[n], picture(key.fold(n), 1 + n % 3, n != 1))]


def batch_of(documents: list[list[Span]], copies: int = 1, trim: list[bool] | None = None) -> Batch:
    [batch], count = pack(
        documents, [Shape(2, 90, 120)], channels=CHANNELS, pad_id=PAD, copies=copies, trim=trim,
        uids=[10 + n for n in range(len(documents))], fixed_shape=False,
    )  # fmt: skip
    assert count == len(documents)
    return replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())


def generated(model: Omni, spans: list[Span], uid: int, copy: int, key: Key) -> dict[int, Tensor]:
    """Block number -> its sample: every block reads a new history that holds the samples of the blocks before it."""
    done, found = list(spans), {}
    for index, span in enumerate(spans):
        if not isinstance(span, LatentSpan) or not span.supervise:
            continue
        past = [LatentSpan(s.latents, s.grid) if isinstance(s, LatentSpan) else s for s in done[:index]]
        [history] = histories_of(model, [past])
        block = history.next_block
        for number in {0, copy}:
            items = Items(span.latents[None].double(), torch.zeros(1, len(span.latents)).long(), [(uid, block, number)])
            times, x = OBJECTIVE.jump_times(items, key), items.noise(key)
            stream, runs = block_runs([(history, span.grid)], x.device)
            for t, s in zip(times[:-1], times[1:], strict=True):
                with torch.no_grad():
                    F = model.velocity(x, t, s, torch.ones(1).double(), stream, items.item, runs)
                x = x + float(s - t) * F
            if number == 0:
                done[index] = LatentSpan(x[0], span.grid)
            if number == copy:
                found[block] = x[0]
    return found


@pytest.fixture
def exact() -> Iterator[None]:
    """Histories keep latents in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.usefixtures("exact")
def test_rollouts_equal_generation_with_histories(copies: int) -> None:
    """Documents of 1 to 4 supervised blocks, clips among them, two in a row of the batch, float64: 1e-10."""
    model, key = small_model(dtype=torch.float64), Key(5)
    documents = [story(Key(1), 5), random_spans(Key(2).fold("clip"), 5), story(Key(3), 2), [picture(Key(4), 2)]]
    batch = batch_of(documents, copies, [True, False, False, True])
    with torch.no_grad():
        one = ContextPass(model, batch, *model.context(batch), None, 1.0)
        own, memory = sampled_past(OBJECTIVE, one, key)
        x = OBJECTIVE.sample(BatchFlowCall(model, own, memory, torch.ones(own.num_items)), one.items(own), key)
    wanted = {
        (10 + d, block, copy): value
        for d, spans in enumerate(documents) for copy in range(copies)
        for block, value in generated(model, spans, 10 + d, copy, key).items()
    }  # fmt: skip
    assert len(rounds(batch)) >= 3 and set(wanted) == set(batch.item_names)
    for index, name in enumerate(batch.item_names):
        assert float((x[batch.item == index] - wanted[name]).abs().max()) < 1e-10, name
    assert float((own.latents - batch.latents).abs().max()) > 0.1


def test_rounds_and_their_batches() -> None:
    """The first copies of the r-th supervised blocks that have a later one; positions, names and latents move along."""
    batch = batch_of([story(Key(1), 4), story(Key(2), 5), [picture(Key(3), 2)]], copies=2)
    found = [[batch.item_names[n] for n in chosen.tolist()] for chosen in rounds(batch)]
    blocks = [sorted({block for uid, block, _ in batch.item_names if uid == one}) for one in (10, 11)]
    assert [len(each) for each in blocks] == [3, 4]
    assert found[0] == [(10, blocks[0][0], 0), (11, blocks[1][0], 0)]
    assert found[2] == [(11, blocks[1][2], 0)] and len(found) == 3
    for chosen in rounds(batch):
        part = with_items(batch, chosen)
        assert part.num_items == len(chosen) and part.refine_latents.shape[1] <= 6
        flat = part.item.flatten()[part.item_first]
        assert flat.tolist() == list(range(part.num_items))
        for new, old in enumerate(chosen.tolist()):
            a, b = part.item == new, batch.item == old
            for now, before in (
                (part.refine_latents, batch.refine_latents), (part.refine.document, batch.refine.document),
                (part.refine.block, batch.refine.block), (part.refine.copy, batch.refine.copy),
                (part.refine.position, batch.refine.position),
            ):  # fmt: skip
                assert torch.equal(now[a], before[b])
        assert bool((part.refine.document[part.item < 0] == -1).all())


def test_only_the_blocks_of_a_round_change() -> None:
    batch = batch_of([story(Key(1), 4), story(Key(2), 4)])
    part = with_items(batch, rounds(batch)[1])
    marked = with_past(batch, part, torch.full_like(part.refine_latents, 7.0))
    changed = (marked.latents != batch.latents).any(-1)
    names = {(10, part.item_names[0][1]), (11, part.item_names[1][1])}
    where = torch.stack([10 + batch.context.document, batch.context.block], -1)
    assert {(uid, block) for uid, block in where[changed].tolist()} == names and len(names) == 2
    assert bool((marked.latents[changed] == 7).all()) and int(changed.sum()) == part.num_refine


def test_the_number_of_passes_is_bounded() -> None:
    """B - 1 context passes and calls of `sample`, which refine each block but the last of a document once."""
    batch, contexts, refined = batch_of([story(Key(1), 5), story(Key(2), 3)], copies=3), [], []

    def sample(part: Batch, memory: int) -> Tensor:
        refined.extend(part.item_names)
        return torch.zeros_like(part.refine_latents)

    own, memory = own_past(batch, 0, sample, lambda batch: contexts.append(batch) or len(contexts))
    assert memory == len(contexts) == 3 and len(refined) == len(set(refined)) == 3 + 1
    assert own is contexts[-1]
