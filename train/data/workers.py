"""Data-loading workers: processes that each load their own share of the documents, ahead of the device.

Worker l of L reads the documents l, l + L, l + 2 L, ... and makes every L-th step, from step l on. So the state of the
data is one cursor per worker (`train.checkpoint.Progress.cursors`), and a resumed run is equal to the bit.

A few steps of every worker wait in shared memory (/dev/shm on Linux: a gigabyte for steps of thousands of documents).

Workers have no device. In place of latents a worker puts tickets, (number of the picture, place in it), and sends the
pictures along; `WorkerLoader` encodes them on the device of the training process and fills in the latents. Features of
an encoder that is trained are the model's own: a worker puts the pixels that the encoder reads into the batch.

Shapes: P pictures, N latents of one, C channels; R rows, L positions (context or refine).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from omni.codecs import Codec
from omni.document import Image, Video
from omni.encoders import Encoder, EncoderSpec
from omni.errors import is_mistake, one_line
from omni.sequence.features import Blocks, FeatureBlock
from omni.sequence.layout import Batch
from train.data.batch import Packed, TooManyCorrupt
from train.data.loader import Loader

PREFETCH = 2  # steps that every worker is ahead


@dataclass(frozen=True)
class WorkerStep:
    """One step as a worker sends it. In its batches, latents are row indices (R, L) of a table that the codec makes of
    `media`, uint8 (P, H, W, 3) or (P, T, H, W, 3) each, in order; values of features are row indices (F,) of a table
    that the encoder makes of `pictures`. `error`: why the worker stopped, unless by a bug."""

    packed: Packed
    media: tuple[Tensor, ...] = ()
    pictures: tuple[Tensor, ...] = ()
    error: TooManyCorrupt | ValueError | None = None


class Tickets:
    """Replaces a LatentMemo in a worker: "encodes" media as tickets, float32 with two channels. alone: whether the
    context holds the features of a picture in place of its latents. as_pixels: the pixels that the encoder reads take
    the place of features."""

    channels = 2

    def __init__(
        self, codec: Codec, encoder: EncoderSpec | None = None, alone: bool = False, as_pixels: bool = False
    ) -> None:
        self.codec, self.encoder, self.alone, self.as_pixels = codec, encoder, alone, as_pixels  # used for shapes alone
        self._media: dict[int, tuple[Tensor, int, int]] = {}  # pixels, number of latents, of positions of features
        self._next = 0

    def encode(self, segments: Sequence[Image | Video]) -> list[Blocks]:
        """Blocks (t, h, w, 2) of each prepared segment, in order, and its features as tickets."""
        return [self._blocks(s.pixels if isinstance(s, Image) else s.frames) for s in segments]

    def _blocks(self, pixels: Tensor) -> Blocks:
        """Blocks (t, h, w, 2) of one picture or clip: its number, and the place of each latent."""
        of_clip = pixels.ndim == 4
        count = self.codec.num_chunks(len(pixels)) if of_clip else 1
        grid = (self.codec.spec.frames_per_chunk if of_clip else 1, *self.codec.grid(*pixels.shape[-3:-1]))
        place = torch.arange(count * grid[0] * grid[1] * grid[2], dtype=torch.float32)
        number, self._next = self._next, (self._next + 1) % (1 << 23)  # float32 holds every one exactly
        blocks: Blocks = list(torch.stack([torch.full_like(place, number), place], -1).view(count, *grid, 2))
        num = 0
        if self.encoder is not None and not of_clip:
            (rows, columns), sides = self.encoder.grid(*pixels.shape[:2]), (grid[1], grid[2])
            if self.as_pixels:
                prepared = self.encoder.prepared(pixels)
                blocks.append(FeatureBlock.of_pixels(prepared, (rows, columns), self.alone, sides))
            else:
                at, num = torch.arange(rows * columns, dtype=torch.float32), rows * columns
                tickets = torch.stack([torch.full_like(at, number), at], -1).view(1, rows, columns, 2)
                blocks.append(FeatureBlock(tickets, self.alone, sides))
        self._media[number] = pixels, len(place), num
        return blocks

    def collect(self, packed: Packed, waiting: Iterable[Tensor]) -> WorkerStep:
        """The step with the media that it needs. Keeps only the media of `waiting`, tickets of later steps."""
        places = [
            at for batch in packed.batches for part in (batch, batch.null) if part for at in _latents_and_masks(part)
        ]
        indices, media = self._rows(torch.cat([latents[where] for latents, where in places]), 1)
        rows = iter(indices.split([int(where.sum()) for _, where in places]))
        batches = [
            _with_latents(batch, lambda latents, where: _scattered(where, next(rows))) for batch in packed.batches
        ]
        found = [part.features for batch in packed.batches for part in (batch, batch.null) if part and part.features]
        pictures: list[Tensor] = []
        if found and not self.as_pixels:
            indices, pictures = self._rows(torch.cat([features.values for features in found]), 2)
            values = iter(indices.split([len(features.at) for features in found]))
            batches = [_with_features(batch, lambda features: next(values)) for batch in batches]
        needed = {int(tickets[0, 0]) for tickets in waiting if tickets.numel()}
        self._media = {number: media for number, media in self._media.items() if number in needed}
        return WorkerStep(replace(packed, batches=batches), tuple(media), tuple(pictures))

    def _rows(self, tickets: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
        """The row of each ticket (K, 2) in the table of the media that they name, int64 (K,); and these media, grouped
        by shape. count: which entry of `_media` counts the rows of one."""
        tickets = tickets.long()
        numbers, which = tickets[:, 0].unique(return_inverse=True)
        groups: dict[torch.Size, list[int]] = {}
        for index, number in enumerate(numbers.tolist()):
            groups.setdefault(self._media[number][0].shape, []).append(index)
        first, total, media = torch.zeros_like(numbers), 0, []
        for members in groups.values():
            media.append(torch.stack([self._media[int(numbers[index])][0] for index in members]))
            for index in members:
                first[index] = total
                total += int(self._media[int(numbers[index])][count])
        return first[which] + tickets[:, 1], media


class WorkerSteps(IterableDataset):
    """The dataset of one data-loading worker: its steps, from `cursors` on, without end. tickets: makes its Tickets."""

    def __init__(
        self,
        loader: Callable[[Tickets, int], Loader],
        tickets: Callable[[], Tickets],
        cursors: Sequence[int],
        step: int,
    ) -> None:
        self.loader, self.tickets, self.cursors, self.step = loader, tickets, tuple(cursors), step

    def __iter__(self) -> Iterator[WorkerStep]:
        info = get_worker_info()
        worker = ((info.id if info else 0) + self.step) % len(self.cursors)  # the first worker makes the first step
        tickets = self.tickets()
        loader, cursor = self.loader(tickets, len(self.cursors)), self.cursors[worker]
        while True:
            try:
                packed = loader.next(cursor)
            except Exception as error:
                if not (isinstance(error, TooManyCorrupt) or is_mistake(error)):
                    raise
                message = error if isinstance(error, TooManyCorrupt) else ValueError(one_line(error))
                yield WorkerStep(Packed([], [], cursor), error=message)
                return
            yield tickets.collect(replace(packed, worker=worker), loader.unpacked_latents())
            cursor = packed.cursor


class WorkerLoader:
    """`next()` returns the steps of all data-loading workers in turn, with latents, on `device`.

    Args:
        loader: (tickets, number of workers) -> the loader of a worker.
        cursors: the next document of every worker; at first 0, 1, 2, ...
        step: how many steps are done.
        encoder: of features of pictures. alone, as_pixels: see Tickets.
    """

    def __init__(
        self,
        loader: Callable[[Tickets, int], Loader],
        codec: Codec,
        cursors: Sequence[int],
        step: int,
        device: torch.device | str = "cpu",
        encoder: Encoder | None = None,
        alone: bool = False,
        as_pixels: bool = False,
    ) -> None:
        self.codec, self.encoder, self.device = codec, encoder, torch.device(device)
        tickets = partial(Tickets, codec, None if encoder is None else encoder.spec, alone, as_pixels)
        _allow_many_files()
        processes: Any = DataLoader(
            WorkerSteps(loader, tickets, cursors, step),
            batch_size=None,
            num_workers=len(cursors),
            prefetch_factor=PREFETCH,
            multiprocessing_context="fork",  # a worker inherits sources, tokenizer and codec as they are
            collate_fn=_unchanged,
            worker_init_fn=_end_with_parent,
        )
        self._steps = iter(processes)

    def next(self) -> Packed:
        """The next step. Raises what Loader.next raises: TooManyCorrupt, or ValueError for a user's mistake."""
        sent = next(self._steps)
        if sent.error:
            raise sent.error
        table = torch.cat([self._encode(group) for group in sent.media]) if sent.media else None

        def found(rows: Tensor, where: Tensor) -> Tensor:
            where = where.to(self.device)
            if table is None:
                return torch.zeros(*rows.shape, self.codec.spec.channels, device=self.device)
            return torch.where(where.unsqueeze(-1), table[rows.to(self.device)], 0.0)

        batches = [_with_latents(batch, found) for batch in sent.packed.batches]
        if sent.pictures:
            values = torch.cat([self._features(group) for group in sent.pictures])
            batches = [_with_features(batch, lambda rows: values[rows.to(self.device)]) for batch in batches]
        return replace(sent.packed, batches=batches)

    def _features(self, pictures: Tensor) -> Tensor:
        """Pictures of one size -> their features (P N, E)."""
        assert self.encoder is not None
        return self.encoder.encode(pictures).flatten(0, -2).to(self.device)

    def _encode(self, media: Tensor) -> Tensor:
        """Media of one size -> their latents (P N, C)."""
        media = media.to(self.device)
        if media.ndim == 4:
            return self.codec.encode(media).flatten(0, -2)
        return torch.cat([block.flatten(0, -2) for frames in media for block in self.codec.encode_video(frames)])


def _latents_and_masks(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(latents or their tickets, mask of their positions), of the context and of the refine stream. `collect` relies on
    the order."""
    return [(batch.latents, batch.is_latent), (batch.refine_latents, batch.item >= 0)]


def _with_latents(batch: Batch, change: Callable[[Tensor, Tensor], Tensor]) -> Batch:
    """The batch, and its null contexts, with each of `_latents_and_masks` changed, in that order."""
    latents, refine = (change(*place) for place in _latents_and_masks(batch))
    null = None if batch.null is None else _with_latents(batch.null, change)
    return replace(batch, latents=latents, refine_latents=refine, null=null)


def _with_features(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch, and then its null contexts, with the values of their features changed."""
    if batch.features is not None:
        batch = replace(batch, features=replace(batch.features, values=change(batch.features.values)))
    return batch if batch.null is None else replace(batch, null=_with_features(batch.null, change))


def _scattered(where: Tensor, rows: Tensor) -> Tensor:
    """int64 of the shape of `where`: `rows` at its true positions, else 0."""
    out = torch.zeros(where.shape, dtype=torch.int64)
    out[where] = rows
    return out


def _allow_many_files() -> None:
    """Every waiting tensor is an open file, and the usual limit is 1,024."""
    import resource  # not on Windows, like fork

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # an infinite hard limit cannot be set
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _unchanged(sent: WorkerStep) -> WorkerStep:
    """Collates nothing: a step is a batch already."""
    return sent


def _end_with_parent(worker: int) -> None:
    """End a worker whose training process was killed: it would wait for ever to send its steps."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    has_sigtimedwait = hasattr(signal, "sigtimedwait")  # reports the sender of a signal; not on macOS
    if has_sigtimedwait:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        """End on a SIGTERM from the training process; ignore one sent to the whole group, which the trainer handles."""
        while os.getppid() == parent:
            if not has_sigtimedwait:
                time.sleep(1)
                continue
            found = signal.sigtimedwait({signal.SIGTERM}, 1)
            if found is not None and found.si_pid == parent:
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
