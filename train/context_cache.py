"""Contexts of a frozen text path, computed once: the keys and values of each prompt are kept and reused.

A frozen text path gives a document the same keys and values in every step, so a recipe whose objectives read pictures
alone need not compute them again (`context_memory_mb`). What documents begin with in common, such as a chat template's
system turn, is computed and kept once. Entries are keyed by their content: ids and latents. Where the memory is full,
further contexts are computed in each step.

Legend: R batch rows, T context positions, L layers of the refine stream, G key heads, D head width, n positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omni.generation.context import Append, run_context
from omni.losses import batch_losses
from omni.model import Omni
from omni.nn.cache import History, Memory
from omni.objectives import Objective, Terms
from omni.sequence.layout import Batch, LaidOut

LEAST_PREFIX = 4  # positions of a common beginning that are worth keeping apart
Entry = tuple[Tensor, int]  # keys and values (2, L, G, n, D) behind the first positions; how many positions these are


class ContextCache:
    """Called in place of a model, with the arguments of `Omni.forward`. max_bytes: of the kept keys and values.

    The contexts of `model` serve the averaged networks too: their text paths are equal.
    """

    def __init__(self, model: Omni, max_bytes: int) -> None:
        self.model, self.max_bytes = model, max_bytes
        self.num_bytes = self.num_hits = self.num_computed = 0
        self._entries: dict[bytes, Entry] = {}
        self._prefix: tuple[list[int], Tensor, History] | None = None
        self._pool: Any = None

    def __call__(
        self, batch: Batch, objectives: Sequence[Objective], key: Any, averages: Any = None, *more: Any
    ) -> dict[str, Terms]:
        averages = None if averages is None else _Cached(averages, self.context)
        return batch_losses(_Cached(self.model, self.context), batch, objectives, key, averages, *more)

    @torch.no_grad()
    def context(self, batch: Batch) -> tuple[Tensor, Memory]:
        """The memory of a packed batch, in bfloat16 under autocast; hidden states are empty (R, T, 0)."""
        documents = documents_of(batch)
        keys = [_key_of(one) for *_, one in documents]
        missing = {key: one for key, (*_, one) in zip(keys, documents, strict=True) if key not in self._entries}
        self.num_hits += len(keys) - len(missing)
        found = {**self._entries, **self._computed(missing)}
        c = self.model.transformer.c
        R, T = batch.ids.shape
        layers, dtype = list(c.refining), self._dtype
        out = torch.zeros(2, len(layers), R, c.num_kv_heads, T, c.head_dim, dtype=dtype, device=batch.ids.device)
        for key, (row, first, one) in zip(keys, documents, strict=True):
            values, shared = found[key]
            end = first + len(one.ids)
            if shared:
                assert self._prefix is not None
                out[:, :, row, :, first : first + shared] = self._prefix[1][:, :, :, :shared]
            out[:, :, row, :, first + shared : end] = values
        unused = out.new_empty(R, c.num_kv_heads, T, 0)  # of layers that no refine stream reads
        where = {layer: index for index, layer in enumerate(layers)}
        pair = [[out[kind, where[n]] if n in where else unused for n in range(c.depth)] for kind in (0, 1)]
        return out.new_empty(R, T, 0), Memory(pair[0], pair[1], batch.context.fields)

    @property
    def _dtype(self) -> torch.dtype:
        device = self.model.transformer.norm.weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32

    def _computed(self, missing: dict[bytes, LaidOut]) -> dict[bytes, Entry]:
        """The entries of documents that are not kept, in one pass; kept as far as there is room."""
        if not missing:
            return {}
        self._pool = self._pool or self.model.transformer.new_pool()
        if self._prefix is None:
            self._prefix = self._new_prefix(list(missing.values()))
        ids, _, kept = self._prefix
        appends = []
        for one in missing.values():
            shares = len(ids) > 0 and len(one.ids) > len(ids) and one.ids[: len(ids)] == ids
            history = kept.fork() if shares else History(self._pool)
            appends.append(_append(history, one, len(ids) if shares else 0))
        run_context(self.model, appends)
        made: dict[bytes, Entry] = {}
        for key, append in zip(missing, appends, strict=True):
            shared = append.history.length - len(append)
            made[key] = self._read(append.history, shared), shared
            append.history.release()
            size = made[key][0].nbytes
            if self.num_bytes + size <= self.max_bytes:
                self._entries[key] = made[key]
                self.num_bytes += size
        self.num_computed += len(missing)
        return made

    def _new_prefix(self, documents: Sequence[LaidOut]) -> tuple[list[int], Tensor, History]:
        """What the first documents begin with in common, if that is text; empty where it is short."""
        num, first = 0, documents[0]
        most = min(len(one.ids) - 1 for one in documents)
        while num < most and all(one.is_text(num) and one.ids[num] == first.ids[num] for one in documents):
            num += 1
        num = num if num >= LEAST_PREFIX and len(documents) > 1 else 0
        history = History(self._pool)
        if num:
            run_context(self.model, [_append(history, first, 0, num)])
        return first.ids[:num], self._read(history, 0), history

    def _read(self, history: History, first: int) -> Tensor:
        """Keys and values (2, L, G, n, D) of a history from position `first` on."""
        pool, layers = history.pool, list(self.model.transformer.c.refining)
        slots = slice(history.start + first, history.start + history.length)
        return torch.stack([store[layers, :, slots].to(self._dtype) for store in (pool.k, pool.v)])


class _Cached:
    """A model whose context passes are another function."""

    def __init__(self, model: Omni, context: Callable[[Batch], tuple[Tensor, Memory]]) -> None:
        self._model, self.context = model, context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def documents_of(batch: Batch) -> list[tuple[int, int, LaidOut]]:
    """(row, first position, layout) of each document of a packed batch, in order. ValueError for features."""
    if batch.features is not None:
        raise ValueError("context_memory_mb is not implemented beside an encoder; leave one of them out")
    found = []
    for row, numbers in enumerate(batch.context.document.tolist()):
        first = 0
        while first < len(numbers) and numbers[first] >= 0:
            end = first
            while end < len(numbers) and numbers[end] == numbers[first]:
                end += 1
            found.append((row, first, _laid_out(batch, row, first, end)))
            first = end
    return found


def _laid_out(batch: Batch, row: int, first: int, end: int) -> LaidOut:
    """The layout of the positions first to end of a row, as of a document of its own."""
    at = slice(first, end)
    is_latent = batch.is_latent[row, at].tolist()
    latents = [z if yes else None for z, yes in zip(batch.latents[row, at].unbind(0), is_latent, strict=True)]
    position = [(t, y, x) for t, y, x in batch.context.position[row, at].tolist()]
    num = end - first
    return LaidOut(
        batch.ids[row, at].tolist(), latents, [False] * num, batch.context.block[row, at].tolist(), position, [],
        0, 0, [None] * num,
    )  # fmt: skip


def _append(history: History, one: LaidOut, start: int, stop: int | None = None) -> Append:
    """Positions start to stop of a document, behind those that the history holds."""
    at = slice(start, stop)
    part = LaidOut(
        one.ids[at], one.latents[at], one.supervise[at], one.block[at], one.position[at], [], 0, 0, one.features[at]
    )
    return Append(history, part, [0] * len(part.ids))


def _key_of(one: LaidOut) -> bytes:
    """Digest of the ids, positions and latents of a document."""
    digest = hashlib.blake2b(repr((one.ids, one.position)).encode(), digest_size=16)
    for latent in one.latents:
        if latent is not None:
            digest.update(latent.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()
