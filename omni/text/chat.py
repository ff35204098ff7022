"""Chat messages, in the shapes people already have, to a Document and back. Order is never changed.

A message is {"role": "system" | "user" | "assistant", "content": a str or a list of parts}. Parts:

    {"type": "text" | "input_text" | "output_text", "text": str}                         OpenAI, Hugging Face
    {"type": "image_url", "image_url": {"url": data: URL or path} or str}                OpenAI chat
    {"type": "input_image", "image_url": str}                                           OpenAI Responses
    {"type": "image", "image" | "url" | "path" | "base64": PIL picture, tensor, ...}     Hugging Face
    {"type": "video", "video" | "url" | "path" | "base64": path or frames, "fps": 8}     Hugging Face; also video_url

The fps of frames is their rate; of a file, the rate to thin it out to. A plain str is one part of text; so is a str
among the parts. The parts of an earlier reply are parts too; `reply.message` is all of it, and may be empty. The
content of neighbouring messages of one role runs on without anything in between.
Text stays text: no template is rendered. Nothing is fetched: http URLs are refused.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import torch
from PIL import Image as PILImage

from omni import media
from omni.config import nearest
from omni.document import Document, Image, Role, Segment, Text, Video

Message = Mapping[str, Any]
LoadImage = Callable[[Any], torch.Tensor]
LoadVideo = Callable[..., tuple[torch.Tensor, float]]

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_VIDEO_TYPES = ("video", "video_url", "input_video")


def messages_to_document(
    messages: str | Sequence[Message],
    load_image: LoadImage = media.load_image,
    *,
    load_video: LoadVideo = media.load_video,
    supervise: bool = False,
    allow_paths: bool = True,
) -> Document:
    """The Document of chat messages; a str stands for one message of the user.

    `load_image` turns a path, encoded bytes or a PIL picture into uint8 (H, W, 3); `load_video(path or bytes, fps=)` a
    clip into uint8 (T, H, W, 3) and its frames per second. `supervise` marks the assistant's
    segments for the training loss. With `allow_paths=False` (for messages from strangers) only data: URLs, base64 and
    objects are taken, never a path. Raises ValueError naming the message and value for anything unusable.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise ValueError(f"messages must be a str or a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; give at least one, such as {'role': 'user', 'content': 'draw a cat'}")
    reader = _PartReader(load_image, load_video, allow_paths)
    segments: list[Segment] = []
    for index, message in enumerate(messages):
        try:
            segments += _read_message(message, reader, supervise)
        except ValueError as error:
            raise ValueError(f"message {index}: {error}") from None
    return Document(tuple(segments))


def document_to_messages(document: Document) -> list[dict[str, Any]]:
    """Messages whose content is a list of parts, one message per turn; pictures are PIL, frames a list of PIL.

    The inverse of messages_to_document but for neighbouring messages and texts of one role, which come back joined.
    """
    messages: list[dict[str, Any]] = []
    for role, segments in document.turns():
        parts: list[dict[str, Any]] = []
        for segment in segments:
            if isinstance(segment, Text):
                if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += segment.text
                else:
                    parts.append({"type": "text", "text": segment.text})
            elif isinstance(segment, Image):
                parts.append({"type": "image", "image": media.to_pil(segment.pixels)})
            else:
                frames = [media.to_pil(frame) for frame in segment.frames]
                parts.append({"type": "video", "video": frames, "fps": segment.fps})
        messages.append({"role": str(role), "content": parts})
    return messages


def _read_message(message: Message, reader: _PartReader, supervise: bool) -> list[Segment]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a mapping with role and content, got {type(message).__name__} {message!r:.80}")
    name = message.get("role")
    if not isinstance(name, str) or name not in _ROLES:
        hint = nearest(str(name), _ROLES) or "; use system, user or assistant"
        raise ValueError(f"unknown role {name!r}{hint}")
    role = _ROLES[name]
    flag = supervise and role is Role.ASSISTANT
    content = message.get("content")
    if isinstance(content, str | Mapping) or _is_part(content):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"content of the {name} must be a str or a list of parts, got {type(content).__name__}")
    segments = [reader.read(part, role, flag) for part in content]
    empty = not any(not isinstance(s, Text) or s.text.strip() for s in segments)
    may_be = role is Role.ASSISTANT and not flag and not isinstance(message["content"], str)  # a reply without parts
    if empty and not may_be:
        raise ValueError(f"the {name}'s content {message['content']!r:.80} is empty; write or attach something")
    return [s for s in segments if not isinstance(s, Text) or s.text]


def _is_part(value: Any) -> bool:
    """A part of a reply (omni.reply), which gives itself as a content part."""
    return not isinstance(value, Mapping) and callable(getattr(value, "content", None))


class _PartReader:
    """Reads one content part to a segment."""

    def __init__(self, load_image: LoadImage, load_video: LoadVideo, allow_paths: bool) -> None:
        self._load_image, self._load_video = load_image, load_video
        self._allow_paths = allow_paths

    def read(self, part: Any, role: Role, supervise: bool) -> Segment:
        if isinstance(part, str):
            return Text(part, role, supervise)
        if _is_part(part):
            part = part.content()
        if not isinstance(part, Mapping):
            raise ValueError(f"a content part is a mapping with a type, got {type(part).__name__} {part!r:.80}")
        kind = part.get("type")
        if kind in _TEXT_TYPES:
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part of type {kind!r} needs a str under 'text', got {part.get('text')!r:.80}")
            return Text(part["text"], role, supervise)
        if kind in _IMAGE_TYPES:
            value = _value(part, kind, ("image", "image_url", "url", "path", "base64"))
            return Image(self._image(value), role, supervise)
        if kind in _VIDEO_TYPES:
            value = _value(part, kind, ("video", "video_url", "url", "path", "base64"))
            frames, fps = self._video(value, part.get("fps"))
            return Video(frames, fps, role, supervise)
        known = (*_TEXT_TYPES, *_IMAGE_TYPES, *_VIDEO_TYPES)
        hint = nearest(str(kind), known) or f"; known types: {', '.join(known)}"
        raise ValueError(f"unknown part type {kind!r}{hint}")

    def _image(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        if hasattr(value, "__array_interface__") and not isinstance(value, PILImage.Image):
            value = PILImage.fromarray(value)
        return self._load_image(self._resolve(value, "picture", media.MAX_BYTES))

    def _video(self, value: Any, fps: Any) -> tuple[torch.Tensor, float]:
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0):
            raise ValueError(f"fps must be a number above 0, got {fps!r}")
        if isinstance(value, torch.Tensor):
            return value, float(fps or 8.0)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike | Mapping):
            frames = [self._image(frame) for frame in value]
            shapes = sorted({tuple(frame.shape) for frame in frames})
            if len(shapes) != 1:
                raise ValueError(f"a video's frames need one common shape, got {shapes or 'no frame'}")
            return torch.stack(frames), float(fps or 8.0)
        return self._load_video(self._resolve(value, "video", media.MAX_CLIP_BYTES), fps=fps)

    def _resolve(self, value: Any, kind: str, max_bytes: int) -> Any:
        """A data: URL or base64 to bytes, a file: URL to its path; other things as they are; ValueError for http."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            return value
        if not value.strip():
            raise ValueError(f"the {kind}'s address is empty; give a path or a data: URL")
        if value[:5].lower() == "data:":
            return _data_url(value, kind, max_bytes)
        if value.startswith(("http://", "https://", "ftp://", "HTTP://", "HTTPS://")):
            raise ValueError(f"{kind} {value!r:.100}: nothing is fetched from the network; download it first")
        if not self._allow_paths:
            raise ValueError(f"{kind} {value!r:.60}: paths are not allowed here; send a data: URL")
        return url2pathname(urlsplit(value).path) if value.startswith("file://") else str(Path(value).expanduser())


def _value(part: Mapping[str, Any], kind: str, names: tuple[str, ...]) -> Any:
    """The one media value of a part; {"url": ...} is unwrapped; bare base64 becomes bytes."""
    given = [name for name in names if part.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"part of type {kind!r} needs one of the keys {', '.join(names)}; it has {given or 'none'}")
    value = part[given[0]]
    if isinstance(value, Mapping):
        if value.get("url") is None:
            raise ValueError(f"{given[0]!r} of a part needs a 'url', got the keys {sorted(map(str, value))}")
        value = value["url"]
    if given[0] == "base64" and isinstance(value, str) and value[:5].lower() != "data:":
        return _base64(value, kind, media.MAX_CLIP_BYTES)
    return value


def _data_url(url: str, kind: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError(f"{kind} {url!r:.40} is no data: URL (no comma); write data:image/png;base64,...")
    if len(body) > 3 * max_bytes:
        raise ValueError(f"the data: URL of a {kind} is longer than {max_bytes} bytes; make it smaller")
    return _base64(body, kind, max_bytes) if head.lower().endswith(";base64") else unquote_to_bytes(body)


def _base64(text: str, kind: str, max_bytes: int) -> bytes:
    if len(text) > 2 * max_bytes:
        raise ValueError(f"the base64 of a {kind} is longer than {max_bytes} bytes; make it smaller")
    plain = "".join(unquote_to_bytes(text).decode("ascii", "replace").split()) if "%" in text else "".join(text.split())
    plain = plain.replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"the base64 of a {kind} is malformed: {text[:30]!r}...; encode the file again") from None
