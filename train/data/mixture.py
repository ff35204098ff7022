"""Mixture: many sources as one endless sequence, in exact shares.

Global indices come in groups of 1000. In every group each source has its share (rounded so that the running total is
never off by more than one), in a keyed order; the k-th index of a source is that source's document k. So a finite
source is visited exactly once per epoch for any weights, and any index is found without history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from omni.data.source import HeldOutRecord, Source
from omni.document import Document
from omni.rng import Key
from train.data.held_out import HeldOut

GROUP_SIZE = 1000  # indices; another number changes the order of every run


class Mixture:
    """Sources in shares by weight. held_out: documents that training skips; None: none. sources, weights, key: another
    order or key changes the data of the run."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], key: Key) -> None:
        total = math.fsum(weights)
        if not sources or min(weights) / total < 2 / GROUP_SIZE:
            raise ValueError(
                f"every source needs at least {2 / GROUP_SIZE:.1%} of the mixture, got weights {list(weights)}"
            )
        self.sources, self.key = list(sources), key
        self._edges = [math.fsum(weights[: i + 1]) / total for i in range(len(weights) - 1)] + [1.0]
        self._block: tuple[int, list[tuple[int, int]]] | None = None
        self.held_out: HeldOut | None = None

    def document(self, index: int) -> Document:
        """Raises CorruptRecord for a bad record, and KeptOut for one that is held out."""
        number, position = self.locate(index)
        source = self.sources[number]
        document = source.document(position)
        if self.held_out is not None and self.held_out.holds_out(source, source.identity(position, document)):
            raise HeldOutRecord(f"document {index} is held out for validation")
        return document

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, index in the source) of the global `index`."""
        if len(self.sources) == 1:
            return 0, index
        block, offset = divmod(index, GROUP_SIZE)
        if self._block is None or self._block[0] != block:
            self._block = (block, self._group_order(block))
        return self._block[1][offset]

    def fingerprint(self) -> list[str]:
        """The fingerprints of the sources, in order."""
        return [source.fingerprint() for source in self.sources]

    def _group_order(self, block: int) -> list[tuple[int, int]]:
        """(source, index in it) of every index of a group, in keyed order."""
        before, after = self._counts(block * GROUP_SIZE), self._counts((block + 1) * GROUP_SIZE)
        members = [(s, k) for s in range(len(self.sources)) for k in range(before[s], after[s])]
        order = torch.randperm(GROUP_SIZE, generator=self.key.fold("mixture", block).generator()).tolist()
        placed = [s for s, _ in (members[i] for i in order)]
        following = list(before)
        result = []
        for source in placed:
            result.append((source, following[source]))
            following[source] += 1
        return result

    def _counts(self, index: int) -> list[int]:
        """How many of the first `index` global indices belong to each source; `index` is a multiple of BLOCK."""
        edges = [0, *(math.floor(index * edge) for edge in self._edges)]
        return [high - low for low, high in zip(edges, edges[1:], strict=False)]
