"""Data-loading workers: their steps, with latents filled in by the trainer, equal those of one loader."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import exit_code, forked, wait_until

from omni.data.source import CorruptRecord
from omni.sequence.layout import Batch
from train import loop
from train.__main__ import main
from train.data.batch import TooManyCorrupt
from train.data.workers import Tickets, _end_with_parent
from train.loop import Run
from train.metrics import Tracker, read_metrics

MakeRun = Callable[..., Run]
TIMES = {"seconds", "load_seconds"}


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for stream in (batch.context, batch.refine):
        yield from (stream.document, stream.block, stream.copy, stream.position)
    yield from (batch.ids, batch.latents, batch.is_latent, batch.target, batch.refine_latents, batch.item)
    yield batch.item_first
    if batch.null is not None:
        yield from tensors(batch.null)


@pytest.mark.parametrize("with_nulls", [False, True])
def test_workers_give_the_batches_of_one_loader(make_run: MakeRun, with_nulls: bool) -> None:
    """Pictures and clips, in the context, to refine and in null contexts; three steps of each of two workers."""
    wanted = ["objectives.1.name=shortcut", "objectives.1.options.guidance_scale=2.0"] if with_nulls else []
    run, plain = make_run("workers=2", *wanted), make_run(*wanted).loader
    plain.stride = 2
    cursors, total = [0, 1], 0
    for step in range(6):
        worker = step % 2
        plain._window.clear()
        one, other = run.next(), plain.next(cursors[worker])
        assert (one.worker, one.documents, one.cursor) == (worker, other.documents, other.cursor)
        assert all(document % 2 == worker for document in one.documents)
        cursors[worker] = one.cursor
        for a, b in zip(one.batches, other.batches, strict=True):
            assert (a.item_names, a.documents, a.dropped) == (b.item_names, b.documents, b.dropped)
            assert (a.null is not None) == (with_nulls and b.num_items > 0)
            assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
            total += int((a.refine_latents != 0).sum()) + int((a.latents != 0).sum())
    assert total > 10_000
    assert run.loader.counts["documents"] > 0


def go(run: Run, until: int) -> None:
    tracker = Tracker(run.out, run.progress.step, stream=io.StringIO())
    loop.train(run, tracker, lambda: run.progress.step >= until)
    tracker.close()


def test_resume_with_workers_is_exact(make_run: MakeRun, tmp_path: Path) -> None:
    """Also where the next step is not the first worker's."""
    go(make_run("workers=2", out="straight"), 5)
    out = tmp_path / "stopped"
    go(make_run("workers=2", out=out.name), 3)
    run = make_run("workers=2", out=out.name)
    loop.resume(run, lambda line: None)
    assert len(run.progress.cursors) == 2 and run.progress.cursor == 0
    go(run, 5)
    a, b = (read_metrics(path / "metrics.jsonl") for path in (out, tmp_path / "straight"))
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in a] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in b
    ]
    states = [path / "state" / "step-00000005" / "model.safetensors" for path in (out, tmp_path / "straight")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_worker_ends_with_a_killed_training_process(tmp_path: Path) -> None:
    """A worker holds the standard output of its run: a reader sees its end at once."""
    output = tmp_path / "output.txt"
    read, write = os.pipe()

    def run() -> int:
        if os.fork():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        _end_with_parent(0)
        os.write(write, b"alive")
        time.sleep(20)
        os.write(write, b", outlived")
        return 0

    with forked(run, output) as process:
        os.close(write)
        assert exit_code(process) == -signal.SIGKILL, output.read_text()
        with open(read, "rb") as pipe:
            assert pipe.read() == b"alive"  # the output ends with the worker


def test_a_signal_to_the_process_group_saves_and_stops(recipe_file: Path, tmp_path: Path) -> None:
    """As `timeout`, systemd and job queues send it: workers ignore it and the training process stops."""
    out, output = tmp_path / "stopped", tmp_path / "output.txt"
    command = [str(recipe_file), "workers=2", "max_steps=100000", "--out", str(out)]
    with forked(lambda: main(command), output) as process:
        wait_until(lambda: output.exists() and "step 1/" in output.read_text())
        os.killpg(process, signal.SIGTERM)
        code, errors = exit_code(process), output.read_text()
    assert code == 75, errors
    assert "saved at step" in errors and "Traceback" not in errors
    assert list((out / "state").glob("step-*/manifest.json"))


def test_an_error_in_an_unused_step_is_not_raised(make_run: MakeRun, tmp_path: Path) -> None:
    """The error of a worker is raised at its step; the step before is trained and saved."""
    run = make_run("workers=1", out="early")
    whole = run.loader.document.__self__.sources  # type: ignore[attr-defined]
    for source in whole:
        source.document = _readable_until(40, source.document)
    with pytest.raises(TooManyCorrupt):
        go(run, 1000)
    steps = run.progress.step
    assert steps > 0 and run.loader.counts["documents"] <= 2 * 40  # of two sources
    run = make_run("workers=1", f"max_steps={steps}", out="exact")
    for source in run.loader.document.__self__.sources:  # type: ignore[attr-defined]
        source.document = _readable_until(40, source.document)
    go(run, 1000)
    assert list((tmp_path / "exact" / "state").glob(f"step-{steps:08d}/manifest.json"))


def _readable_until(end: int, document: Callable[[int], object]) -> Callable[[int], object]:
    def read(index: int) -> object:
        if index >= end:
            raise CorruptRecord(f"record {index} is broken")
        return document(index)

    return read


def test_a_mistake_in_a_worker_prints_one_line(make_run: MakeRun) -> None:
    run = make_run("workers=2")

    def missing(index: int) -> None:
        raise ValueError("the file x.jsonl is gone")

    for source in run.loader.document.__self__.sources:  # type: ignore[attr-defined]
        source.document = missing
    with pytest.raises(ValueError, match="^the file x.jsonl is gone$"):
        run.next()


def test_tickets_drop_sent_media(make_run: MakeRun) -> None:
    run = make_run()
    tickets = Tickets(run.model.codec)
    loader = run.loader
    loader.memo, loader.channels = tickets, tickets.channels
    cursor, most = 0, 0
    for _ in range(40):
        cursor = tickets.collect(loader.next(cursor), loader.unpacked_latents()).packed.cursor
        most = max(most, len(tickets._media))
    assert most < 200 < tickets._next


def test_unreadable_documents_end_a_run_with_workers_too(make_run: MakeRun) -> None:
    run = make_run("workers=2")

    def unreadable(index: int) -> None:
        raise CorruptRecord(f"record {index} is broken")

    for source in run.loader.document.__self__.sources:  # type: ignore[attr-defined]
        source.document = unreadable
    with pytest.raises(TooManyCorrupt, match=r"the last: record \d+ is broken"):
        run.next()
