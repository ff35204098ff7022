"""Finite sources in text files: Document lines, chat messages, LLaVA conversations.

omni.media loads every picture and clip with its limits and keeps its size; the recipe's [preparation] fits it to the
codec. Paths in records are relative to the data file and inside its folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from omni.config import Frozen
from omni.data.digests import bytes_digest, file_fingerprint
from omni.data.source import SOURCES, FiniteSource, require_file
from omni.document import MAX_JSON_BYTES, Document, Image, Role, Segment, Text, parse_bounded
from omni.media import load_image, load_video
from omni.rng import Key


class FileOptions(Frozen):
    """path: of the data file."""

    path: Path


class _LineSource(FiniteSource):
    """One record per line of a JSONL file; only the offsets of the lines are in memory."""

    Options = FileOptions

    def __init__(self, options: FileOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "data file")
        self._offsets: list[int] = []
        with self.path.open("rb") as stream:
            start = position = 0
            while piece := stream.readline(1 << 20):  # in pieces, because a line may have any length
                if piece.strip() and self._offsets[-1:] != [start]:
                    self._offsets.append(start)
                position += len(piece)
                start = position if piece.endswith(b"\n") else start
        self.num_records = len(self._offsets)
        if not self.num_records:
            raise ValueError(f"{str(self.path)!r} has no records; give a file with one JSON object per line")

    def line(self, position: int) -> str:
        """The text of a record, read from disk. ValueError if it is longer than MAX_JSON_BYTES."""
        with self.path.open("rb") as stream:
            stream.seek(self._offsets[position])
            line = stream.readline(MAX_JSON_BYTES + 1)
        if len(line) > MAX_JSON_BYTES:
            raise ValueError(f"{self.record_name(position)} has more than {MAX_JSON_BYTES} bytes; split it")
        return line.decode("utf-8")

    def record_identity(self, position: int) -> str:
        return bytes_digest(self.line(position).strip().encode())

    def record_name(self, position: int) -> str:
        return f"{self.path.name} record {position + 1}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


@SOURCES.register("jsonl")
class DocumentLines(_LineSource):
    """Omni's own Document JSON (Document.to_json), one per line."""

    def record(self, position: int) -> Document:
        return Document.from_json(self.line(position))


@SOURCES.register("messages")
class MessageLines(_LineSource):
    """OpenAI / Hugging Face chat records: {"messages": [{"role", "content": text or parts}]}, one per line.

    Every assistant segment is supervised. Pictures: data: URLs, or paths beside the file.
    """

    def record(self, position: int) -> Document:
        from omni.text.chat import messages_to_document

        record = parse_bounded(self.line(position), "the record")
        messages = record["messages"] if isinstance(record, dict) else record
        return messages_to_document(messages, self._load, load_video=self._load_clip, supervise=True)

    def _load(self, source: Any, **limits: Any) -> torch.Tensor:
        """Loads a picture; paths only from beside the data file."""
        if isinstance(source, str | Path):
            return load_picture(self.path.parent, str(source))
        return load_image(source, **limits)

    def _load_clip(self, source: Any, **limits: Any) -> tuple[torch.Tensor, float]:
        """Loads a clip; paths only from beside the data file."""
        if isinstance(source, str | Path):
            source = path_inside(self.path.parent, str(source), "clip")
        return load_video(source, **limits)


@SOURCES.register("llava")
class LlavaConversations(FiniteSource):
    """A LLaVA JSON file: [{"image": path, "conversations": [{"from": "human" | "gpt", "value": text}]}].

    `<image>` in a human value marks the place of a picture; elsewhere it is literal text.
    """

    Options = FileOptions

    def __init__(self, options: FileOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "data file")
        try:
            self.records = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(self.path)!r} is not JSON: {error}") from None
        if not isinstance(self.records, list) or not self.records:
            raise ValueError(f"{str(self.path)!r} must be a JSON list of conversations")
        self.num_records = len(self.records)

    def record(self, position: int) -> Document:
        record = self.records[position]
        waiting = [record["image"]] if isinstance(record.get("image"), str) else list(record.get("image") or [])
        segments: list[Segment] = []
        for turn in record["conversations"]:
            role = {"human": Role.USER, "gpt": Role.ASSISTANT, "system": Role.SYSTEM}[turn["from"]]
            pieces = turn["value"].split("<image>") if role is Role.USER else [turn["value"]]
            for number, piece in enumerate(pieces):
                if number:
                    if not waiting:
                        raise ValueError("more <image> marks than images")
                    segments.append(Image(load_picture(self.path.parent, waiting.pop(0)), role))
                text = piece.strip("\n") if len(pieces) > 1 else piece
                if text:
                    segments.append(Text(text, role, supervise=role is Role.ASSISTANT))
        if waiting:
            raise ValueError(f"{len(waiting)} images have no <image> mark")
        return Document(tuple(segments), {"id": str(record.get("id", position))})

    def record_identity(self, position: int) -> str:
        record = self.records[position]
        return bytes_digest(json.dumps([record.get("image"), record.get("conversations")]).encode())

    def record_name(self, position: int) -> str:
        return f"{self.path.name} conversation {position + 1}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


def load_picture(folder: Path, name: str) -> torch.Tensor:
    """uint8 (H, W, 3) of the picture `name` inside `folder`. ValueError when the name leaves the folder."""
    return load_image(path_inside(folder, name, "picture"))


def path_inside(folder: Path, name: str, what: str) -> Path:
    """The file `name` in `folder`. ValueError when the name leaves the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{what} {name!r} is outside {str(folder)!r}; keep {what}s beside the data file")
    return path
