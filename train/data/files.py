"""Finite sources read from text files: Document lines, chat messages, LLaVA conversations.

Every picture and clip goes through omni.media (bounded, safe). `side` crops the middle square and resizes it, because a
codec wants sides that are multiples of its stride. Paths in records are relative to the data file and stay in its
folder.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from omni.config import Frozen
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.media import load_image, load_video
from omni.rng import Key
from train.data.source import SOURCES, FiniteSource, bytes_digest, file_fingerprint, require_file


class FileOptions(Frozen):
    path: Path
    side: int | None = Field(None, ge=8, le=1024, description="pictures become side x side pixels; kept when absent")


class _LineSource(FiniteSource):
    """One record per line of a JSONL file; only the offsets of the lines are kept in memory."""

    Options = FileOptions

    def __init__(self, options: FileOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "data file")
        self._offsets: list[int] = []
        with self.path.open("rb") as stream:
            position = 0
            for line in stream:
                if line.strip():
                    self._offsets.append(position)
                position += len(line)
        self.num_records = len(self._offsets)
        if not self.num_records:
            raise ValueError(f"{str(self.path)!r} has no records; give a file with one JSON object per line")

    def line(self, position: int) -> str:
        with self.path.open("rb") as stream:
            stream.seek(self._offsets[position])
            return stream.readline().decode("utf-8")

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
        return _fit_document(Document.from_json(self.line(position)), self.options.side)


@SOURCES.register("messages")
class MessageLines(_LineSource):
    """OpenAI / Hugging Face chat records: {"messages": [{"role", "content": text or parts}]}, one per line.

    Every assistant segment is supervised. Pictures: data: URLs, or paths beside the file.
    """

    def record(self, position: int) -> Document:
        from omni.text.chat import messages_to_document

        record = json.loads(self.line(position))
        messages = record["messages"] if isinstance(record, dict) else record
        return messages_to_document(messages, self._load, load_video=self._load_clip, supervise=True)

    def _load(self, source: Any, **limits: Any) -> torch.Tensor:
        if isinstance(source, str | Path):
            return load_picture(self.path.parent, str(source), self.options.side)
        return fit_square(load_image(source, **limits), self.options.side)

    def _load_clip(self, source: Any, **limits: Any) -> tuple[torch.Tensor, float]:
        if isinstance(source, str | Path):
            source = inside(self.path.parent, str(source), "clip")
        frames, fps = load_video(source, **limits)
        return fit_frames(frames, self.options.side), fps


@SOURCES.register("llava")
class LlavaConversations(FiniteSource):
    """A LLaVA JSON file: [{"image": path, "conversations": [{"from": "human" | "gpt", "value": text}]}].

    `<image>` in a human value stands where the picture goes; elsewhere it is literal text.
    """

    Options = FileOptions

    def __init__(self, options: FileOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "data file")
        try:
            self.records = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
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
                    segments.append(Image(load_picture(self.path.parent, waiting.pop(0), self.options.side), role))
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


def load_picture(folder: Path, name: str, side: int | None) -> torch.Tensor:
    """uint8 (H, W, 3) of the picture `name` inside `folder`. ValueError when the name leaves the folder."""
    return fit_square(load_image(inside(folder, name, "picture")), side)


def inside(folder: Path, name: str, what: str) -> Path:
    """The file `name` in `folder`. ValueError when the name leaves the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{what} {name!r} lies outside {str(folder)!r}; keep {what}s beside the data file")
    return path


def fit_square(pixels_HWC: torch.Tensor, side: int | None) -> torch.Tensor:
    """The middle square, resized to side x side (Lanczos); unchanged when side is None or already right."""
    height, width, _ = pixels_HWC.shape
    if side is None or (height, width) == (side, side):
        return pixels_HWC
    from PIL import Image as PillowImage

    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = pixels_HWC[top : top + edge, left : left + edge].contiguous()
    picture = PillowImage.fromarray(square.numpy()).resize((side, side), PillowImage.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(side, side, 3)


def fit_frames(frames_THWC: torch.Tensor, side: int | None) -> torch.Tensor:
    """`fit_square` of each frame."""
    return torch.stack([fit_square(frame, side) for frame in frames_THWC])


def _fit_document(document: Document, side: int | None) -> Document:
    def fitted(segment: Segment) -> Segment:
        match segment:
            case Image():
                return dataclasses.replace(segment, pixels=fit_square(segment.pixels, side))
            case Video():
                return dataclasses.replace(segment, frames=fit_frames(segment.frames, side))
            case _:
                return segment

    return Document(tuple(map(fitted, document.segments)), document.meta)
