"""Digests that identify media, documents, records and files. Equal content has equal digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from omni.document import Document, Image, Text, Video


def media_digest(segment: Image | Video) -> bytes:
    """16 bytes over the shape, the frame rate and the pixels. Held-out documents are known by it: never change it."""
    values, fps = (segment.pixels, None) if isinstance(segment, Image) else (segment.frames, segment.fps)
    digest = hashlib.blake2b(repr((tuple(values.shape), fps)).encode(), digest_size=16)
    digest.update(memoryview(values.contiguous().numpy()).cast("B"))  # type: ignore[arg-type]
    return digest.digest()


def document_digest(document: Document) -> str:
    """Over roles, texts and pixels, without `meta`. Held-out documents are known by it: never change it."""
    digest = hashlib.blake2b(digest_size=16)
    for segment in document.segments:
        content = segment.text if isinstance(segment, Text) else media_digest(segment).hex()
        digest.update(json.dumps([type(segment).__name__, segment.role, segment.supervise, content]).encode())
    return digest.hexdigest()


def bytes_digest(data: bytes) -> str:
    """128-bit blake2b, as 32 hex digits. Held-out records are chosen by it: never change it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Name, size and blake2b of a file's bytes. Checkpoints store it: a change makes every run impossible to resume."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"{path.name}:{path.stat().st_size}:{digest.hexdigest()}"


NUM_FINGERPRINTED = 256  # documents in the fingerprint of a generated source


def generated_fingerprint(document: Callable[[int], Document], font: Path) -> str:
    """Over a font and the texts and `meta` of the first generated documents, which change with the code and the word
    lists. Checkpoints store it: a change makes every run impossible to resume."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(NUM_FINGERPRINTED):
        found = document(index)
        words = [segment.text for segment in found.segments if isinstance(segment, Text)]
        digest.update(json.dumps([words, dict(found.meta)], sort_keys=True).encode())
    return f"{file_fingerprint(font)}:{digest.hexdigest()}"
