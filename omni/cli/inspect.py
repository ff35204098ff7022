"""`omni inspect`: the kind of a file or folder, its content, and a digest check.

Folders: a model, a published decoder (what `omni import` takes, skips and refuses), a checkpoint, a codec, a tokenizer,
a reply, or any folder with a manifest. Files: GGUF (a published decoder), safetensors (names and shapes of the header
alone), a picture (size, latents, reconstruction error), a Document (JSON: every position of its packed layout), and
Omni's reply.json and chat.json (the same). Damaged files give exit code 4, unknown ones 2.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from omni import media
from omni.checkpoint import MANIFEST, verify
from omni.cli.generate import image_segment, load_model
from omni.cli.import_model import describe as describe_decoder
from omni.cli.terminal import Printer, table
from omni.codecs import psnr
from omni.config import parse_json
from omni.document import Document, Text, Video, parse_bounded
from omni.errors import DamagedError, one_line
from omni.generation.reply_files import read_messages
from omni.importers.base import BASE_FILE
from omni.importers.decoders import is_published_decoder
from omni.importers.model_files import ModelFiles
from omni.importers.places import in_package
from omni.model import PUBLISHED, Omni
from omni.pretrained import model_folder
from omni.sequence.features import FeatureSpan
from omni.sequence.layout import LatentSpan, Span, num_context
from omni.text import load_tokenizer
from omni.text.chat import messages_to_document
from omni.text.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from omni.text.tokenizer import Read, Tokenizer

MAX_DOCUMENT_BYTES = 64 << 20
MAX_ENTRIES = 2_000  # of the search for a folder to suggest
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    path = model_folder(arguments.path)
    if not path.exists():
        path = in_package(str(path)) or path
    if not path.exists():
        raise ValueError(
            f"nothing at {str(path)!r}; give a model, a published language model (folder, GGUF file, or a package that "
            "holds one), a checkpoint, tokenizer, picture or Document"
        )
    printer = Printer()
    lines = _describe_folder(path) if path.is_dir() else _describe_file(path, arguments.model, printer)
    for line in lines:
        printer.line(line)
    return 0


# --------------------------------------------------------------------------------------------- folders


def _describe_folder(path: Path) -> list[str]:
    """The report of a folder, line by line. ValueError for a folder of no known kind."""
    if not (path / MANIFEST).is_file():
        if is_published_decoder(path):
            return describe_decoder(path)
        if (path / TOKENIZER_CONFIG).is_file():
            return [f"{path}: a tokenizer", *_describe_tokenizer(path)]
        inside = published_below(path)
        hint = f"; did you mean {str(inside[-1])!r}?" if inside else ""
        raise ValueError(f"{str(path)!r} holds no {MANIFEST} and no {TOKENIZER_CONFIG}{hint}")
    manifest = verify(path)
    lines = [f"{path}: {_folder_kind(path, manifest)}, every byte as published", ""]
    rows = [(name, _size_text(entry["bytes"]), entry["blake2b"][:16]) for name, entry in manifest["files"].items()]
    lines += table(("file", "size", "blake2b"), rows)
    if manifest["info"]:
        lines += ["", f"info: {json.dumps(manifest['info'], sort_keys=True)}"]
    for name in sorted(manifest["files"]):
        if name.endswith(".safetensors"):
            lines += ["", f"{name}: {_describe_weights(path / name)}"]
    for name in ("config.json", "preparation.json", "generation.json", "state.json"):
        if name in manifest["files"] and _read_json(path / name):
            lines += ["", f"{name}:", *_json_lines(path / name)]
    if BASE_FILE in manifest["files"]:
        return [*lines, "", *_describe_base(path)]
    for name in manifest["files"]:
        if name.endswith(TOKENIZER_CONFIG) and not name.startswith(f"{PUBLISHED}/"):
            lines += ["", "tokenizer:", *_describe_tokenizer((path / name).parent)]
    return lines


def _describe_base(path: Path) -> list[str]:
    """Of a model directory without its language model: what and where that is, and the tokenizer."""
    lines = [f"{BASE_FILE}:", *_json_lines(path / BASE_FILE), ""]
    try:
        files = ModelFiles(path, report=lines.append)
        tokenizer = files.folder("tokenizer")
        if TOKENIZER_CONFIG in tokenizer:
            lines += ["", "tokenizer:", *_describe_tokenizer(tokenizer.root, tokenizer.read)]
    except DamagedError as error:
        lines.append(one_line(error))
    return lines


def published_below(path: Path, max_entries: int = MAX_ENTRIES) -> list[Path]:
    """Folders below `path` with a manifest, sorted. Breadth-first over at most `max_entries` files and folders; follows
    no links."""
    found, waiting, seen = [], [path], 0
    for folder in waiting:  # the loop appends to it
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                seen += 1
                if seen > max_entries:
                    return sorted(found)
                if entry.name == MANIFEST:
                    found.append(folder)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
    return sorted(found)


def _folder_kind(path: Path, manifest: Mapping[str, Any]) -> str:
    """What a folder is: by `kind` in its manifest, else by the files in it."""
    named = {"reply": "a reply", "chat": "a conversation", "training state": "a training state"}
    if (kind := manifest["info"].get("kind")) in named:
        return named[kind]
    files = manifest["files"]
    if "model.safetensors" in files and "transformer" in _read_json(path / "config.json"):
        return "a model"
    return "a codec" if "config.json" in files else "a published folder"


def _describe_weights(path: Path) -> str:
    """ "1,234 parameters (bfloat16): transformer 1,000, flow 234", from the header alone."""
    shapes = _tensor_sizes(path)
    parts: dict[str, int] = {}
    for name, (_, count) in shapes.items():
        head = name.partition(".")[0]
        parts[head] = parts.get(head, 0) + count
    kinds = ", ".join(sorted({kind for kind, _ in shapes.values()}))
    listed = ", ".join(f"{name} {count:,}" for name, count in sorted(parts.items(), key=lambda item: -item[1])[:8])
    return f"{sum(parts.values()):,} numbers in {len(shapes)} tensors ({kinds}): {listed}"


def _tensor_sizes(path: Path) -> dict[str, tuple[str, int]]:
    """name -> (dtype, number of elements)."""
    found: dict[str, tuple[str, int]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = file.get_slice(name)
                count = 1
                for side in part.get_shape():
                    count *= side
                found[name] = (str(part.get_dtype()), count)
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a safetensors file ({error}); copy it again") from None
    return found


def _describe_tokenizer(path: Path, read: Read | None = None) -> list[str]:
    """A tokenizer's backend, sizes, and the ids of a sample. read: see Tokenizer.load."""
    tokenizer = load_tokenizer(path, read)
    sample = "draw a red apple 🍎"
    ids = tokenizer.encode(sample)
    control = tokenizer.control
    theirs = "" if tokenizer.own_turns else f" of the published model's {tokenizer.num_text} ids"
    return [
        f"  backend {tokenizer.backend}: {len(tokenizer.text_ids)} text ids{theirs}, then {len(control)} control ids",
        f"  {sample!r} is {len(ids)} ids: {ids}",
    ]


# --------------------------------------------------------------------------------------------- files


def _describe_file(path: Path, model: str | None, printer: Printer) -> list[str]:
    """The report of a file, by its suffix. ValueError for another suffix."""
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a folder nor a regular file; give a file")
    if path.suffix == ".gguf":
        return describe_decoder(path)
    if path.suffix == ".safetensors":
        rows = [(name, kind, f"{count:,}") for name, (kind, count) in _tensor_sizes(path).items()]
        return [f"{path}: {_describe_weights(path)}", "", *table(("tensor", "type", "numbers"), rows)]
    if path.suffix.lower() in _PICTURE_SUFFIXES:
        return _describe_picture(path, model, printer)
    if path.suffix == ".json":
        return _describe_document(path, model)
    raise ValueError(
        f"{str(path)!r} is of an unknown kind; known: .safetensors, .gguf, .json (a Document or a reply) or a picture"
    )


def _describe_picture(path: Path, model_path: str | None, printer: Printer) -> list[str]:
    """Show a picture; report its size, its latents, and its PSNR through the codec."""
    pixels = media.load_image(path)
    printer.picture(pixels)
    lines = [f"{path}: a picture of {pixels.shape[0]} x {pixels.shape[1]} pixels"]
    model = load_model(model_path)
    prepared, codec = model.prepare(image_segment(model, pixels)), model.codec
    [[latents]] = codec.encode_media([prepared])
    back = codec.decode(latents)
    _, rows, columns, channels = latents.shape
    decibels = float(psnr(prepared.pixels[None], back)[0])
    return [
        *lines,
        f"codec {codec.spec.name}: {rows} x {columns} = {rows * columns} latents of {channels} channels",
        f"latents: mean {float(latents.mean()):+.3f}, deviation {float(latents.std()):.3f}",
        f"decoded again: {decibels:.1f} dB from the original",
    ]


def _describe_document(path: Path, model_path: str | None) -> list[str]:
    """The segments of a Document, and its packed layout as a table."""
    document, what = read_document(path)
    model: Omni = load_model(model_path)
    spans = model.spans(document)
    assert model.tokenizer is not None
    rows = describe_layout(spans, model.tokenizer)
    heads = ("positions", "blocks", "rotary (time, row, column)", "what", "loss", "content")
    lines = [f"{path}: {what} of {len(document.segments)} segments", ""]
    for segment in document.segments:
        media_name = "a clip" if isinstance(segment, Video) else "a picture"
        content = repr(segment.text) if isinstance(segment, Text) else media_name
        lines.append(f"  {segment.role}: {content}{' (supervised)' if segment.supervise else ''}")
    return [*lines, "", "packed, context stream:", *table(heads, rows)]


def read_document(path: Path) -> tuple[Document, str]:
    """The Document of a JSON file, and the kind of the file: a Document, or a reply or conversation of Omni with its
    pictures beside it. ValueError for any other file."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{str(path)!r} has more than {MAX_DOCUMENT_BYTES} bytes; give a smaller Document")
    try:
        text = path.read_text(encoding="utf-8")
        data = parse_bounded(text, "it")
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}")
        kind = next((name for key, name in KIND_OF_KEY.items() if key in data and "segments" not in data), None)
        if kind is not None:
            return messages_to_document(read_messages(path, data)), kind
        return Document.from_json(text), "a Document"
    except _PARSE_ERRORS as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else one_line(error)
        way_out = "; Document.to_json() writes one"
        raise ValueError(f"{str(path)!r} is no Document: {reason.removesuffix(way_out)}{way_out}") from None


# Key that only this kind of JSON file has -> the kind in words.
KIND_OF_KEY = {"messages": "a conversation", "parts": "a reply"}
_PARSE_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError, zlib.error),
)  # the errors of json, zlib, torch and Omni on JSON of another shape


def describe_layout(spans: Sequence[Span], tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """One report row per run of text, control id or block: positions, blocks, rotary coordinates, kind, loss,
    content."""
    rows: list[tuple[str, ...]] = []
    index = block = rotary = 0
    for span in spans:
        if isinstance(span, LatentSpan | FeatureSpan):
            t, h, w = span.grid
            n = num_context(span)
            last = (rotary + t - 1, rotary + h - 1, rotary + w - 1)
            kind = "latents" if isinstance(span, LatentSpan) else "features"
            loss = "refined" if isinstance(span, LatentSpan) and span.supervise else ""
            where = f"({rotary}, {rotary}, {rotary}) to {last}"
            rows.append((_range_text(index, n) if n else "", str(block), where, kind, loss, f"{t} x {h} x {w}"))
            if not n:
                continue
            index, block, rotary = index + n, block + 1, rotary + max(span.grid)
            continue
        for ids, supervise in _runs(span.ids, span.supervise, tokenizer):
            is_control = not tokenizer.is_text(ids[0])
            content = tokenizer.name(ids[0]) if is_control else repr(tokenizer.decode(ids))
            what, loss = "control" if is_control else "text", "next token" if supervise else ""
            n = len(ids)
            rows.append((_range_text(index, n), _range_text(block, n), _range_text(rotary, n), what, loss, content))
            index, block, rotary = index + n, block + n, rotary + n
    return rows


def _runs(ids: Sequence[int], supervise: Sequence[bool], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Runs of text ids with equal supervise flags; every control id is its own run."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(ids, supervise, strict=True):
        joins = runs and runs[-1][1] == flag and tokenizer.is_text(token) and tokenizer.is_text(runs[-1][0][-1])
        if joins:
            runs[-1][0].append(token)
        else:
            runs.append(([token], flag))
    return runs


def _range_text(start: int, count: int) -> str:
    """ "3" or "3-7"."""
    return str(start) if count == 1 else f"{start}-{start + count - 1}"


def _size_text(count: int) -> str:
    """A number of bytes in kB or MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where it is unreadable or no object."""
    try:
        data = parse_json(path.read_bytes(), str(path))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _json_lines(path: Path) -> list[str]:
    """The lines of a JSON object, without its outer braces."""
    return [f"  {line}" for line in json.dumps(_read_json(path), indent=1).splitlines()[1:-1]]
