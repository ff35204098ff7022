"""Chat messages in common formats to a Document and back, in the same order.

A message is {"role": "system" | "user" | "assistant", "content": a str or a list of parts}. Parts:

    {"type": "text" | "input_text" | "output_text", "text": str}                         OpenAI, Hugging Face
    {"type": "image_url", "image_url": {"url": data: URL or path} or str}                OpenAI chat
    {"type": "input_image", "image_url": str}                                           OpenAI Responses
    {"type": "image", "image" | "url" | "path" | "base64": PIL picture, array, ...}      Hugging Face
    {"type": "video", "video" | "url" | "path" | "base64": path or frames, "fps": 8}     Hugging Face; also video_url

The fps of frames is their rate; the fps of a file is the rate to subsample to. A plain str is one text part; so is a
str in the list of parts. The parts of an earlier reply are also parts; `reply.message` is the whole reply, and may be
empty. Contents of neighbouring messages of one role are joined without a separator.
No template is rendered. Nothing is fetched: http URLs raise ValueError.

Paths and file: URLs are read from this machine's disk with the rights of this process. Read untrusted messages with
`allow_paths=False`.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import torch

from omni import media
from omni.config import nearest
from omni.document import Budget, Document, Image, Role, Segment, Text, Video, check_fps

Message = Mapping[str, Any]
LoadImage = Callable[[Any], torch.Tensor]
LoadVideo = Callable[..., tuple[torch.Tensor, float]]

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_VIDEO_TYPES = ("video", "video_url", "input_video")
_NO_FRAMES = (str, bytes, bytearray, memoryview, os.PathLike, Mapping)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")  # two letters at least: C: is a drive
_URL_SAFE = bytes.maketrans(b"-_", b"+/")

# Limits of one call; omni.document.Budget also bounds media.
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
MAX_CHARACTERS = 10_000_000
MAX_ESCAPES = 2_000_000  # of one data: URL; takes seconds
MAX_SECONDS = 60.0


def messages_to_document(
    messages: str | Sequence[Message],
    load_image: LoadImage = media.load_image,
    *,
    load_video: LoadVideo = media.load_video,
    supervise: bool = False,
    allow_paths: bool = True,
) -> Document:
    """The Document of chat messages; a str is one message of the user.

    `load_image` turns a path, encoded bytes, an array or a PIL picture into uint8 (H, W, 3). `load_video(path or bytes,
    fps=, max_frames=, max_pixels=, timeout_seconds=)` turns a clip into uint8 (T, H, W, 3) and its frames per second.
    `supervise` marks the assistant's segments for the training loss.

    allow_paths: True reads paths and file: URLs from this machine's disk. False accepts only data: URLs, base64 and
        objects; a server of untrusted messages passes False (omni.Engine has the same argument).

    Messages, parts, characters, bytes, pixels, frames and seconds are bounded, before the work where a header or a
    length gives them. ValueError names the message and the value.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise ValueError(f"messages must be a str or a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; give at least one, such as {'role': 'user', 'content': 'draw a cat'}")
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"{len(messages)} messages are more than {MAX_MESSAGES}; split the conversation")
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

    The inverse of messages_to_document, except that neighbouring messages and texts of one role are joined.
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
    """The segments of one message; empty texts are left out. ValueError for a message without content."""
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
    """Whether `value` is a part of a reply (omni.generation.reply): it has a method `content`."""
    return not isinstance(value, Mapping) and callable(getattr(value, "content", None))


class _PartReader:
    """Converts content parts to segments, and checks their total size."""

    def __init__(self, load_image: LoadImage, load_video: LoadVideo, allow_paths: bool) -> None:
        self._load_image, self._load_video = load_image, load_video
        self._allow_paths = allow_paths
        self._budget = Budget()
        self._parts = self._characters = 0
        self._end = time.monotonic() + MAX_SECONDS

    def read(self, part: Any, role: Role, supervise: bool) -> Segment:
        """The segment of one part of any of the formats."""
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} parts; split the conversation")
        if isinstance(part, str):
            return self._text(part, role, supervise)
        if _is_part(part):
            part = part.content()
        if not isinstance(part, Mapping):
            raise ValueError(f"a content part is a mapping with a type, got {type(part).__name__} {part!r:.80}")
        kind = part.get("type")
        if kind in _TEXT_TYPES:
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part of type {kind!r} needs a str under 'text', got {part.get('text')!r:.80}")
            return self._text(part["text"], role, supervise)
        if kind in _IMAGE_TYPES:
            value = _value(part, kind, ("image", "image_url", "url", "path", "base64"), "picture", media.MAX_BYTES)
            return Image(self._image(value), role, supervise)
        if kind in _VIDEO_TYPES:
            value = _value(part, kind, ("video", "video_url", "url", "path", "base64"), "video", media.MAX_CLIP_BYTES)
            frames, fps = self._video(value, part.get("fps"))
            return Video(frames, fps, role, supervise)
        known = (*_TEXT_TYPES, *_IMAGE_TYPES, *_VIDEO_TYPES)
        hint = nearest(str(kind), known) or f"; known types: {', '.join(known)}"
        raise ValueError(f"unknown part type {kind!r:.80}{hint}")

    def _text(self, text: str, role: Role, supervise: bool) -> Text:
        """A text, counted."""
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS} characters of text; split the conversation")
        return Text(text, role, supervise)

    def _seconds_left(self) -> float:
        """Seconds until MAX_SECONDS. ValueError after them."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise ValueError(f"reading the media takes longer than {MAX_SECONDS:g} seconds; send fewer or smaller")
        return left

    def _image(self, value: Any) -> torch.Tensor:
        """Pixels (H, W, 3) of a picture, counted."""
        self._seconds_left()
        image = Image(self._load_image(self._resolve(value, "picture", media.MAX_BYTES)))
        self._budget.take(image.pixels.shape)
        return image.pixels

    def _video(self, value: Any, fps: Any) -> tuple[torch.Tensor, float]:
        """(frames (T, H, W, 3), frames per second) of a file or of a list of pictures, counted."""
        rate = None if fps is None else check_fps(fps)
        if isinstance(value, Iterable) and not isinstance(value, _NO_FRAMES) and getattr(value, "ndim", 4):
            return torch.stack(self._frames(value)), rate or 8.0
        frames, own = self._load_video(
            self._resolve(value, "video", media.MAX_CLIP_BYTES),
            fps=rate,
            max_frames=min(media.MAX_FRAMES, self._budget.max_frames - self._budget.frames),
            max_pixels=min(media.MAX_CLIP_PIXELS, self._budget.max_pixels - self._budget.pixels),
            timeout_seconds=min(media.TIMEOUT_SECONDS, self._seconds_left()),
        )
        self._budget.take(frames.shape)
        return frames, own

    def _frames(self, value: Iterable[Any]) -> list[torch.Tensor]:
        """The pictures of a list of frames, all of one shape."""
        frames: list[torch.Tensor] = []
        for frame in value:
            if len(frames) >= media.MAX_FRAMES:
                raise ValueError(f"a video has more than {media.MAX_FRAMES} frames; give fewer")
            frames.append(self._image(frame))
            if frames[-1].shape != frames[0].shape:
                shapes = f"{tuple(frames[0].shape)} and {tuple(frames[-1].shape)}"
                raise ValueError(f"a video's frames need one common shape, got {shapes}")
        if not frames:
            raise ValueError("a video's frames need one common shape, got no frame")
        return frames

    def _resolve(self, value: Any, kind: str, max_bytes: int) -> Any:
        """A data: URL or base64 to bytes, a file: URL to its path; other values unchanged; ValueError for http."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            return value
        if not value.strip():
            raise ValueError(f"the {kind}'s address is empty; give a path or a data: URL")
        if value[:5].lower() == "data:":
            return _data_url(value, kind, max_bytes)
        scheme = _SCHEME.match(value)
        if scheme and scheme[1].lower() != "file":
            raise ValueError(f"{kind} {value!r:.100}: nothing is fetched from the network; download it first")
        if not self._allow_paths:
            raise ValueError(f"{kind} {value!r:.60}: paths are not allowed here; send a data: URL")
        return _path_of_url(value, kind) if value[:5].lower() == "file:" else os.path.expanduser(value)


def _value(part: Mapping[str, Any], kind: str, names: tuple[str, ...], what: str, max_bytes: int) -> Any:
    """The one media value of a part; {"url": ...} is unwrapped; bare base64 becomes bytes."""
    given = [name for name in names if part.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"part of type {kind!r} needs one of the keys {', '.join(names)}; it has {given or 'none'}")
    value = part[given[0]]
    if isinstance(value, Mapping):
        if value.get("url") is None:
            raise ValueError(f"{given[0]!r} of a part needs a 'url', got the keys {sorted(map(str, value))!s:.80}")
        value = value["url"]
    if given[0] == "base64" and isinstance(value, str) and value[:5].lower() != "data:":
        return _base64(value, what, max_bytes)
    return value


def _path_of_url(url: str, kind: str) -> str:
    """The path of a file: URL. ValueError for the URL of another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{kind} {url!r:.100} is on the machine {parts.netloc!r:.60}; write file:///path for this machine"
        )
    return url2pathname(parts.path)


def _data_url(url: str, kind: str, max_bytes: int) -> bytes:
    """The bytes of a data: URL, base64 or percent-escaped."""
    comma = url.find(",")
    if comma < 0:
        raise ValueError(f"{kind} {url!r:.40} is no data: URL (no comma); write data:image/png;base64,...")
    if url[:comma].lower().endswith(";base64"):
        return _base64(url[comma + 1 :], kind, max_bytes)
    return _unescape(url, comma + 1, kind, max_bytes)


def _base64(text: str, kind: str, max_bytes: int) -> bytes:
    """Decode base64; also URL-safe, with white space, with percent escapes, or without padding."""
    plain = _unescape(text, 0, kind, 2 * max_bytes, max_bytes)
    plain = plain.translate(_URL_SAFE, b" \t\n\r\v\f").rstrip(b"=")
    if len(plain) > max_bytes // 3 * 4 + 4:
        raise _too_long(kind, max_bytes)
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"the base64 of a {kind} is malformed: {text[:30]!r}...; encode the file again") from None


def _unescape(text: str, start: int, kind: str, max_bytes: int, named: int | None = None) -> bytes:
    """The bytes of `text[start:]` with percent escapes decoded, at most `max_bytes`; errors name the limit `named`.

    Decodes in pieces, because unquote_to_bytes makes an object for every escape.
    """
    if len(text) - start > 3 * max_bytes:
        raise _too_long(kind, named or max_bytes)
    if (num := text.count("%", start)) > MAX_ESCAPES:
        raise ValueError(f"the address of a {kind} has {num} percent escapes, above {MAX_ESCAPES}; send plain base64")
    out = bytearray()
    while start < len(text):
        end = start + (1 << 14)
        split = text.rfind("%", max(start + 1, end - 2), end)  # an escape is not cut in two
        end = split if split > 0 else end
        out += unquote_to_bytes(text[start:end].encode("utf-8", "replace"))
        if len(out) > max_bytes:
            raise _too_long(kind, named or max_bytes)
        start = end
    return bytes(out)


def _too_long(kind: str, max_bytes: int) -> ValueError:
    """The error for too many bytes."""
    return ValueError(f"the data: URL or base64 of a {kind} is longer than {max_bytes} bytes; make it smaller")
