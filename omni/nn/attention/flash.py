"""Packed documents through flash-attn's variable-length kernel: text and blocks as segments, without a mask.

The kernel has one mask: causal, aligned to the last key. So each stretch of text and each block of latents is a
sequence of its own: its queries, against the keys from the start of its document to its end. (BAGEL, arXiv 2505.14683,
runs its inference this way.) A pass over the context stream has two calls:

    text     causal, in the form that costs less (see KEY_COST):
             whole      all documents as they lie, nothing gathered; rows of blocks are computed too, and replaced
             segments   queries of text alone; the keys that each segment sees are gathered
    blocks   not causal: the queries of blocks; the keys that each block sees are gathered

A batch of text has one call and gathers nothing. A pass over copies of blocks (refine stream) has one call, not causal:
the keys are the context before each block, and the copy itself.

Cost: a gathered key is copied in every layer, and the copy is kept for the backward. A document of P positions gathers
about P / 2 keys for each of its blocks. Pictures between equal stretches of text, 2,000 tokens in all:

    pictures    P      gathered for text   for blocks   pairs of query and key, per visible pair
    1 x 256     2,256  0 (whole)           0.6 P        1.11
    4 x 256     3,024  0 (whole)           2.2 P        1.33
    4 x 1024    6,096  2.7 P               2.3 P        1.00
    16 x 64     3,013  0 (whole)           8.2 P        1.34, in three calls

One call gathers at most GATHERED keys per position of the stream. Blocks that need more take several calls, which the
backward computes again, so that memory stays bounded. FlexAttention gathers nothing: it suits many blocks in a long
document better.

The default never chooses this backend; `attention = "flash"` does. It needs CUDA and float16 or bfloat16. Calls are
planned on the CPU, once for each stream. Positions of padding get finite values that nothing reads: those of short
causal sequences, or 0.

Legend: R batch rows, H query heads, G key heads (H a multiple of G), N positions of the stream, K keys, D head width.
A flat position is r * N + n (of keys: r * K + k).
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omni.sequence.mask import Fields

Part = tuple[range, list[range]]  # flat positions of the queries and of the keys of one sequence
Kernel = Callable[..., Tensor]  # the signature of flash_attn.flash_attn_varlen_func (2.6 to 2.8)
KEY_COST = 256  # pairs of a query and a key that cost as much as one gathered key: an estimate, not measured
GATHERED = 4  # keys gathered in one call, per position of the stream
PADDING = 64  # positions of one sequence of padding: bounds what they cost
MAX_HEAD_DIM = 256
HALF = (torch.float16, torch.bfloat16)


class Visibility(Protocol):
    """What this module uses of an AttentionMask."""

    queries: Fields
    keys: Fields

    def cached(self, name: object, make: Callable[[], Any]) -> Any: ...


@dataclass(frozen=True)
class Segment:
    """Flat positions first to stop: a block, or neighbouring text of one document. `seen`: its first visible key."""

    first: int
    stop: int
    seen: int
    is_block: bool


@dataclass(frozen=True)
class Call:
    """One call of the kernel.

    queries, keys: flat positions, int64 (num,); None: all, in order. bounds: int32 (sequences + 1,), where each
    sequence begins in them. longest: positions of the longest sequence. is_recomputed: the backward computes the call
    again, and the gathered keys are not kept.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    is_recomputed: bool = False

    @property
    def num_gathered(self) -> int:
        """Keys that are copied."""
        return 0 if self.keys is None else self.keys.numel()


def _package() -> Kernel:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("attention backend 'flash' needs flash-attn: pip install 'omni-flow[gpu]'") from error
    return flash_attn_varlen_func


KERNELS: dict[str, Callable[[], Kernel]] = {"cuda": _package}  # device type -> its kernel


def available(device_type: str) -> bool:
    """Whether a kernel for the device is here."""
    return device_type in KERNELS and (device_type != "cuda" or importlib.util.find_spec("flash_attn") is not None)


def serves_copies(queries: Fields, dtype: torch.dtype) -> bool:
    """Whether `flash_copies` computes a pass over these copies: all ranks are equal, and a kernel of CUDA has the
    dtype."""
    return queries.rank is None and (dtype in HALF or queries.copy.device.type != "cuda")


def flash_context(
    q: Tensor, k: Tensor, v: Tensor, mask: Visibility | None, *,
    window: int | None = None, cap: float | None = None, scale: float | None = None, kernel: Kernel | None = None,
) -> Tensor:  # fmt: skip
    """Attention of a packed context stream over itself, equal to that under the dense mask.

    Args:
        q: (R, H, N, D). k, v: (R, G, N, D), of q's dtype.
        window: keys that a text query sees at most, its own included, counted in the stream. A block sees those that
            its first position would see, and all of itself. None: all.
        cap: scores are cap * tanh(scores / cap). None: as they are.
        scale: of q k^T; None: 1 / sqrt(D).
        kernel: None: the kernel of q's device.

    Returns: (R, H, N, D).
    """
    if mask is None or q.shape[2] != k.shape[2]:
        raise ValueError("attention backend 'flash' serves packed streams only; use 'flex' or 'sdpa' here")
    return _run(context_calls(mask, window), q, k, v, window, cap, scale, kernel)


def flash_copies(
    q: Tensor, k: Tensor, v: Tensor, mask: Visibility, *,
    window: int | None = None, cap: float | None = None, scale: float | None = None, kernel: Kernel | None = None,
) -> Tensor:  # fmt: skip
    """Attention of a packed refine stream over [context, itself]; arguments as `flash_context`.

    k, v: (R, G, K, D), of which the last N positions are the stream's. window: a copy sees the context that the first
    position of its block would see.
    """
    return _run(copy_calls(mask, window), q, k, v, window, cap, scale, kernel)


def context_calls(mask: Visibility, window: int | None = None) -> tuple[Call, ...]:
    """The calls of a pass over the context stream; cached in the mask."""
    _require_window(window)
    return mask.cached(("flash context", window), lambda: _context_calls(mask, window))


def copy_calls(mask: Visibility, window: int | None = None) -> tuple[Call, ...]:
    """The calls of a pass over the refine stream; cached in the mask."""
    _require_window(window)
    return mask.cached(("flash copies", window), lambda: _copy_calls(mask, window))


def _require_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window = {window} of attention must be at least 1: a position sees itself")


def _run(
    calls: Sequence[Call], q: Tensor, k: Tensor, v: Tensor,
    window: int | None, cap: float | None, scale: float | None, kernel: Kernel | None,
) -> Tensor:  # fmt: skip
    """The calls one after another; later ones replace the rows of earlier ones."""
    _require_served(q, cap, scale)
    kernel = KERNELS[q.device.type]() if kernel is None else kernel
    options = {
        "softmax_scale": scale,
        "softcap": 0.0 if cap is None else cap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    flat_q, flat_k, flat_v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
    out = None
    for call in calls:
        size = (window - 1, 0) if window is not None and call.causal else (-1, -1)
        compute = partial(_compute, partial(kernel, window_size=size, **options), call)
        if call.is_recomputed and torch.is_grad_enabled():
            found = checkpoint(compute, flat_q, flat_k, flat_v, use_reentrant=False, preserve_rng_state=False)
        else:
            found = compute(flat_q, flat_k, flat_v)
        if call.queries is None:
            out = found
        else:
            out = (torch.zeros_like(flat_q) if out is None else out).index_copy(0, call.queries, found)
    out = torch.zeros_like(flat_q) if out is None else out
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def _compute(kernel: Kernel, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call on flat positions."""
    q = q if call.queries is None else q.index_select(0, call.queries)
    k, v = (k, v) if call.keys is None else (part.index_select(0, call.keys) for part in (k, v))
    lengths = call.query_bounds, call.key_bounds, call.longest_query, call.longest_key
    return kernel(q, k, v, *lengths, causal=call.causal)


def _require_served(q: Tensor, cap: float | None, scale: float | None) -> None:
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"flash-attn has heads up to {MAX_HEAD_DIM} wide, not {q.shape[-1]}; use attention = 'flex'")
    if q.device.type == "cuda" and q.dtype not in HALF:
        raise ValueError(f"flash-attn has no {q.dtype}; use bfloat16, or attention = 'flex'")
    for name, value in (("cap", cap), ("scale", scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value} of attention must be above 0")


# ---- context stream -------------------------------------------------------------------------------------------------


def _context_calls(mask: Visibility, window: int | None) -> tuple[Call, ...]:
    """The text in the form that costs less, then the blocks."""
    if bool((mask.queries.copy != 0).any()):
        raise ValueError("flash_context serves the context stream; use flash_copies for copies of blocks")
    document, block = mask.queries.document.cpu(), mask.queries.block.cpu()
    device, starts = mask.queries.document.device, _document_starts(document, block)
    segments = _segments(document, block, starts, window)
    text, blocks = ([s for s in segments if s.is_block == is_block] for is_block in (False, True))
    wasted = sum((s.stop - s.first) * (s.first - s.seen) + (s.stop - s.first) ** 2 // 2 for s in blocks)
    gathered, most = sum(s.stop - s.seen for s in text), GATHERED * document.numel()
    if wasted <= KEY_COST * gathered or gathered > most:
        calls = [_whole(document, starts, device)]
    else:
        calls = _gathered([(range(s.first, s.stop), [range(s.seen, s.stop)]) for s in text], True, most, device)
    calls += _gathered([(range(s.first, s.stop), [range(s.seen, s.stop)]) for s in blocks], False, most, device)
    return tuple(calls)


def _document_starts(document: Tensor, block: Tensor) -> Tensor:
    """(R, N) bool: where a document begins. ValueError unless each lies in one piece, with its blocks in order."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    used = document >= 0
    rows, columns = (starts & used).nonzero(as_tuple=True)
    names = torch.stack([rows, document[rows, columns]], 1)
    falls = (block[:, 1:] < block[:, :-1]) & ~starts[:, 1:] & used[:, 1:]
    if len(names.unique(dim=0)) < len(names) or bool(falls.any()):
        raise ValueError(
            "attention backend 'flash' needs each document in one piece of its batch row, with its blocks in order; "
            "use 'flex'"
        )
    return starts


def _segments(document: Tensor, block: Tensor, starts: Tensor, window: int | None) -> list[Segment]:
    """Text and blocks in order, without padding. A block of one position is text: it sees the same."""
    begins = starts.clone()  # of blocks, text tokens included
    begins[:, 1:] |= block[:, 1:] != block[:, :-1]
    begins, starts, used = begins.flatten(), starts.flatten(), document.flatten() >= 0
    number = begins.cumsum(0) - 1
    in_block = number.bincount()[number] > 1
    cuts = starts | (begins & (in_block | in_block.roll(1)))
    index = torch.arange(len(begins))
    first_of_document = torch.where(starts, index, 0).cummax(0).values
    firsts = cuts.nonzero().flatten()
    stops = torch.cat([firsts[1:], index.new_tensor([len(index)])])
    seen = first_of_document[firsts]
    if window is not None:
        seen = torch.maximum(seen, firsts - window + 1)
    kept = used[firsts]
    columns = (firsts[kept], stops[kept], seen[kept], in_block[firsts][kept])
    return [Segment(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _whole(document: Tensor, starts: Tensor, device: torch.device) -> Call:
    """All positions as they lie: a sequence for each document, and short ones of padding."""
    starts = starts | ((document < 0) & (torch.arange(document.shape[1]) % PADDING == 0))
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([document.numel()])])
    longest = int(bounds.diff().max())
    bounds = bounds.to(device, torch.int32)
    return Call(None, None, bounds, bounds, longest, longest, causal=True)


def _gathered(sequences: Sequence[Part], causal: bool, most: int, device: torch.device) -> list[Call]:
    """As few calls in order as have at most `most` keys each; more than one are computed again in the backward."""
    calls: list[list[Part]] = []
    room = 0
    for one in sequences:
        need = sum(map(len, one[1]))
        if need > room or not calls:
            calls.append([])
            room = most
        calls[-1].append(one)
        room -= need
    return [_gathered_call(parts, causal, len(calls) > 1, device) for parts in calls]


def _gathered_call(sequences: Sequence[Part], causal: bool, is_recomputed: bool, device: torch.device) -> Call:
    queries, keys = [part for part, _ in sequences], [part for _, parts in sequences for part in parts]
    num_queries, num_keys = [len(part) for part in queries], [sum(map(len, parts)) for _, parts in sequences]
    q, k = (torch.cat([torch.arange(p.start, p.stop) for p in parts]).to(device) for parts in (queries, keys))
    at_q, at_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (num_queries, num_keys))
    return Call(q, k, at_q, at_k, max(num_queries), max(num_keys), causal, is_recomputed)


# ---- refine stream --------------------------------------------------------------------------------------------------


def _copy_calls(mask: Visibility, window: int | None) -> tuple[Call, ...]:
    """All copies in one call, or in several with bounded keys."""
    queries, keys, K = mask.queries, mask.keys, mask.keys.document.shape[1]
    T = K - queries.document.shape[1]
    if queries.rank is not None or T < 0 or not torch.equal(keys.copy[:, T:], queries.copy) or keys.copy[:, :T].any():
        raise ValueError("flash_copies serves packed copies of blocks without an order inside; use 'sdpa' here")
    document, block = keys.document[:, :T].cpu(), keys.block[:, :T].cpu()
    spans, blocks = _spans(document, _document_starts(document, block)), block.tolist()
    sequences: list[Part] = []
    for row, first, stop, number, bound in _copies(queries):
        start, end = spans.get((row, number), (0, 0))
        end = bisect_left(blocks[row], bound, start, end)
        start = start if window is None else max(start, end - window + 1)
        at, own = row * (K - T), range(row * K + T + first, row * K + T + stop)
        sequences.append((range(at + first, at + stop), [range(row * K + start, row * K + end), own]))
    return tuple(_gathered(sequences, False, GATHERED * keys.document.numel(), queries.document.device))


def _spans(document: Tensor, starts: Tensor) -> dict[tuple[int, int], tuple[int, int]]:
    """(batch row, document) -> where it begins and ends in its batch row."""
    rows, firsts = starts.nonzero(as_tuple=True)
    T = document.shape[1]
    stops = torch.where(rows == rows.roll(-1), firsts.roll(-1), T)
    stops[-1:] = T
    names = zip(rows.tolist(), document[rows, firsts].tolist(), strict=True)
    return dict(zip(names, zip(firsts.tolist(), stops.tolist(), strict=True), strict=True))


def _copies(queries: Fields) -> list[tuple[int, int, int, int, int]]:
    """(batch row, first, stop, document, bound) of each copy. ValueError if one lies in several pieces."""
    fields = torch.stack([queries.copy, queries.document, queries.block], -1).cpu()
    begins = torch.ones(fields.shape[:2], dtype=torch.bool)
    begins[:, 1:] = (fields[:, 1:] != fields[:, :-1]).any(-1)
    rows, firsts = begins.nonzero(as_tuple=True)
    flat = rows * fields.shape[1] + firsts
    lengths = torch.cat([flat, torch.tensor([begins.numel()])]).diff()
    found, names = [], set()
    for row, first, length in zip(rows.tolist(), firsts.tolist(), lengths.tolist(), strict=True):
        copy, document, bound = fields[row, first].tolist()
        if document < 0 or copy < 1:
            continue
        if (row, copy) in names:
            raise ValueError(f"copy {copy} of batch row {row} lies in several pieces; use attention = 'flex'")
        names.add((row, copy))
        found.append((row, first, first + length, document, bound))
    return found
