"""Who may see whom: ONE predicate, lowered to a dense mask (CPU) or FlexAttention (GPU), with a slow oracle beside it.

Every position is described by three integers (see `layout.Stream`): document, block, copy.

    a query sees a key  iff  they are of one document, and
        the key is context:  its block comes before the query's, or is the query's own and the query is context too
        the key is refine:   both belong to the same copy

So the context stream is causal over blocks and bidirectional inside one, a refine copy sees the context strictly
before its block and itself, and nothing ever sees a refine copy but the copy itself.

Legend: R rows, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -2  # document number of an unused cache slot: never visible


@dataclass(frozen=True)
class Fields:
    """(document, block, copy), int64 (R, N) each. copy = 0 is context, > 0 refine, -1 padding of the refine stream."""

    document: Tensor
    block: Tensor
    copy: Tensor

    def then(self, other: Fields) -> Fields:
        """The positions of `self` followed by those of `other`."""
        return Fields(
            torch.cat([self.document, other.document], 1),
            torch.cat([self.block, other.block], 1),
            torch.cat([self.copy, other.copy], 1),
        )


def visible(q_document, q_block, q_copy, k_document, k_block, k_copy):  # noqa: ANN001, ANN201
    """The predicate, elementwise on broadcastable integer tensors; returns a bool tensor."""
    of_context = (k_copy == 0) & ((k_block < q_block) | ((k_block == q_block) & (q_copy == 0)))
    of_copy = (k_copy != 0) & (k_copy == q_copy)
    return (q_document == k_document) & (of_context | of_copy)


def dense(queries: Fields, keys: Fields) -> Tensor:
    """Boolean mask (R, Q, K), True where the query sees the key."""
    q = (queries.document[:, :, None], queries.block[:, :, None], queries.copy[:, :, None])
    k = (keys.document[:, None, :], keys.block[:, None, :], keys.copy[:, None, :])
    return visible(*q, *k)


def flex(queries: Fields, keys: Fields):  # noqa: ANN201
    """The same mask as a `torch.nn.attention.flex_attention.BlockMask` (forward anywhere; backward on GPU only)."""
    from torch.nn.attention.flex_attention import create_block_mask

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(
            queries.document[b, i], queries.block[b, i], queries.copy[b, i],
            keys.document[b, j], keys.block[b, j], keys.copy[b, j],
        )  # fmt: skip

    rows, num_queries = queries.document.shape
    num_keys = keys.document.shape[1]
    return create_block_mask(predicate, rows, None, num_queries, num_keys, device=queries.document.device)


def oracle(queries: Fields, keys: Fields) -> Tensor:
    """The rule told again in plain Python, position by position: slow and obviously right. Tests compare with it."""
    q_rows = zip(queries.document.tolist(), queries.block.tolist(), queries.copy.tolist(), strict=True)
    k_rows = zip(keys.document.tolist(), keys.block.tolist(), keys.copy.tolist(), strict=True)
    out = []
    for q_row, k_row in zip(q_rows, k_rows, strict=True):
        out.append([])
        for document, block, copy in zip(*q_row, strict=True):
            out[-1].append([])
            for k_document, k_block, k_copy in zip(*k_row, strict=True):
                if document != k_document:
                    seen = False
                elif k_copy == 0 and copy == 0:  # context reads context
                    seen = k_block <= block
                elif k_copy == 0:  # refinement reads the context strictly before its block
                    seen = k_block < block
                else:  # a key in the refine stream is private to its copy
                    seen = k_copy == copy
                out[-1][-1].append(seen)
    return torch.tensor(out, dtype=torch.bool)
