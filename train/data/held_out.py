"""Held-out documents, for the validation loss.

Of a file: the records whose identity (Source.identity) has a keyed hash below the share. Of a generated source, which
has no end: documents far beyond those of training. Or the documents of separate sources. In every case training skips
each document of the same identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omni.data.source import CorruptRecord, FiniteSource, Source
from omni.document import Document
from omni.rng import Key

FIRST_UNSEEN = 10**9  # index of a generated source from which documents are held out
ATTEMPTS = 20  # documents to read at most for each wanted one, where some are damaged or equal


@dataclass(frozen=True)
class HeldOut:
    """`documents` to measure on, and the rule for all others that training skips. share: of files."""

    documents: tuple[Document, ...]
    identities: frozenset[str]
    share: float
    key: Key

    def holds_out(self, source: Source, identity: str) -> bool:
        """Whether training skips a document of this identity."""
        return identity in self.identities or (isinstance(source, FiniteSource) and self.by_share(identity))

    def by_share(self, identity: str) -> bool:
        """Whether the keyed hash of an identity is below the share."""
        return is_below(self.key, identity, self.share)


def is_below(key: Key, identity: str, share: float) -> bool:
    """Whether the keyed hash of an identity, uniform in [0, 1), is below `share`. Another hash moves held-out documents
    into training."""
    return key.fold(identity).integer() < share * 2**63


def hold_out(sources: Sequence[Source], weights: Sequence[float], count: int, share: float | None, key: Key) -> HeldOut:
    """At most `count` documents, from each source in proportion to its weight.

    share: of the training sources; None: the sources serve validation alone. Raises ValueError where nothing is held
    out, or where a source would have no document left for training.
    """
    documents: dict[str, Document] = {}
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        wanted = max(1, math.floor(count * weight / math.fsum(weights)))
        found, num_held = _held_out_of(source, wanted, share, key)
        if share is not None and isinstance(source, FiniteSource) and num_held == source.num_records:
            raise ValueError(f"validation: share = {share:g} holds out every record of data.{number}; lower it")
        documents |= found
    if not documents:
        raise ValueError(
            "validation: no document can be held out"
            + (
                f" by validation.share = {share:g}; raise it (to 0.1 for some dozens of documents), give "
                "validation.data, or remove [validation]"
                if share
                else "; give other data"
            )
        )
    return HeldOut(tuple(documents.values()), frozenset(documents), share or 0.0, key)


def _held_out_of(source: Source, wanted: int, share: float | None, key: Key) -> tuple[dict[str, Document], int]:
    """Up to `wanted` documents by identity, and how many of the examined records are held out."""
    of_files = isinstance(source, FiniteSource)
    start = 0 if of_files or share is None else FIRST_UNSEEN
    most = source.num_records if of_files else ATTEMPTS * wanted
    found: dict[str, Document] = {}
    seen = kept = 0
    while seen < most and len(found) < wanted:
        index, seen = start + seen, seen + 1
        try:
            if of_files and share is not None and not is_below(key, source.identity(index), share):
                continue
            kept += 1
            document = source.document(index)
            found.setdefault(source.identity(index, document), document)
        except CorruptRecord:
            continue
    return found, kept
