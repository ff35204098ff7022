"""Null contexts: every picture of a batch also has an empty context, in the same order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from omni.losses import BatchFlowCall
from omni.rng import Key
from omni.sequence.guidance import drop, null_documents
from omni.sequence.layout import Shape, pack
from omni.text.compose import compose
from train.data.loader import Loader
from train.loop import Run

MakeRun = Callable[..., Run]


def loader_of(run: Run) -> Loader:
    run.loader.null_contexts = True
    return run.loader


def flow_call(run: Run, batch, beta: float = 1.0) -> tuple[BatchFlowCall, torch.Tensor, torch.Tensor]:  # noqa: ANN001
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "modulation" in name or "velocity" in name:
                parameter.copy_(Key(0).fold("alive", name).normal(tuple(parameter.shape)) * 0.2)
        _, memory = run.model.context(batch)
    x = Key(1).normal(tuple(batch.refine_latents.shape))
    t = 0.2 + 0.6 * torch.arange(batch.num_items) / batch.num_items
    return BatchFlowCall(run.model, batch, memory, torch.full_like(t, beta)), x, t


def test_null_calls_equal_the_null_documents_alone(make_run: MakeRun) -> None:
    """Items of a batch with a dropped condition: equal to each null document alone."""
    run = make_run("autocast=none", "drop.all=0", "drop.text=0", "drop.images=0")
    loader = loader_of(run)
    compared = 0
    for batch in loader.next(0).batches:
        if not batch.num_items:
            continue
        assert batch.null is not None
        call, x, t = flow_call(run, batch)
        with torch.no_grad():
            found, plain = call.null()(x, t, 0.5 * t), call(x, t, 0.5 * t)
            embedded = call.guided(0.5 * torch.ones_like(t))
            assert torch.equal(embedded.null()(x, t, 0.5 * t), found) and not torch.equal(
                embedded(x, t, 0.5 * t), plain
            )
        index = 0
        for uid in batch.documents:
            for null in null_documents(loader.document(uid)):
                spans = compose(null, run.model.tokenizer, run.loader.memo.encode)
                [alone], _ = pack([spans], [Shape(1, 400, 400)], channels=loader.channels, pad_id=0, copies=2)
                n = alone.num_items
                own = (batch.item >= index) & (batch.item < index + n)
                with torch.no_grad():
                    _, memory = run.model.context(alone)
                    there = torch.zeros_like(alone.refine_latents)
                    there[alone.item >= 0] = x[own]
                    s = t[index : index + n]
                    wanted = BatchFlowCall(run.model, alone, memory, torch.ones(n))(there, s, 0.5 * s)[alone.item >= 0]
                assert float((found[own] - wanted).abs().max()) < 1e-5
                assert float((plain[own] - wanted).abs().max()) > 1e-4  # the condition mattered
                index += n
                compared += 1
        assert index == batch.num_items
    assert compared > 3


def test_dropped_documents_are_marked_and_keep_their_null_context(make_run: MakeRun) -> None:
    run = make_run("drop.all=0.5", "drop.text=0", "drop.images=0")
    batches = loader_of(run).next(0).batches
    dropped, documents = (set().union(*sets) for sets in zip(*((b.dropped, b.documents) for b in batches), strict=True))
    assert dropped and dropped < documents
    for batch in batches:
        if batch.null is not None:
            assert batch.null.num_items == batch.num_items


def test_a_batch_without_null_contexts_raises(make_run: MakeRun) -> None:
    run = make_run()
    batch = next(b for b in run.loader.next(0).batches if b.num_items)
    call, _, _ = flow_call(run, batch)
    with pytest.raises(ValueError, match="null_contexts=True"):
        call.null()


def test_null_documents_equal_dropping_everything(make_run: MakeRun) -> None:
    run = make_run()
    for index in range(30):
        document = run.loader.document(index)
        nulls, last = null_documents(document), drop(document, "all")
        assert (nulls[-1] if nulls else None) == last
