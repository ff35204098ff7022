"""Contexts of a frozen text path, computed once: the keys and values of each prompt are kept and reused.

A frozen text path gives a document the same keys and values in every step, so they need not be computed again
(`context_memory_mb`). What documents begin with in common, such as a chat template's system turn, is computed and kept
once. Entries are keyed by their content: ids and latents. Where the memory is full, further contexts are computed in
each step.

    head    the positions of a document before the first trained one: computed without a graph, and kept
    rest    from the first position where an invoked LoRA is active, if weights of the context stream are trained:
            computed in each step, against the heads

Legend: R batch rows, T context positions, S of the rest, L kept layers, G key heads, D head width, n positions, W
width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni.generation.context import Append, run_context
from omni.losses import batch_losses
from omni.model import Omni
from omni.nn.cache import History, Memory
from omni.objectives import Objective, Terms
from omni.sequence.layout import IGNORE, Batch, LaidOut, Stream
from omni.sequence.mask import EMPTY

LEAST_PREFIX = 4  # positions of a common beginning that are worth keeping apart
Entry = tuple[Tensor, int]  # keys and values (2, L, G, n, D) behind the first positions; how many positions these are
Place = tuple[int, int, LaidOut]  # row and first position of a document, or of its head, and its layout


class ContextCache:
    """Called in place of a model, with the arguments of `Omni.forward`. max_bytes: of the kept keys and values.
    has_rest: whether weights of the context stream are trained, which act in the rest alone.

    The heads of `model` serve the averaged networks too: their text paths are equal.
    """

    def __init__(self, model: Omni, max_bytes: int, has_rest: bool = False) -> None:
        self.model, self.max_bytes, self.has_rest = model, max_bytes, has_rest
        c = model.transformer.c
        self.layers = list(range(c.depth) if has_rest else c.refining)
        self.num_bytes = self.num_hits = self.num_computed = 0
        self._entries: dict[bytes, Entry] = {}
        self._prefix: tuple[list[int], Tensor, History] | None = None
        self._pool: Any = None

    def __call__(
        self, batch: Batch, objectives: Sequence[Objective], key: Any, averages: Any = None, *more: Any
    ) -> dict[str, Terms]:
        averages = None if averages is None else _Cached(averages, self._context_of(averages))
        return batch_losses(_Cached(self.model, self.context), batch, objectives, key, averages, *more)

    def _context_of(self, other: Omni) -> Callable[[Batch], tuple[Tensor, Memory]]:
        return lambda batch: self.context(batch, other)

    def context(self, batch: Batch, model: Omni | None = None) -> tuple[Tensor, Memory]:
        """Hidden states (R, T, W) of a packed batch, zero in the heads, and the memory. model: whose weights compute
        the rests. ValueError for a target in a head."""
        documents = documents_of(batch)
        heads = [(row, first, head_of(one) if self.has_rest else one) for row, first, one in documents]
        in_rest = torch.zeros_like(batch.is_latent)
        for (row, first, one), (_, _, head) in zip(documents, heads, strict=True):
            in_rest[row, first + len(head.ids) : first + len(one.ids)] = True
        if self.has_rest and bool(((batch.target != IGNORE) & ~in_rest).any()):
            raise ValueError("context_memory_mb: a document has a target before its LoRA is invoked; leave it out")
        past = self._memory(batch, heads, in_rest)
        if bool(in_rest.any()):
            return _with_rest(model or self.model, batch, in_rest, past)
        return past.keys[0].new_zeros(*batch.ids.shape, self.model.config.transformer.width), past

    # ---- the heads ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _memory(self, batch: Batch, heads: Sequence[Place], in_rest: Tensor) -> Memory:
        """The keys and values of the heads, in bfloat16 under autocast, at their positions of the batch."""
        keys = [_key_of(one) for *_, one in heads]
        missing = {k: one for k, (*_, one) in zip(keys, heads, strict=True) if k not in self._entries and one.ids}
        self.num_hits += len(keys) - len(missing)
        found = {**self._entries, **self._computed(missing)}
        c = self.model.transformer.c
        R, T = batch.ids.shape
        out = torch.zeros(2, len(self.layers), R, c.num_kv_heads, T, c.head_dim, dtype=self._dtype)
        out = out.to(batch.ids.device)
        for key, (row, first, one) in zip(keys, heads, strict=True):
            if not one.ids:
                continue
            values, shared = found[key]
            if shared:
                assert self._prefix is not None
                out[:, :, row, :, first : first + shared] = self._prefix[1][:, :, :, :shared]
            out[:, :, row, :, first + shared : first + len(one.ids)] = values
        unused = out.new_empty(R, c.num_kv_heads, T, 0)  # of layers that no refine stream reads
        where = {layer: index for index, layer in enumerate(self.layers)}
        pair = [[out[kind, where[n]] if n in where else unused for n in range(c.depth)] for kind in (0, 1)]
        fields = batch.context.fields
        fields = replace(fields, document=fields.document.masked_fill(in_rest, EMPTY))
        return Memory(pair[0], pair[1], fields)

    @property
    def _dtype(self) -> torch.dtype:
        weight = self.model.transformer.norm.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def _computed(self, missing: dict[bytes, LaidOut]) -> dict[bytes, Entry]:
        """The entries of heads that are not kept, in one pass; kept as far as there is room."""
        if not missing:
            return {}
        self._pool = self._pool or self.model.transformer.new_pool()
        if self._prefix is None:
            self._prefix = self._new_prefix(list(missing.values()))
        ids, _, kept = self._prefix
        appends = []
        for one in missing.values():
            shares = len(ids) > 0 and len(one.ids) > len(ids) and one.ids[: len(ids)] == ids
            history = kept.fork() if shares else self._history()
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

    def _history(self) -> History:
        """An empty history with the LoRA of the run."""
        transformer = self.model.transformer
        return transformer.new_history(self._pool, transformer.active_lora)

    def _new_prefix(self, documents: Sequence[LaidOut]) -> tuple[list[int], Tensor, History]:
        """What the first documents begin with in common, if that is text; empty where it is short."""
        num, first = 0, documents[0]
        most = min(len(one.ids) - 1 for one in documents)
        while num < most and all(one.is_text(num) and one.ids[num] == first.ids[num] for one in documents):
            num += 1
        num = num if num >= LEAST_PREFIX and len(documents) > 1 and not any(first.adapted[:num]) else 0
        history = self._history()
        if num:
            run_context(self.model, [_append(history, first, 0, num)])
        return first.ids[:num], self._read(history, 0), history

    def _read(self, history: History, first: int) -> Tensor:
        """Keys and values (2, L, G, n, D) of a history from position `first` on."""
        pool = history.pool
        slots = slice(history.start + first, history.start + history.length)
        return torch.stack([store[self.layers, :, slots].to(self._dtype) for store in (pool.k, pool.v)])


def _with_rest(model: Omni, batch: Batch, in_rest: Tensor, past: Memory) -> tuple[Tensor, Memory]:
    """One pass over the rests, S positions a row, against the heads: hidden states (R, T, W), and their memory."""
    R, T = in_rest.shape
    S = int(in_rest.sum(1).max())
    order = in_rest.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :S]  # (R, S): those of the rest
    used = in_rest.gather(1, order)

    def taken(values: Tensor) -> Tensor:
        at = order.reshape(R, S, *[1] * (values.dim() - 2)).expand(R, S, *values.shape[2:])
        return values.gather(1, at)

    context = batch.context
    padding = torch.arange(S, device=order.device).expand(R, S)  # as in sequence.layout: it sees padding alone
    stream = Stream(
        taken(context.document).masked_fill(~used, -1), torch.where(used, taken(context.block), padding),
        taken(context.copy), taken(context.position),
    )  # fmt: skip
    is_latent = taken(batch.is_latent) & used
    adapted = None if batch.adapted is None else taken(batch.adapted) & used
    h = model.embed_context(taken(batch.ids), taken(batch.latents), is_latent)
    states, memory = model.transformer.context(h, stream, is_latent, adapted, past)
    flat = (order + T * torch.arange(R, device=order.device)[:, None])[used]
    hidden = states.new_zeros(R * T, states.shape[-1]).index_copy(0, flat, states[used])
    return hidden.view(R, T, -1), memory


class _Cached:
    """A model whose context passes are another function."""

    def __init__(self, model: Omni, context: Callable[[Batch], tuple[Tensor, Memory]]) -> None:
        self._model, self.context = model, context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def documents_of(batch: Batch) -> list[Place]:
    """The documents of a packed batch, in order. ValueError for features."""
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


def head_of(one: LaidOut) -> LaidOut:
    """The positions before the first where an invoked LoRA is active."""
    return _part(one, 0, one.adapted.index(True) if True in one.adapted else None)


def _laid_out(batch: Batch, row: int, first: int, end: int) -> LaidOut:
    """The layout of the positions first to end of a row, as of a document of its own."""
    at = slice(first, end)
    is_latent = batch.is_latent[row, at].tolist()
    latents = [z if yes else None for z, yes in zip(batch.latents[row, at].unbind(0), is_latent, strict=True)]
    position = [(t, y, x) for t, y, x in batch.context.position[row, at].tolist()]
    num = end - first
    return LaidOut(
        batch.ids[row, at].tolist(), latents, [False] * num, batch.context.block[row, at].tolist(), position, [],
        0, 0, [None] * num, adapted=[False] * num if batch.adapted is None else batch.adapted[row, at].tolist(),
    )  # fmt: skip


def _part(one: LaidOut, start: int, stop: int | None) -> LaidOut:
    """Positions start to stop of a document."""
    at = slice(start, stop)
    return LaidOut(
        one.ids[at], one.latents[at], one.supervise[at], one.block[at], one.position[at], [], 0, 0, one.features[at],
        adapted=one.adapted[at],
    )  # fmt: skip


def _append(history: History, one: LaidOut, start: int, stop: int | None = None) -> Append:
    """Positions start to stop of a document, behind those that the history holds."""
    part = _part(one, start, stop)
    return Append(history, part, [0] * len(part.ids))


def _key_of(one: LaidOut) -> bytes:
    """Digest of the ids, positions and latents of a document, and of where a LoRA is active."""
    digest = hashlib.blake2b(repr((one.ids, one.position, one.adapted)).encode(), digest_size=16)
    for latent in one.latents:
        if latent is not None:
            digest.update(latent.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()
