"""Source: an endless, pure sequence of Documents. `document(index)` depends on (options, seed, index) alone.

A new source is one file: an options model, a class, `@SOURCES.register("name")`. Finite data derives from
FiniteSource, which visits every record once per epoch in a keyed order. A bad record raises CorruptRecord; every run
skips that index. Sources do not use tokens, codecs or batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from omni.config import Frozen, build
from omni.data.digests import document_digest
from omni.document import Document
from omni.registry import Registry
from omni.rng import Key

T = TypeVar("T")


class CorruptRecord(ValueError):
    """One record cannot be read. The message names it; training continues with the next index."""


class HeldOutRecord(CorruptRecord):
    """A document that training skips, because it is for validation (see train.data.held_out)."""


class Source(ABC):
    """Options are a Frozen model in `Options`; `key` is the seed of every random choice of the source."""

    Options: ClassVar[type[Frozen]] = Frozen

    def __init__(self, options: Any, key: Key) -> None:
        self.options, self.key = options, key

    @abstractmethod
    def document(self, index: int) -> Document:
        """The document at `index` >= 0. Raises CorruptRecord for a bad record."""

    def identity(self, index: int, document: Document | None = None) -> str:
        """Equal for documents of equal content. document: the document of `index`, if it is already read."""
        return document_digest(document or self.document(index))

    def fingerprint(self) -> str:
        """Identifies the data of the options; a run resumes only with an equal fingerprint."""
        return "generated"


class FiniteSource(Source):
    """`num_records` records (set by `__init__`), every one once per epoch, in an order keyed by the epoch."""

    num_records: int

    @abstractmethod
    def record(self, position: int) -> Document:
        """The document at `position` < num_records. `document` turns its errors into a CorruptRecord with its name."""

    @abstractmethod
    def record_name(self, position: int) -> str:
        """The name of the record in a message, e.g. "data.jsonl line 7"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with the records, for example with their files (data.digests)."""

    def record_identity(self, position: int) -> str:
        """`identity` of a record, if possible without decoding its pictures."""
        return document_digest(self.record(position))

    def identity(self, index: int, document: Document | None = None) -> str:
        """Raises CorruptRecord for a bad record."""
        epoch, offset = divmod(index, self.num_records)
        return self._read(self.record_identity, self._order(epoch)[offset])

    def document(self, index: int) -> Document:
        epoch, offset = divmod(index, self.num_records)
        return self._read(self.record, self._order(epoch)[offset])

    def _read(self, read: Callable[[int], T], position: int) -> T:
        """read(position); CorruptRecord with the name of the record where it fails."""
        try:
            return read(position)
        except ImportError:
            raise  # an extra is missing; the record is not corrupt
        except CorruptRecord:
            raise
        except Exception as error:  # parsers raise anything on damaged records
            raise CorruptRecord(f"{self.record_name(position)}: {type(error).__name__}: {error}") from error

    def _order(self, epoch: int) -> list[int]:
        """The positions of an epoch in keyed order. Keyed by "order" and the epoch: another key changes every run."""
        if getattr(self, "_epoch", None) != epoch:
            generator = self.key.fold("order", epoch).generator()
            self._epoch = epoch
            self._positions: list[int] = torch.randperm(self.num_records, generator=generator).tolist()
        return self._positions


SOURCES: Registry[type[Source]] = Registry("data source", "omni.data", entry_points="omni.sources")


def build_source(name: str, options: dict[str, Any], key: Key, origin: str) -> Source:
    """The registered source `name`. Raises ValueError naming `origin` on an unknown name or option."""
    source = SOURCES.get(name)
    if missing := getattr(source, "__abstractmethods__", None):
        raise ValueError(f"data source {name!r}: {source.__name__} must define {', '.join(sorted(missing))}")
    made = source(build(options, source.Options, f"{origin} ({name}) options"), key)
    if isinstance(made, FiniteSource) and not hasattr(made, "num_records"):
        raise ValueError(f"data source {name!r}: {source.__name__}.__init__ must set num_records")
    return made


def require_file(path: Path, what: str) -> Path:
    """`path`, if it is a file; else ValueError that names `what`."""
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} is not a file; give the path of an existing one")
    return path
