"""A reply or a whole conversation as a folder: Markdown to read, JSON to parse, every picture beside them.

    reply.md | chat.md        the ordered text and pictures
    reply.json | chat.json    the same, exact, with options, seeds, model digest and versions
    image-1.png ...           pictures of the assistant; clip-1.png is a clip as animated PNG
    input-1.png ...           pictures of the user
    manifest.json             digests of these files

The folder appears whole or not at all (`omni.checkpoint.publish`). `markdown` and `html_page` give segments as one text
with the pictures as data URLs. Text from users and models is always escaped. This file runs no model.
"""

from __future__ import annotations

import base64
import html
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni import media
from omni.checkpoint import MANIFEST, publish
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.errors import check_place
from omni.safe_text import safe_text

FORMAT = 1
_NUMBERED = re.compile(r"\d{3,}")


def default_folder(base: Path) -> Path:
    """The next of base/001, base/002, ...: one more than the highest number in `base`."""
    taken = [int(path.name) for path in base.iterdir() if _NUMBERED.fullmatch(path.name)] if base.is_dir() else []
    return base / f"{max(taken, default=0) + 1:03d}"


def check_folder(folder: Path, overwrite: bool, name: str = "--out", way_out: str = "add --overwrite") -> None:
    """ValueError, before any work, when `folder` (given as `name`) cannot become a reply's folder: it is not empty, or
    cannot be written.

    With `overwrite`, a folder may hold a reply or conversation of this project, and nothing else.
    """
    if folder.name in ("", ".."):
        inside = str(folder / "reply")
        raise ValueError(f"{name} {str(folder)!r} cannot appear as a whole; name a folder in it, such as {inside!r}")
    check_place(folder, name)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{name} {str(folder)!r} is not empty; name another folder{way_out and f' or {way_out}'}")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if foreign or not (folder / MANIFEST).is_file():
        what = f"{foreign[0]!r}, which no reply holds" if foreign else "no reply"
        raise ValueError(f"{name} {str(folder)!r} holds {what}, and is not overwritten; name another folder")


def _is_ours(path: Path) -> bool:
    known = (MANIFEST, "reply.md", "reply.json", "chat.md", "chat.json")
    return path.is_file() and (
        path.name in known or re.fullmatch(r"(image|clip|input)-\d+\.png", path.name) is not None
    )


def write_reply(
    folder: Path,
    document: Document,
    extras: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    replace: bool = False,
) -> Path:
    """Write the last assistant turn of `document` (a request and its reply) as a reply folder.

    Args:
        folder: must not exist, unless `replace`.
        document: the request, then the reply.
        extras: for each segment of the reply, in order, fields beyond its content (steps, seed, ...).
        record: JSON values for the top of reply.json: options, model, versions, stop_reason.

    Returns `folder`. Raises ValueError when the folder exists, OSError when it cannot be written.
    """
    start = len(document.segments) - len(extras)
    contents = _contents(document)
    reply = [{**content, **extra} for content, extra in zip(contents[start:], extras, strict=True)]
    request = _messages(document.segments[:start], contents[:start])
    data = {"format": FORMAT, "request": request, "parts": reply, **record}
    return _publish(folder, "reply", document, contents, data, replace)


def write_chat(
    folder: Path,
    document: Document,
    extras: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    replace: bool = False,
) -> Path:
    """Write a whole conversation: chat.md and chat.json. `omni.text.chat` reads the "messages" of chat.json.

    `extras` has an entry for every segment of the document; the other arguments are those of write_reply.
    """
    contents = [{**content, **extra} for content, extra in zip(_contents(document), extras, strict=True)]
    data = {"format": FORMAT, "messages": _messages(document.segments, contents), **record}
    return _publish(folder, "chat", document, contents, data, replace)


def _publish(
    folder: Path, kind: str, document: Document, contents: list[dict[str, Any]], data: dict[str, Any], replace: bool
) -> Path:
    def write(inside: Path) -> None:
        for segment, content in zip(document.segments, contents, strict=True):
            if isinstance(segment, Image):
                media.save_png(segment.pixels, inside / content["path"])
            elif isinstance(segment, Video):
                media.save_apng(segment.frames, inside / content["path"], segment.fps)
        (inside / f"{kind}.json").write_bytes(_json(data))
        (inside / f"{kind}.md").write_text(_markdown(document, contents), encoding="utf-8")

    return publish(folder, write, info={"kind": kind}, replace=replace)


def _contents(document: Document) -> list[dict[str, Any]]:
    """Every segment as a content part; the part of a medium names its file."""
    contents: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for segment in document.segments:
        if isinstance(segment, Text):
            contents.append({"type": "text", "text": segment.text})
            continue
        stem = "clip" if isinstance(segment, Video) else "image"
        stem = stem if segment.role is Role.ASSISTANT else "input"
        counts[stem] = counts.get(stem, 0) + 1
        pixels = segment.pixels if isinstance(segment, Image) else segment.frames
        size = {"height": pixels.shape[-3], "width": pixels.shape[-2]}
        clip = {"frames": len(segment.frames), "fps": segment.fps} if isinstance(segment, Video) else {}
        kind = "image" if isinstance(segment, Image) else "video"
        contents.append({"type": kind, "path": f"{stem}-{counts[stem]}.png", **size, **clip})
    return contents


def _messages(segments: Sequence[Any], contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for segment, content in zip(segments, contents, strict=True):
        if not messages or messages[-1]["role"] != str(segment.role):
            messages.append({"role": str(segment.role), "content": []})
        messages[-1]["content"].append(content)
    return messages


def _json(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape


def _markdown(document: Document, contents: Sequence[Mapping[str, Any]]) -> str:
    return markdown(document.segments, [content.get("path", "") for content in contents])


def markdown(segments: Sequence[Segment], addresses: Sequence[str] | None = None) -> str:
    """The user's text as quotations, the assistant's as text, pictures in order. Their URLs are `addresses` (one for
    each segment; texts ignore theirs), or data URLs."""
    blocks: list[str] = []
    counts: dict[str, int] = {}
    for index, segment in enumerate(segments):
        if isinstance(segment, Text):
            block = escape_markdown(segment.text.strip())
        else:
            address = addresses[index] if addresses else data_url(segment)
            name = Path(address).stem.replace("-", " ") if addresses else _name(segment, counts)
            block = f"![{name}]({address})"
        if segment.role is not Role.ASSISTANT:
            block = "\n".join(f"> {line}".rstrip() for line in block.split("\n"))
        if block:
            blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def html_fragment(segments: Sequence[Segment]) -> str:
    """The segments as a fragment of HTML: text escaped, pictures as data URLs."""
    blocks: list[str] = []
    counts: dict[str, int] = {}
    for segment in segments:
        if isinstance(segment, Text):
            text = html.escape(safe_text(segment.text.strip()))
            blocks += [f'<p style="white-space: pre-wrap">{text}</p>'] if text else []
            continue
        height, width = (segment.pixels if isinstance(segment, Image) else segment.frames).shape[-3:-1]
        shown = "display: block; max-width: 100%; height: auto; image-rendering: pixelated"
        scale = max(1, 256 // max(height, width))  # enlarge small pictures
        size = f'width="{scale * width}" height="{scale * height}"'
        blocks.append(f'<img src="{data_url(segment)}" alt="{_name(segment, counts)}" {size} style="{shown}">')
    return "<div>\n" + "\n".join(blocks) + "\n</div>\n"


def html_page(segments: Sequence[Segment], title: str = "Omni") -> str:
    """The segments as one self-contained page. It runs no script and loads nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = "body { font: 1.1rem/1.5 sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{html_fragment(segments)}</body>\n</html>\n"
    )


def data_url(segment: Image | Video) -> str:
    """A picture as PNG, a clip as animated PNG, in a data: URL."""
    if isinstance(segment, Image):
        data = media.encode_png(segment.pixels)
    else:
        with tempfile.TemporaryDirectory() as folder:
            media.save_apng(segment.frames, Path(folder) / "clip.png", segment.fps)
            data = (Path(folder) / "clip.png").read_bytes()
    return f"data:image/png;base64,{base64.standard_b64encode(data).decode()}"


def _name(segment: Image | Video, counts: dict[str, int]) -> str:
    kind = "image" if isinstance(segment, Image) else "clip"
    counts[kind] = counts.get(kind, 0) + 1
    return f"{kind} {counts[kind]}"


# ------------------------------------------------------------------------------------------------ reading


def read_messages(path: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of `data`, the JSON of the reply.json or chat.json at `path`: request and reply, or the whole
    conversation. Media have the paths of files beside `path`.

    Raises ValueError for other JSON, and for a file elsewhere.
    """
    if "messages" in data:
        messages = data["messages"]
    else:
        messages = [*data.get("request", ()), {"role": "assistant", "content": data.get("parts")}]
    found = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            break
        found.append({"role": message.get("role"), "content": [_read_part(part, path.parent) for part in content]})
    else:
        if found:
            return found
    raise ValueError(f"{str(path)!r} is no reply and no conversation: its messages are not lists of parts")


def _read_part(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if part.get("type") == "text":
        return {"type": "text", "text": part.get("text")}
    name = part.get("path")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no file of {str(folder)!r}; the files of a reply are beside its JSON")
    clip = {"fps": part["fps"]} if "fps" in part else {}
    return {"type": part.get("type"), "path": str(folder / name), **clip}


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no link, no external picture, no control character."""
    escaped = re.sub(r"([\\`~\[])", r"\\\1", safe_text(text)).replace("&", "&amp;").replace("<", "&lt;")
    escaped = re.sub(r"(?m)^(\s*)([#>+*=-])", r"\1\\\2", escaped)
    return re.sub(r"(?m)^(\s*\d+)([.)])", r"\1\\\2", escaped)
