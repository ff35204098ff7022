"""Visibility: one predicate, lowered to a dense mask (CPU) or FlexAttention (GPU), and a slow test oracle.

Every position has four integers (see `layout.Stream`): document, block, copy, rank.

    a query sees a key  iff  they are of one document, and
        the key is context:  its block precedes the query's; or it is the query's own block and the query is context
        the key is refine:   both are of the same copy, and the key's rank is not above the query's

For a refine query, `block` is the bound of the visible context: its own block's number, or an earlier one if the blocks
between are unfinished and in the same copy (`layout.Stream.bound`).

So the context stream is causal over blocks and bidirectional inside one. A refine copy sees the context strictly before
its block, and itself. No other position sees it. Ranks order the positions of one copy: all 0 in a bidirectional block
(latents); 0, 1, 2, ... in a causal one (tokens).

A window of n positions hides the context before the last n - 1 positions that precede the query's block, counted in its
document; the block itself is not hidden. For text, whose blocks are single positions, that is the sliding window of
Mistral (arXiv 2310.06825): itself and the n - 1 before.

Legend: R batch rows, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -2  # document number of an unused cache slot: never visible


@dataclass(frozen=True)
class Fields:
    """(document, block, copy, rank), int64 (R, N) each. copy = 0 is context, > 0 refine, -1 padding of the refine
    stream. rank None: all 0."""

    document: Tensor
    block: Tensor
    copy: Tensor
    rank: Tensor | None = None

    @property
    def ranks(self) -> Tensor:
        """`rank`, or zeros."""
        return torch.zeros_like(self.copy) if self.rank is None else self.rank

    def then(self, other: Fields) -> Fields:
        """The positions of `self` followed by those of `other`."""
        return Fields(
            torch.cat([self.document, other.document], 1),
            torch.cat([self.block, other.block], 1),
            torch.cat([self.copy, other.copy], 1),
            None if self.rank is None and other.rank is None else torch.cat([self.ranks, other.ranks], 1),
        )


def visible(q_document, q_block, q_copy, q_rank, k_document, k_block, k_copy, k_rank):  # noqa: ANN001, ANN201
    """The predicate, elementwise on broadcastable integer tensors; returns a bool tensor."""
    of_context = (k_copy == 0) & ((k_block < q_block) | ((k_block == q_block) & (q_copy == 0)))
    of_copy = (k_copy != 0) & (k_copy == q_copy) & (k_rank <= q_rank)
    return (q_document == k_document) & (of_context | of_copy)


def dense(queries: Fields, keys: Fields, window: int | None = None) -> Tensor:
    """Boolean mask (R, Q, K), True where the query sees the key."""
    q = (part[:, :, None] for part in (queries.document, queries.block, queries.copy, queries.ranks))
    k = (part[:, None, :] for part in (keys.document, keys.block, keys.copy, keys.ranks))
    seen = visible(*q, *k)
    if window is None:
        return seen
    index = torch.arange(keys.document.shape[1], device=seen.device)
    return seen & ((keys.copy != 0)[:, None, :] | (index >= lowest(queries, keys, window)[:, :, None]))


def lowest(queries: Fields, keys: Fields, window: int) -> Tensor:
    """(R, Q) int64: the index of the first key in each query's window. The context is the first keys of a row, in the
    order of documents and blocks."""
    document, block = queries.document[:, :, None], queries.block[:, :, None]
    k_document, k_block = keys.document[:, None, :], keys.block[:, None, :]
    before = (k_document < document) | ((k_document == document) & (k_block < block))
    before &= (k_document >= 0) & (keys.copy == 0)[:, None, :]
    return before.sum(-1) - (window - 1)


def flex(queries: Fields, keys: Fields, window: int | None = None):  # noqa: ANN201
    """The same mask as a `torch.nn.attention.flex_attention.BlockMask` (forward anywhere; backward on GPU only)."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = (queries.document, queries.block, queries.copy, queries.ranks)
    k = (keys.document, keys.block, keys.copy, keys.ranks)
    first = None if window is None else lowest(queries, keys, window)

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = visible(*(part[b, i] for part in q), *(part[b, j] for part in k))
        return seen if first is None else seen & ((keys.copy[b, j] != 0) | (j >= first[b, i]))

    rows, num_queries = queries.document.shape
    num_keys = keys.document.shape[1]
    return create_block_mask(predicate, rows, None, num_queries, num_keys, device=queries.document.device)


def oracle(queries: Fields, keys: Fields, window: int | None = None) -> Tensor:
    """The rule again in plain Python, position by position: slow and simple. Tests compare with it."""
    q_rows = zip(*(p.tolist() for p in (queries.document, queries.block, queries.copy, queries.ranks)), strict=True)
    k_rows = zip(*(p.tolist() for p in (keys.document, keys.block, keys.copy, keys.ranks)), strict=True)
    out = []
    for q_row, k_row in zip(q_rows, k_rows, strict=True):
        out.append([])
        context = [(d, b) for d, b, c, _ in zip(*k_row, strict=True) if c == 0]
        for document, block, copy, rank in zip(*q_row, strict=True):
            out[-1].append([])
            before = [i for i, (d, b) in enumerate(context) if d == document >= 0 and b < block]
            hidden = before[: max(0, len(before) - window + 1)] if window is not None else []
            for j, (k_document, k_block, k_copy, k_rank) in enumerate(zip(*k_row, strict=True)):
                if document != k_document:
                    seen = False
                elif k_copy == 0 and copy == 0:  # context sees context
                    seen = k_block <= block and j not in hidden
                elif k_copy == 0:  # refinement reads the context strictly before its block
                    seen = k_block < block and j not in hidden
                else:  # a refine key: only later or equal ranks of its own copy see it
                    seen = k_copy == copy and k_rank <= rank
                out[-1][-1].append(seen)
    return torch.tensor(out, dtype=torch.bool)
